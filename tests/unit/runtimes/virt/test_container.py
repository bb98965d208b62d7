import json
from pathlib import Path
from typing import Any

import pytest

from harness.loop import on_loop
from harness.mounts import in_own_mounts, mount_points
from kata_hybrid.errors import (
    AgentTimeoutError,
    AgentUnavailableError,
    InternalError,
    InvalidArgumentError,
    KataError,
    ProcessNotFoundError,
)
from kata_hybrid.runtimes.base import CreateRequest
from kata_hybrid.runtimes.oci.spec import Spec, parse
from kata_hybrid.runtimes.virt.container import Container, PodDefaults, prepare
from kata_hybrid.testing.fake_agent import FakeAgent, FakeProcess
from kata_hybrid.testing.fake_guest import FakeGuest
from kata_hybrid.types import (
    ContainerId,
    ExecId,
    GuestDevice,
    GuestStorage,
    JsonObject,
    Mount,
    Stdio,
)

C1 = ContainerId("c1")


class AskedAgent(FakeAgent):
    """Remembers what it was asked to create."""

    def __init__(self) -> None:
        super().__init__()
        self.spec: dict[str, Any] = {}
        self.storages: tuple[GuestStorage, ...] = ()
        self.devices: tuple[GuestDevice, ...] = ()
        self.has_sandbox_pidns = False
        self.removed: list[ContainerId] = []

    async def create_container(
        self,
        container_id: ContainerId,
        *,
        spec: JsonObject,
        storages: tuple[GuestStorage, ...],
        devices: tuple[GuestDevice, ...] = (),
        has_sandbox_pidns: bool,
    ) -> None:
        self.spec, self.storages, self.devices = spec, storages, devices
        self.has_sandbox_pidns = has_sandbox_pidns
        await super().create_container(
            container_id, spec=spec, storages=storages, has_sandbox_pidns=has_sandbox_pidns
        )

    async def remove_container(self, container_id: ContainerId, *, timeout_s: int) -> None:
        self.removed.append(container_id)
        await super().remove_container(container_id, timeout_s=timeout_s)


class World:
    """A bundle, a shared folder and a guest."""

    def __init__(self, base: Path) -> None:
        self.bundle = base / "bundle"
        (self.bundle / "rootfs").mkdir(parents=True)
        (self.bundle / "rootfs" / "here").touch()
        self.shared = base / "shared"
        self.shared.mkdir()
        self.agent = AskedAgent()
        self.guest = FakeGuest(self.agent, folder=self.shared)

    def spec(self, **changes: Any) -> Spec:
        document = {
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {"args": ["sh"], "cwd": "/"},
            **changes,
        }
        return parse(json.dumps(document).encode())

    async def prepared(self, *rootfs: Mount, **changes: Any) -> Container:
        request = CreateRequest(
            container_id=C1, bundle=self.bundle, rootfs=rootfs, stdio=Stdio(), config_path=None
        )
        return await prepare(request, self.spec(**changes), guest=self.guest)

    @property
    def root(self) -> Path:
        return self.shared / "passthrough" / "c1" / "rootfs"


