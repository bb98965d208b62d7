import pytest

from kata_hybrid.runtimes.oci.kind import CONTAINER, SANDBOX, SINGLE, container_kind, sandbox_id

TYPES = [
    ("io.kubernetes.cri.container-type", "sandbox", SANDBOX),
    ("io.kubernetes.cri.container-type", "container", CONTAINER),
    ("io.kubernetes.cri-o.ContainerType", "sandbox", SANDBOX),
    ("io.kubernetes.cri-o.ContainerType", "container", CONTAINER),
    ("io.kubernetes.docker.type", "podsandbox", SANDBOX),
    ("io.kubernetes.docker.type", "container", CONTAINER),
]


@pytest.mark.parametrize(("key", "value", "kind"), TYPES)
def test_annotations_tell_the_kind(key: str, value: str, kind: str) -> None:
    assert container_kind({key: value}) == kind


@pytest.mark.parametrize("annotations", [{}, {"io.kubernetes.cri.container-type": "other"}])
def test_everything_else_is_on_its_own(annotations: dict[str, str]) -> None:
    assert container_kind(annotations) == SINGLE


@pytest.mark.parametrize(
    "key",
    ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID", "io.kubernetes.sandbox.id"],
)
def test_a_container_of_a_pod_joins_its_sandbox(key: str) -> None:
    annotations = {"io.kubernetes.cri.container-type": "container", key: "pod"}
    assert sandbox_id("c1", annotations) == "pod"


def test_a_sandbox_is_its_own() -> None:
    annotations = {
        "io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri.sandbox-id": "other",
    }
    assert sandbox_id("c1", annotations) == "c1"


def test_a_container_that_names_no_sandbox_is_its_own() -> None:
    assert sandbox_id("c1", {"io.kubernetes.cri.container-type": "container"}) == "c1"
