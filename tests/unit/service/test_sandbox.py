"""The sandbox service over a sandbox on a fake guest."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from harness.loop import on_loop, until
from kata_hybrid.errors import (
    AlreadyExistsError,
    GuestBootTimeoutError,
    InvalidArgumentError,
    InvalidIdError,
    NotFoundError,
    UnavailableError,
    UnimplementedError,
)
from kata_hybrid.persist.store import SandboxStore
from kata_hybrid.protos import cri_pb2
from kata_hybrid.runtimes.base import CreateRequest, TaskEvent
from kata_hybrid.runtimes.oci.spec import Spec
from kata_hybrid.runtimes.virt.pod import PodSandbox
from kata_hybrid.runtimes.virt.sandbox import VirtSandbox
from kata_hybrid.service.sandbox import SandboxService
from kata_hybrid.testing.fake_agent import FakeAgent
from kata_hybrid.testing.fake_guest import FakeGuest, FakeHooks, FakeStreams, prepare_nothing
from kata_hybrid.types import ContainerId, SandboxId, Stdio

SID = "s1"


class Log:
    """Collects events."""

    def __init__(self) -> None:
        self.events: list[TaskEvent] = []

    def emit(self, event: TaskEvent) -> None:
        self.events.append(event)


class World:
    """A service, and what is below it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.agent = FakeAgent()
        self.guest = FakeGuest(self.agent, folder=folder)
        self.specs: list[Spec] = []
        self.shutdowns = 0
        self.making = asyncio.Event()
        self.making.set()
        self.log = Log()
        self.sandbox = VirtSandbox(
            guest_factory=self._make_guest,
            streams=FakeStreams(),
            store=SandboxStore(folder, sandbox_id=SandboxId(SID), namespace="test"),
            events=self.log,
            hooks=FakeHooks(),
            preparer=prepare_nothing,
        )
        self.service = SandboxService(
            PodSandbox(SandboxId(SID), self.sandbox), on_shutdown=self._shut_down
        )

    def _shut_down(self) -> None:
        self.shutdowns += 1

    async def _make_guest(self, _request: CreateRequest, spec: Spec) -> FakeGuest:
        self.specs.append(spec)
        await self.making.wait()
        return self.guest

    async def call(self, name: str, **fields: Any) -> Any:
        method = self.service.methods()[name]
        request: Any = method.request_type
        async with asyncio.timeout(10):
            return await method.handler(request(**{"sandbox_id": SID, **fields}))

    async def create(self, **fields: Any) -> Any:
        return await self.call("CreateSandbox", **{"bundle_path": "/bundle", **fields})

    async def state(self) -> str:
        return str((await self.call("SandboxStatus")).state)


def pod_config(**fields: Any) -> AnyMessage:
    config = cri_pb2.PodSandboxConfig(**fields)
    return AnyMessage(
        type_url="types.example/runtime.v1.PodSandboxConfig", value=config.SerializeToString()
    )


