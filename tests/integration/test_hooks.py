"""Hooks of the OCI spec on the host, and the network namespace that they put links into."""

import contextlib
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.containers import Containers
from harness.daemon import Output

pytestmark = pytest.mark.newest

_ENVIRONMENT = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]


def shell(script: str) -> dict[str, Any]:
    return {"path": "/bin/sh", "args": ["sh", "-c", script], "env": _ENVIRONMENT}


class Hooked:
    """Runs containers whose specs have hooks, which only a spec from a file can."""

    def __init__(self, containers: Containers, folder: Path, spec: dict[str, Any]) -> None:
        self._containers = containers
        self._folder = folder
        self._spec = spec

    def attempt(self, *command: str, **hooks: list[dict[str, Any]]) -> Output:
        """Run a command in the foreground, whatever comes of it."""
        process = {**self._spec["process"], "args": list(command), "terminal": False}
        path = self._folder / "config.json"
        path.write_text(json.dumps({**self._spec, "process": process, "hooks": hooks}))
        name = self._containers.new_id()
        options = ["--rm", "--config", str(path)]
        arguments = self._containers.run_arguments(name, (), options)
        # The spec names the root file system: there is no image.
        arguments.remove(self._containers.image)
        output = self._containers.containerd.attempt(*arguments, timeout_s=120)
        self._containers.containerd.attempt("c", "rm", name)
        return output


@pytest.fixture
def hooked(containers: Containers, tmp_path: Path) -> Iterator[Hooked]:
    with contextlib.ExitStack() as undo:
        root = containers.containerd.home / f"root-{secrets.token_hex(3)}"
        root.mkdir()
        undo.callback(root.rmdir)
        containers.containerd.ctr("images", "mount", "--rw", containers.image, str(root))
        undo.callback(containers.containerd.ctr, "images", "unmount", "--rm", str(root))
        with containers.detached("sleep", "1000") as name:
            spec = json.loads((containers.containerd.bundle(name) / "config.json").read_text())
        spec["root"] = {"path": str(root)}
        spec["annotations"] = {"one": "two"}
        # As in runc's own default: a folder of the container's name.
        spec["linux"].pop("cgroupsPath", None)
        yield Hooked(containers, tmp_path, spec)


def test_a_link_that_a_hook_makes_is_the_containers(hooked: Hooked, tmp_path: Path) -> None:
    link = f"kh{secrets.token_hex(3)}"
    make = f"""
        cat >{tmp_path}/state
        pid=$(sed -E 's/.*"pid": ?([0-9]+).*/\\1/' {tmp_path}/state)
        ip link add {link} type veth peer name eth0 netns $pid
        nsenter -t $pid -n ip address add 10.99.0.2/24 dev eth0
        nsenter -t $pid -n ip link set eth0 up
        ip link set {link} up
    """
    output = hooked.attempt(
        *("ip", "-o", "address", "show", "dev", "eth0"), createRuntime=[shell(f"set -e; {make}")]
    )
    assert output.status == 0, output
    assert "10.99.0.2/24" in output.text
    state = json.loads((tmp_path / "state").read_text())
    assert state["annotations"]["one"] == "two"
    assert (Path(state["bundle"]).name, state["pid"] > 1) == (state["id"], True)


def test_each_runs_at_its_time(hooked: Hooked, tmp_path: Path) -> None:
    said = tmp_path / "said"
    points = ("prestart", "createRuntime", "poststart", "poststop")
    hooks = {point: [shell(f"echo {point} >>{said}")] for point in points}
    output = hooked.attempt("true", **hooks)
    assert output.status == 0, output
    assert said.read_text().split() == list(points)


def test_one_that_fails_ends_the_creation_and_is_quoted(
    vm_containers: Containers, hooked: Hooked, tmp_path: Path
) -> None:
    assert vm_containers.is_virtual
    output = hooked.attempt(
        "true",
        createRuntime=[shell("echo for no reason >&2; exit 3")],
        poststop=[shell(f"touch {tmp_path}/undone")],
    )
    assert output.status != 0
    assert "createRuntime hook /bin/sh: exit status 3: for no reason" in output.error
    assert (tmp_path / "undone").exists()


def test_a_task_is_found_in_a_network_namespace_of_its_own(containers: Containers) -> None:
    with containers.detached("sleep", "1000") as name:
        pid = containers.task(name).pid
        own = Path(f"/proc/{pid}/ns/net").readlink()
        assert own != Path("/proc/self/ns/net").readlink()
