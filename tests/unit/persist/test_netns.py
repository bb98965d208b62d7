import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.pods import Node, Pod
from kata_hybrid.persist import netns, recovery


@pytest.fixture
def pod() -> Iterator[Pod]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with Node.made() as node:
        pod = node.pod()
        pod.tc("qdisc", "add", "dev", "eth0", "ingress")
        pod.add_filter("eth0", netns.FILTER_PRIORITY)
        yield pod


def identity(pod: Pod) -> str:
    with pod.path.open("rb") as file:
        return netns.identity(file.fileno())


def test_hooks_are_removed_from_inside_and_we_come_back(pod: Pod) -> None:
    own = Path("/proc/thread-self/ns/net").stat().st_ino
    links = ["gone", "eth0", "lo"]
    path = os.fspath(pod.path)
    assert netns.remove_hooks(path, expected=identity(pod), links=links) == []
    assert pod.leftovers() == ""
    assert Path("/proc/thread-self/ns/net").stat().st_ino == own
    assert netns.remove_hooks(path, expected=identity(pod), links=links) == []


def test_filters_of_others_stay_and_so_does_what_they_hang_on(pod: Pod) -> None:
    pod.add_filter("eth0", 7)
    path = os.fspath(pod.path)
    assert netns.remove_hooks(path, expected=identity(pod), links=["eth0"]) == []
    filters = pod.tc("filter", "show", "dev", "eth0", "ingress")
    assert "pref 7 " in filters
    assert f"pref {netns.FILTER_PRIORITY} " not in filters


def test_a_discipline_without_filters_goes(pod: Pod) -> None:
    # Killed between the two.
    pod.tc("filter", "delete", "dev", "eth0", "ingress")
    path = os.fspath(pod.path)
    assert netns.remove_hooks(path, expected=identity(pod), links=["eth0"]) == []
    assert pod.leftovers() == ""


def test_a_path_that_cannot_be_opened_is_a_problem(pod: Pod) -> None:
    path = "/" + "x" * 5000
    (problem,) = netns.remove_hooks(path, expected=identity(pod), links=["eth0"])
    assert "File name too long" in problem


def test_another_namespace_at_the_same_path_is_left_alone(pod: Pod) -> None:
    path = os.fspath(pod.path)
    assert netns.remove_hooks(path, expected="1:2", links=["eth0"]) == []
    assert "ingress" in pod.leftovers()


def test_a_namespace_that_is_gone_is_no_problem(tmp_path: Path) -> None:
    assert netns.remove_hooks(os.fspath(tmp_path / "x"), expected="1:2", links=["eth0"]) == []


def test_a_path_that_is_no_namespace_is_a_problem(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    path = tmp_path / "file"
    path.touch()
    with path.open("rb") as file:
        expected = netns.identity(file.fileno())
    (problem,) = netns.remove_hooks(os.fspath(path), expected=expected, links=["eth0"])
    assert "Invalid argument" in problem


def test_recovery_undoes_what_is_recorded(pod: Pod, tmp_path: Path) -> None:
    state = tmp_path / "s"
    state.mkdir()
    (state / "state.json").write_text(
        f'{{"version": 1, "links": {{"namespace": "{pod.path}", "identity": "{identity(pod)}",'
        ' "links": ["eth0", 7]}}'
    )
    assert recovery.clean_up(os.fspath(state)) == []
    assert pod.leftovers() == ""
    assert not state.exists()


@pytest.mark.parametrize("links", ["null", "[]", '{"namespace": 1}', '{"namespace": "/x"}'])
def test_a_record_that_says_nothing_is_no_problem(links: str, tmp_path: Path) -> None:
    state = tmp_path / "s"
    state.mkdir()
    (state / "state.json").write_text(f'{{"version": 1, "links": {links}}}')
    assert recovery.clean_up(os.fspath(state)) == []