@on_loop
async def test_a_sandbox_lives_from_its_start_to_its_shutdown(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.create()
    assert await world.state() == "SANDBOX_NOTREADY"
    started = await world.call("StartSandbox")
    assert started.pid == world.guest.task_pid
    assert started.created_at.seconds > 0
    assert await world.state() == "SANDBOX_READY"
    assert (await world.call("StartSandbox")).pid == started.pid
    await world.call("PingSandbox")
    assert not world.sandbox.is_empty
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(world.call("WaitSandbox"))
        await asyncio.sleep(0)
        await world.call("StopSandbox", timeout_secs=5)
    assert waiting.result().exit_status == 0
    assert (await world.call("SandboxStatus")).exited_at.seconds > 0
    await world.call("StopSandbox")
    await world.call("ShutdownSandbox")
    await world.call("ShutdownSandbox")
    assert world.shutdowns == 2
    assert world.sandbox.is_empty


@on_loop
async def test_the_pods_description_is_the_guests(tmp_path: Path) -> None:
    world = World(tmp_path)
    resources = cri_pb2.LinuxContainerResources(
        cpu_period=100_000, cpu_quota=150_000, memory_limit_in_bytes=1 << 28
    )
    await world.create(
        netns_path="/run/netns/pod",
        annotations={"a": "given"},
        options=pod_config(
            hostname="box",
            dns_config=cri_pb2.DnsConfig(servers=["10.0.0.1"], searches=["a", "b"]),
            annotations={"a": "config", "b": "c"},
            linux=cri_pb2.LinuxPodSandboxConfig(cgroup_parent="/pods/p1", resources=resources),
        ),
    )
    await world.call("StartSandbox")
    (spec,) = world.specs
    assert (spec.hostname, spec.namespaces) == ("box", {"network": "/run/netns/pod"})
    assert spec.cgroups_path == f"/pods/p1/{SID}"
    assert (spec.annotations["a"], spec.annotations["b"]) == ("given", "c")
    assert spec.annotations["io.kubernetes.cri.sandbox-cpu-quota"] == "150000"
    assert spec.annotations["io.kubernetes.cri.sandbox-memory"] == str(1 << 28)
    written = tmp_path / "pod" / "resolv.conf"
    assert written.read_text() == "nameserver 10.0.0.1\nsearch a b\n"
    await world.call("ShutdownSandbox")


@pytest.mark.parametrize(
    ("parent", "path"),
    [("", ""), ("/a/", f"/a/{SID}"), ("/a.slice/a-b.slice", f"a-b.slice:cri-containerd:{SID}")],
)
@on_loop
async def test_its_cgroup_is_named_as_containerd_does(
    parent: str, path: str, tmp_path: Path
) -> None:
    world = World(tmp_path)
    linux = cri_pb2.LinuxPodSandboxConfig(cgroup_parent=parent)
    await world.create(options=pod_config(linux=linux))
    await world.call("StartSandbox")
    assert world.specs[0].cgroups_path == path
    await world.call("ShutdownSandbox")


@on_loop
async def test_containers_come_and_go_and_it_stays(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.create()
    await world.call("StartSandbox")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "config.json").write_text(
        '{"ociVersion": "1.0.2", "root": {"path": "r"}, "process": {"args": ["x"], "cwd": "/"}}'
    )
    container_id = ContainerId("c1")
    for _ in range(2):
        await world.sandbox.create(
            CreateRequest(
                container_id=container_id,
                bundle=bundle,
                rootfs=(),
                stdio=Stdio(),
                config_path=None,
            )
        )
        await world.sandbox.delete(container_id, None)
        assert await world.state() == "SANDBOX_READY"
    assert json.loads((tmp_path / "state.json").read_bytes())["containers"] == [SID]
    await world.call("ShutdownSandbox")


@on_loop
async def test_a_machine_that_is_lost_ends_the_wait(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.create()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(world.call("WaitSandbox"))
        await asyncio.sleep(0)
        await world.call("StartSandbox")
        world.guest.lose("crash")
    assert waiting.result().exit_status == 255
    await until(lambda: not world.sandbox.is_ready)
    assert await world.state() == "SANDBOX_NOTREADY"
    await world.call("ShutdownSandbox")


@on_loop
async def test_a_start_that_fails_is_told_and_can_be_shut_down(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.create()
    world.agent.failures["create_sandbox"] = GuestBootTimeoutError("silence")
    with pytest.raises(GuestBootTimeoutError):
        await world.call("StartSandbox")
    assert await world.state() == "SANDBOX_NOTREADY"
    await world.call("ShutdownSandbox")
    assert world.shutdowns == 1
    assert world.sandbox.is_empty


@on_loop
async def test_before_it_is_created_there_is_none(tmp_path: Path) -> None:
    world = World(tmp_path)
    for name in ("StartSandbox", "StopSandbox", "WaitSandbox", "SandboxStatus", "PingSandbox"):
        with pytest.raises(NotFoundError, match="sandbox s1 not found"):
            await world.call(name)
    platform = (await world.call("Platform")).platform
    assert platform.os == "linux"
    assert platform.architecture in {"amd64", "arm64"}
    await world.call("ShutdownSandbox")


@on_loop
async def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(InvalidIdError):
        await world.create(sandbox_id="../x")
    with pytest.raises(InvalidArgumentError, match="bundle_path must be an absolute path"):
        await world.create(bundle_path="relative")
    wrong = AnyMessage(type_url="runtime.v1.PodSandboxConfig", value=b"\xff")
    with pytest.raises(InvalidArgumentError, match="options are no runtime"):
        await world.create(options=wrong)
    await world.create(options=AnyMessage(type_url="another.Kind", value=b"\xff"))
    with pytest.raises(AlreadyExistsError, match="sandbox s1 already exists"):
        await world.create()
    with pytest.raises(UnimplementedError):
        await world.call("SandboxMetrics")


@on_loop
async def test_a_sandbox_whose_guest_does_not_boot_is_wanted_no_more(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.agent.failures["create_sandbox"] = GuestBootTimeoutError("no answer")
    await world.create()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(world.call("WaitSandbox"))
        await asyncio.sleep(0)
        with pytest.raises(GuestBootTimeoutError):
            await world.call("StartSandbox")
    assert waiting.result().exit_status != 0
    assert world.sandbox.is_empty


@on_loop
async def test_a_sandbox_that_is_stopped_while_its_guest_is_made_does_not_boot(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    await world.create()
    world.making.clear()
    async with asyncio.TaskGroup() as group:
        starting = group.create_task(unavailable(world))
        await until(lambda: bool(world.specs))
        await world.call("StopSandbox")
        world.making.set()
    assert starting.done()
    assert not world.guest.task_pid, "it was not started"


async def unavailable(world: World) -> None:
    with pytest.raises(UnavailableError, match="closed"):
        await world.call("StartSandbox")
