import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_hybrid.shim.failure import ShimError
from kata_hybrid.shim.group import find_group, group_of, read_annotations

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.parametrize(
    ("annotations", "group", "is_member"),
    [
        ({}, "c1", False),
        (
            {
                "io.kubernetes.cri.container-type": "sandbox",
                "io.kubernetes.cri.sandbox-id": "c1",
            },
            "c1",
            False,
        ),
        (
            {
                "io.kubernetes.cri.container-type": "container",
                "io.kubernetes.cri.sandbox-id": "pod",
            },
            "pod",
            True,
        ),
        (
            {
                "io.kubernetes.cri-o.ContainerType": "container",
                "io.kubernetes.cri-o.SandboxID": "pod",
            },
            "pod",
            True,
        ),
        ({"io.kubernetes.cri-o.ContainerType": "sandbox"}, "c1", False),
        ({"io.kubernetes.docker.type": "podsandbox"}, "c1", False),
        (
            {"io.kubernetes.docker.type": "container", "io.kubernetes.sandbox.id": "pod"},
            "pod",
            True,
        ),
        ({"io.containerd.runc.v2.group": "g"}, "g", False),
    ],
)
def test_the_sandbox_of_a_container(
    annotations: dict[str, str],
    group: str,
    is_member: bool,  # noqa: FBT001
) -> None:
    found = group_of(annotations, container_id="c1")
    assert (found.id, found.is_member) == (group, is_member)


@pytest.mark.parametrize(
    "annotations",
    [
        {"io.kubernetes.cri.container-type": "container"},
        {"io.kubernetes.cri.container-type": "alien", "io.kubernetes.cri.sandbox-id": "x"},
        {
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "../../etc",
        },
    ],
)
def test_contradictions_are_refused(annotations: dict[str, str]) -> None:
    with pytest.raises(ShimError, match=r"io\.kubernetes\.cri"):
        group_of(annotations, container_id="c1")


def test_a_bundle_without_config_is_a_sandbox(tmp_path: Path) -> None:
    assert find_group(str(tmp_path), container_id="sb").id == "sb"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"annotations": []}',
        '{"annotations": {"a": 1}}',
        '{"a": 1} trailing',
        "nul",
        "[" * 100_000,
        "\ufeff{}",
    ],
)
def test_a_malformed_config_says_so(text: str) -> None:
    with pytest.raises(ShimError, match=r"config\.json is malformed"):
        read_annotations(text.encode())


def test_a_config_that_is_no_text_says_so() -> None:
    with pytest.raises(ShimError, match=r"config\.json is malformed"):
        read_annotations(b"\xff\xfe{}")


@given(st.dictionaries(st.text(), JSON, max_size=4), st.dictionaries(st.text(), st.text()))
def test_annotations_are_read_as_json_does(
    spec: dict[str, object], annotations: dict[str, str]
) -> None:
    text = json.dumps({**spec, "annotations": annotations}, indent=1)
    assert read_annotations(f" \n{text}\n".encode()) == annotations