@in_own_mounts
@on_loop
async def test_a_relative_root_is_the_bundles(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.prepared()
    assert (world.root / "here").exists()


@in_own_mounts
@on_loop
async def test_an_absolute_root_is_taken_as_it_is(tmp_path: Path) -> None:
    world = World(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "there").touch()
    await world.prepared(root={"path": f"{tmp_path}/other"})
    assert (world.root / "there").exists()


@in_own_mounts
@on_loop
async def test_a_root_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(InvalidArgumentError, match="bundle/missing is not a directory"):
        await world.prepared(root={"path": "missing"})
    assert mount_points(world.shared) == []


@in_own_mounts
@on_loop
async def test_an_image_is_a_disk_for_as_long_as_the_container(tmp_path: Path) -> None:
    world = World(tmp_path)
    image = tmp_path / "image"
    image.touch()
    await world.guest.machine.start()
    container = await world.prepared(Mount(type="ext4", source=str(image), options=("loop", "ro")))
    await container.create(world.agent, is_seccomp_disabled=False, pod=PodDefaults())
    (disk,) = world.guest.machine.disks
    assert (disk.path, disk.is_read_only) == (image, True)
    (storage,) = world.agent.storages
    assert (storage.driver, storage.source, storage.options) == ("fake", "1", ("ro",))
    assert mount_points(world.shared) == []
    await container.remove(world.agent)
    assert world.guest.machine.disks == []


@pytest.mark.parametrize(
    ("creation", "removal", "is_kept"),
    [
        (None, AgentTimeoutError("slow"), True),
        (None, InternalError("busy"), True),
        (None, AgentUnavailableError("gone"), True),
        (AgentTimeoutError("slow"), InvalidArgumentError("no such container"), True),
        (AgentUnavailableError("gone"), AgentUnavailableError("gone"), True),
        (InternalError("no such program"), InvalidArgumentError("no such container"), False),
        (AgentTimeoutError("slow"), None, False),
    ],
)
@in_own_mounts
@on_loop
async def test_a_disk_that_the_guest_may_have_to_write_stays(
    creation: KataError | None, removal: KataError | None, *, is_kept: bool, tmp_path: Path
) -> None:
    world = World(tmp_path)
    image = tmp_path / "image"
    image.touch()
    await world.guest.machine.start()
    container = await world.prepared(Mount(type="ext4", source=str(image), options=("loop",)))
    if creation is not None:
        world.agent.failures["create_container"] = creation
        with pytest.raises(type(creation)):
            await container.create(world.agent, is_seccomp_disabled=False, pod=PodDefaults())
        world.agent.processes[C1, None] = FakeProcess()
    else:
        await container.create(world.agent, is_seccomp_disabled=False, pod=PodDefaults())
    if removal is not None:
        world.agent.failures["remove_container"] = removal
    await container.remove(world.agent)
    assert bool(world.guest.machine.disks) is is_kept


@in_own_mounts
@on_loop
async def test_binds_come_through_the_shared_folder(tmp_path: Path) -> None:
    world = World(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("shared")
    mounts = [
        {"destination": "/data", "type": "none", "source": f"{tmp_path}/data", "options": ["bind"]},
        {"destination": "/proc", "type": "proc", "source": "proc"},
    ]
    container = await world.prepared(mounts=mounts)
    await container.create(world.agent, is_seccomp_disabled=False, pod=PodDefaults())
    data, proc = world.agent.spec["mounts"]
    assert (data["type"], data["options"]) == ("bind", ["bind"])
    relative = Path(data["source"]).relative_to(world.guest.folder.guest_path)
    assert (world.shared / relative / "file").read_text() == "shared"
    assert (proc["type"], proc["source"]) == ("proc", "proc")


@in_own_mounts
@on_loop
async def test_what_is_the_pods_is_the_containers_unless_it_has_its_own(tmp_path: Path) -> None:
    world = World(tmp_path)
    (tmp_path / "hosts").touch()
    mounts = [{"destination": "/etc/hosts", "type": "bind", "source": f"{tmp_path}/hosts"}]
    container = await world.prepared(mounts=mounts, linux={"sysctl": {"a.b": "own"}})
    pod = PodDefaults(
        files={"/etc/hosts": "/pod/hosts", "/etc/hostname": "/pod/hostname"},
        sysctls={"a.b": "pod's", "c.d": "pod's"},
    )
    await container.create(world.agent, is_seccomp_disabled=False, pod=pod)
    sources = {each["destination"]: each["source"] for each in world.agent.spec["mounts"]}
    assert sources["/etc/hostname"] == "/pod/hostname"
    assert sources["/etc/hosts"].endswith("+hosts")
    assert world.agent.spec["linux"]["sysctl"] == {"a.b": "own", "c.d": "pod's"}


@in_own_mounts
@on_loop
async def test_a_relative_bind_is_the_bundles(tmp_path: Path) -> None:
    world = World(tmp_path)
    (world.bundle / "conf").write_text("from the bundle")
    mounts = [{"destination": "/conf", "type": "bind", "source": "conf"}]
    container = await world.prepared(mounts=mounts)
    await container.create(world.agent, is_seccomp_disabled=False, pod=PodDefaults())
    source = Path(world.agent.spec["mounts"][0]["source"])
    relative = source.relative_to(world.guest.folder.guest_path)
    assert (world.shared / relative).read_text() == "from the bundle"


@pytest.mark.parametrize(("path", "expected"), [("/proc/1/ns/pid", True), ("", False)])
@in_own_mounts
@on_loop
async def test_a_shared_pid_namespace_is_told(path: str, *, expected: bool, tmp_path: Path) -> None:
    world = World(tmp_path)
    container = await world.prepared(linux={"namespaces": [{"type": "pid", "path": path}]})
    await container.create(world.agent, is_seccomp_disabled=False, pod=PodDefaults())
    assert world.agent.has_sandbox_pidns is expected


@in_own_mounts
@on_loop
async def test_release_gives_everything_back_and_repeats(tmp_path: Path) -> None:
    world = World(tmp_path)
    (tmp_path / "data").mkdir()
    mounts = [{"destination": "/data", "type": "bind", "source": f"{tmp_path}/data"}]
    container = await world.prepared(mounts=mounts)
    await container.create(world.agent, is_seccomp_disabled=False, pod=PodDefaults())
    assert len(mount_points(world.shared)) == 2
    container.release()
    container.release()
    assert mount_points(world.shared) == []
    assert list((world.shared / "passthrough").iterdir()) == []
    assert (world.bundle / "rootfs" / "here").exists()


@in_own_mounts
@on_loop
async def test_a_container_is_removed_once_and_only_if_it_was_created(tmp_path: Path) -> None:
    world = World(tmp_path)
    container = await world.prepared()
    await container.remove(world.agent)
    assert world.agent.removed == []
    await container.create(world.agent, is_seccomp_disabled=False, pod=PodDefaults())
    await container.remove(world.agent)
    await container.remove(world.agent)
    assert world.agent.removed == [C1]


@in_own_mounts
@on_loop
async def test_a_create_that_failed_in_the_guest_is_removed_there(tmp_path: Path) -> None:
    world = World(tmp_path)
    container = await world.prepared()
    world.agent.failures["create_container"] = InternalError("no such program")
    with pytest.raises(InternalError):
        await container.create(world.agent, is_seccomp_disabled=False, pod=PodDefaults())
    await container.remove(world.agent)
    assert world.agent.removed == [C1]


@in_own_mounts
@on_loop
async def test_processes_are_found_by_exec(tmp_path: Path) -> None:
    container = await World(tmp_path).prepared()
    assert container.find(None) is container.process
    with pytest.raises(ProcessNotFoundError, match="exec e1 of container c1 not found"):
        container.find(ExecId("e1"))
