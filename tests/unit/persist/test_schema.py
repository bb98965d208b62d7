import json

from kata_hybrid.persist.schema import SandboxRecord
from kata_hybrid.types import ContainerId, LinkHooks, ProcessIdentity, SandboxId

SHIM = ProcessIdentity(name="shim", pid=10, start_ticks=20)


def test_the_smallest_record_has_every_key() -> None:
    record = SandboxRecord(sandbox_id=SandboxId("s"), namespace="k8s", shim=SHIM)
    assert json.loads(record.to_json()) == {
        "version": 1,
        "sandbox_id": "s",
        "namespace": "k8s",
        "shim": {"name": "shim", "pid": 10, "start_ticks": 20},
        "containers": [],
        "processes": [],
        "mounts": [],
        "cgroups": [],
        "links": None,
    }


def test_what_a_sandbox_holds_is_written() -> None:
    record = SandboxRecord(
        sandbox_id=SandboxId("s"),
        namespace="k8s",
        shim=SHIM,
        containers=(ContainerId("s"), ContainerId("c1")),
        processes=(ProcessIdentity(name="qemu", pid=11, start_ticks=21),),
        mounts=("/run/x",),
        cgroups=("/sys/fs/cgroup/x",),
        links=LinkHooks(namespace="/run/netns/x", identity="4:5", links=("eth0",)),
    )
    written = json.loads(record.to_json())
    assert written["containers"] == ["s", "c1"]
    assert written["processes"] == [{"name": "qemu", "pid": 11, "start_ticks": 21}]
    assert (written["mounts"], written["cgroups"]) == (["/run/x"], ["/sys/fs/cgroup/x"])
    assert written["links"] == {
        "namespace": "/run/netns/x",
        "identity": "4:5",
        "links": ["eth0"],
    }
