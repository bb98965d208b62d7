import copy
import json
from typing import Any

import pytest

from kata_hybrid.errors import InvalidSpecError
from kata_hybrid.runtimes.oci.rewrite import guest_resources, guest_spec
from kata_hybrid.runtimes.oci.spec import SpecMount, parse

SPEC: dict[str, Any] = {
    "ociVersion": "1.0.2",
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "box",
    "process": {
        "args": ["sh"],
        "cwd": "/",
        "apparmorProfile": "a",
        "selinuxLabel": "s",
        "capabilities": {"bounding": ["CAP_KILL"]},
    },
    "mounts": [{"destination": "/d", "type": "bind", "source": "/host"}],
    "annotations": {"io.kubernetes.cri.container-type": "container"},
    "hooks": {
        "prestart": [{"path": "/host"}],
        "createRuntime": [{"path": "/host"}],
        "startContainer": [{"path": "/in/container"}],
    },
    "linux": {
        "mountLabel": "m",
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
        "namespaces": [
            {"type": "pid", "path": "/proc/1/ns/pid"},
            {"type": "network", "path": "/run/netns/x"},
            {"type": "time"},
            {"type": "ipc", "path": "/proc/1/ns/ipc"},
            {"type": "mount"},
        ],
        "resources": {
            "devices": [{"allow": False}],
            "blockIO": {"weight": 1},
            "network": {"classID": 1},
            "memory": {"limit": 1},
            "cpu": {"cpus": "0", "mems": "0", "shares": 2},
        },
        "maskedPaths": ["/proc/kcore"],
    },
}
MOUNT = SpecMount(destination="/d", type="bind", source="/guest", options=("ro",))


def rewritten(spec: dict[str, Any] = SPEC, *, is_seccomp_disabled: bool = False) -> Any:
    return guest_spec(
        parse(json.dumps(spec).encode()),
        root_path="/guest/rootfs",
        mounts=(MOUNT,),
        bundle="/bundle",
        is_seccomp_disabled=is_seccomp_disabled,
    )


def test_root_and_mounts_are_the_guests() -> None:
    guest = rewritten()
    assert guest["root"] == {"path": "/guest/rootfs", "readonly": True}
    assert guest["mounts"] == [MOUNT.to_json()]


def test_the_agent_is_told_kind_and_bundle() -> None:
    assert rewritten()["annotations"] == {
        "io.kubernetes.cri.container-type": "container",
        "io.katacontainers.pkg.oci.container_type": "pod_container",
        "io.katacontainers.pkg.oci.bundle_path": "/bundle",
    }


def test_host_hooks_stay_on_the_host() -> None:
    assert rewritten()["hooks"] == {"startContainer": [{"path": "/in/container"}]}


def test_labels_of_the_host_are_left_out() -> None:
    guest = rewritten()
    assert guest["process"] == {
        "args": ["sh"],
        "cwd": "/",
        "capabilities": {"bounding": ["CAP_KILL"]},
    }
    assert "mountLabel" not in guest["linux"]


def test_namespaces_lose_their_paths_and_some_are_dropped() -> None:
    assert rewritten()["linux"]["namespaces"] == [{"type": "ipc"}, {"type": "mount"}]


def test_there_is_always_a_namespace() -> None:
    spec = {**SPEC, "linux": {"namespaces": [{"type": "pid"}]}}
    assert rewritten(spec)["linux"]["namespaces"] == [{"type": "mount"}]


def test_resources_of_the_host_are_left_out() -> None:
    assert rewritten()["linux"]["resources"] == {"memory": {"limit": 1}, "cpu": {"shares": 2}}


def test_the_rest_is_kept() -> None:
    guest = rewritten()
    assert (guest["ociVersion"], guest["hostname"]) == ("1.0.2", "box")
    assert guest["linux"]["maskedPaths"] == ["/proc/kcore"]
    assert guest["linux"]["seccomp"] == {"defaultAction": "SCMP_ACT_ERRNO"}


def test_seccomp_can_be_left_out() -> None:
    assert "seccomp" not in rewritten(is_seccomp_disabled=True)["linux"]


def test_the_hosts_document_is_not_changed() -> None:
    spec = parse(json.dumps(SPEC).encode())
    guest_spec(spec, root_path="/r", mounts=(), bundle="/b", is_seccomp_disabled=True)
    assert spec.raw == SPEC


@pytest.mark.parametrize("linux", [None, {}, {"namespaces": None, "resources": None}])
def test_a_spec_that_says_little_gets_what_the_agent_needs(linux: Any) -> None:
    guest = rewritten({**SPEC, "linux": linux, "hooks": None, "annotations": None})
    assert guest["linux"] == {"namespaces": [{"type": "mount"}], "resources": {}}
    assert guest["hooks"] == {}


def test_a_deep_document_is_rewritten() -> None:
    deep: list[Any] = []
    for _ in range(700):
        deep = [deep]
    assert rewritten({**SPEC, "extension": deep})["hostname"] == "box"


def test_resources_given_are_not_changed() -> None:
    resources: dict[str, object] = {"cpu": {"cpus": "0", "quota": 1}, "devices": []}
    before = copy.deepcopy(resources)
    assert guest_resources(resources) == {"cpu": {"quota": 1}}
    assert resources == before


@pytest.mark.parametrize(
    ("resources", "path"), [([], "linux.resources"), ({"cpu": [1]}, "linux.resources.cpu")]
)
def test_resources_of_the_wrong_type_are_named(resources: object, path: str) -> None:
    with pytest.raises(InvalidSpecError, match=f"^{path} must be an object, is list$"):
        guest_resources(resources)
