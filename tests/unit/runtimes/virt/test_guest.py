import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from harness.leaks import count_descriptors
from harness.loop import on_loop
from kata_hybrid.config.model import AgentConfig
from kata_hybrid.errors import (
    FailedPreconditionError,
    GuestBootTimeoutError,
    InternalError,
    KataError,
    UnavailableError,
    VmExitedError,
    VmmError,
)
from kata_hybrid.resource.cgroup import SandboxCgroup
from kata_hybrid.resource.network.loopback import Loopback
from kata_hybrid.resource.share_fs.base import SharedFolder
from kata_hybrid.runtimes.virt import guest as guest_module
from kata_hybrid.runtimes.virt.guest import VirtGuest
from kata_hybrid.testing.fake_agent import FakeAgent
from kata_hybrid.types import (
    BlockDevice,
    FolderDevice,
    GuestDisk,
    GuestInterface,
    GuestNetwork,
    GuestStorage,
    LinkHooks,
    NetworkDevice,
    ProcessIdentity,
    SandboxId,
    VhostUserFs,
    VmExit,
)

QEMU = ProcessIdentity(name="qemu", pid=10, start_ticks=1)
DAEMON = ProcessIdentity(name="virtiofsd", pid=11, start_ticks=1)


class Machine:
    """A hypervisor that writes down what it is asked."""

    name = "fake"
    agent_address = "unix:///fake"
    processes = (QEMU,)
    task_pid = 10

    def __init__(self, steps: list[str]) -> None:
        self.steps = steps
        self.failures: dict[str, Exception] = {}
        self.end: asyncio.Future[VmExit] = asyncio.get_running_loop().create_future()

    def add_shared_folder(self, folder: FolderDevice) -> None:
        self.steps.append(f"add {folder.tag}")

    async def add_disk(self, disk: BlockDevice) -> GuestDisk:
        return GuestDisk(driver="blk", source=disk.id)

    async def remove_disk(self, disk_id: str) -> None:
        self.steps.append(f"remove {disk_id}")

    def add_network(self, device: NetworkDevice) -> str:
        self.steps.append(f"add {device.id}")
        return f"path of {device.id}"

    async def start(self) -> None:
        self._step("start machine")

    async def stop(self) -> None:
        self.exit("killed")
        self._step("stop machine")

    async def exited(self) -> VmExit:
        return await asyncio.shield(self.end)

    def exit(self, reason: str, detail: str = "") -> None:
        if not self.end.done():
            self.end.set_result(VmExit(reason=reason, detail=detail))

    def console_tail(self) -> str:
        return "Kernel panic - not syncing"

    async def cleanup(self) -> None:
        self._step("clean up machine")

    def _step(self, name: str) -> None:
        self.steps.append(name)
        if name in self.failures:
            raise self.failures[name]


class Share:
    """A shared folder that writes down what it is asked."""

    folder = SharedFolder(host_path=Path("/shared"))
    device = VhostUserFs(tag="tag", socket_path=Path("/socket"))
    processes = (DAEMON,)

    def __init__(self, steps: list[str]) -> None:
        self.steps = steps
        self.failure: KataError | None = None
        self.death: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        self.steps.append("start share")
        if self.failure is not None:
            raise self.failure

    async def died(self) -> str:
        return await asyncio.shield(self.death)

    async def stop(self) -> None:
        self.steps.append("stop share")


class Cards:
    """A pod's network that writes down what it is asked; without links it has nothing to say."""

    def __init__(self, steps: list[str]) -> None:
        self.steps = steps
        self.devices: tuple[NetworkDevice, ...] = ()
        self.hooks: LinkHooks | None = None
        self.failure: KataError | None = None
        self.loopback_failure: KataError | None = None

    async def open(self) -> tuple[NetworkDevice, ...]:
        if self.devices:
            self.steps.append("open network")
        return self.devices

    async def wire(self) -> None:
        if self.devices:
            self.steps.append("wire network")

    async def described(self, *, device_paths: tuple[str, ...]) -> GuestNetwork:
        if self.failure is not None:
            raise self.failure
        interfaces = zip(self.devices, device_paths, strict=True)
        return GuestNetwork(
            interfaces=tuple(
                GuestInterface(
                    name=card.id, mac=card.mac, mtu=card.mtu, addresses=(), device_path=path
                )
                for card, path in interfaces
            )
        )

    async def catch_loopback(self) -> Loopback | None:
        self.steps.append("catch loopback")
        if self.loopback_failure is not None:
            raise self.loopback_failure
        return Loopback(socket.socket(), os.open(os.devnull, os.O_RDONLY))

    async def stop(self) -> None:
        self.steps.append("stop network")


class AskedAgent(FakeAgent):
    """Remembers how the sandbox was described."""

    def __init__(self, steps: list[str], features: frozenset[str]) -> None:
        super().__init__(features=features)
        self.steps = steps
        self.forwards = asyncio.Event()
        self.storages: tuple[GuestStorage, ...] = ()

    async def create_sandbox(
        self,
        sandbox_id: SandboxId,
        *,
        hostname: str,
        dns: tuple[str, ...],
        storages: tuple[GuestStorage, ...],
    ) -> None:
        self.steps.append(f"sandbox {sandbox_id} {hostname} {dns}")
        self.storages = storages
        await super().create_sandbox(sandbox_id, hostname=hostname, dns=dns, storages=storages)

    async def forward_ports(self, listener: socket.socket, *, address: str, port: int) -> None:
        self.steps.append("forward ports")
        self.forwards.set()
        await super().forward_ports(listener, address=address, port=port)

    async def close(self) -> None:
        self.steps.append("close agent")
        await super().close()


class Group(SandboxCgroup):
    """Remembers when it was entered and left."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__("")
        self.steps = steps

    async def enter(self, record: object) -> None:
        del record
        self.steps.append("enter cgroup")

    async def leave(self, record: object) -> None:
        del record
        self.steps.append("leave cgroup")


class World:
    """A guest made of recorded parts."""

    def __init__(self, *, features: frozenset[str] = frozenset()) -> None:
        self.steps: list[str] = []
        self.machine = Machine(self.steps)
        self.share = Share(self.steps)
        self.cards = Cards(self.steps)
        self.agent = AskedAgent(self.steps, features)
        self.reported: list[Iterable[ProcessIdentity]] = []
        self.hooks: list[LinkHooks] = []
        resources = contextlib.ExitStack()
        resources.callback(self.steps.append, "close resources")
        self.guest = VirtGuest(
            SandboxId("s"),
            hypervisor=self.machine,
            cgroup=Group(self.steps),
            share_fs=self.share,
            network=self.cards,
            agent=self.agent,
            config=AgentConfig(),
            is_seccomp_disabled=False,
            resources=resources,
        )

    async def start(self) -> None:
        async with asyncio.timeout(10):
            await self.guest.start(hostname="box", dns=("nameserver 1",), record=self._record)

    def _record(
        self,
        *,
        processes: tuple[ProcessIdentity, ...] | None = None,
        cgroups: tuple[str, ...] | None = None,
        links: LinkHooks | None = None,
    ) -> None:
        assert cgroups is None
        if processes is not None:
            self.reported.append(processes)
        if links is not None:
            self.steps.append("record links")
            self.hooks.append(links)

    async def lost(self) -> str:
        async with asyncio.timeout(10):
            return await self.guest.lost()


STOPPED = [
    "close agent",
    "stop machine",
    "clean up machine",
    "stop share",
    "stop network",
    "leave cgroup",
    "close resources",
]


@on_loop
async def test_the_parts_come_up_in_order() -> None:
    world = World()
    await world.start()
    assert world.steps == [
        "enter cgroup",
        "start share",
        "add tag",
        "start machine",
        "sandbox s box ('nameserver 1',)",
    ]
    await world.guest.stop()


CARD = NetworkDevice(id="eth0", tap_fds=(7,), mac="02:00:00:00:00:01", mtu=1450)
HOOKS = LinkHooks(namespace="/run/netns/x", identity="1:2", links=("eth0",))


@on_loop
async def test_the_network_is_noted_before_it_is_wired_and_set_up_before_the_sandbox() -> None:
    world = World()
    world.cards.devices, world.cards.hooks = (CARD,), HOOKS
    await world.start()
    assert world.steps == [
        "enter cgroup",
        "open network",
        "add eth0",
        "record links",
        "wire network",
        "start share",
        "add tag",
        "start machine",
        "sandbox s box ('nameserver 1',)",
    ]
    assert world.hooks == [HOOKS]
    (network,) = world.agent.networks
    assert [card.device_path for card in network.interfaces] == ["path of eth0"]
    await world.guest.stop()
    # Another sandbox may have hooks there by the time that this one's record is read.
    assert world.hooks[1:] == [replace(HOOKS, links=())]


@on_loop
async def test_a_network_that_is_not_joined_fails_the_start_and_leaves_nothing() -> None:
    world = World()
    world.cards.devices = (CARD,)
    world.cards.failure = FailedPreconditionError("no such link")
    with pytest.raises(FailedPreconditionError, match="no such link"):
        await world.start()
    assert world.steps[-len(STOPPED) :] == STOPPED


@on_loop
async def test_its_processes_and_pid_are_told() -> None:
    world = World()
    assert world.guest.task_pid == 0
    await world.start()
    assert world.reported == [(QEMU, DAEMON)]
    assert world.guest.task_pid == 10
    await world.guest.stop()


@on_loop
async def test_the_guest_mounts_the_shared_folder_and_its_own_memory() -> None:
    world = World()
    await world.start()
    shared, shm = world.agent.storages
    assert (shared.driver, shared.source, shared.fstype) == ("virtio-fs", "tag", "virtiofs")
    assert shared.mount_point == "/run/kata-containers/shared/containers/"
    assert (shm.fstype, shm.mount_point) == ("tmpfs", "/run/kata-containers/sandbox/shm")
    await world.guest.stop()


@on_loop
async def test_details_are_known_once_it_is_up() -> None:
    world = World()
    with pytest.raises(VmExitedError, match="not up"):
        _ = world.guest.details
    await world.start()
    assert world.guest.details.agent_version == "fake"
    await world.guest.stop()


@on_loop
async def test_stopping_releases_everything_once() -> None:
    world = World()
    await world.start()
    world.steps.clear()
    await world.guest.stop()
    await world.guest.stop()
    assert world.steps == STOPPED
    assert await world.lost() in {"stopped", "killed"}


@on_loop
async def test_a_guest_never_started_can_be_stopped() -> None:
    world = World()
    await world.guest.stop()
    assert world.steps == [step for step in STOPPED if step != "leave cgroup"]


@pytest.mark.parametrize("failure", [VmmError("stop", "will not"), ValueError("a bug")])
@on_loop
async def test_a_step_that_fails_does_not_keep_the_others_from_being_done(
    failure: Exception,
) -> None:
    world = World()
    await world.start()
    world.machine.failures["stop machine"] = failure
    world.steps.clear()
    await world.guest.stop()
    assert world.steps == STOPPED
    assert await world.lost() == "stopped"


@on_loop
async def test_ports_are_forwarded_where_the_agent_can_and_given_back() -> None:
    before = count_descriptors(os.getpid())
    world = World(features=frozenset({"port-forward"}))
    await world.start()
    async with asyncio.timeout(10):
        await world.agent.forwards.wait()
    await world.guest.stop()
    assert count_descriptors(os.getpid()) == before
    other = World()
    await other.start()
    await asyncio.sleep(0)
    await other.guest.stop()
    assert "catch loopback" not in other.steps


@on_loop
async def test_a_loopback_that_cannot_be_caught_is_no_reason_to_fail(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World(features=frozenset({"port-forward"}))
    world.cards.loopback_failure = FailedPreconditionError("an old kernel")
    await world.start()
    await asyncio.sleep(0)
    assert "ports of the guest are not forwarded" in caplog.text
    await world.guest.stop()
    assert "forward ports" not in world.steps


def share_fails(world: World) -> None:
    world.share.failure = VmmError("serve", "no daemon")


def machine_fails(world: World) -> None:
    world.machine.failures["start machine"] = VmmError("boot", "no kernel")


def agent_fails(world: World) -> None:
    world.agent.failures["connect"] = GuestBootTimeoutError("silent")


def sandbox_fails(world: World) -> None:
    world.agent.failures["create_sandbox"] = InternalError("no sandbox")


@pytest.mark.parametrize(
    ("prepare", "error"),
    [
        (share_fails, "no daemon"),
        (machine_fails, "no kernel"),
        (agent_fails, "silent"),
        (sandbox_fails, "no sandbox"),
    ],
)
@on_loop
async def test_a_start_that_fails_leaves_nothing(
    prepare: Callable[[World], None], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_module, "_LAST_WORDS_S", 0.01)
    world = World()
    prepare(world)
    with pytest.raises(KataError, match=error):
        await world.start()
    assert world.steps[-len(STOPPED) :] == STOPPED


@on_loop
async def test_a_machine_that_dies_at_boot_shows_its_console() -> None:
    world = World()
    reached = hold(world.agent, "connect")
    async with asyncio.TaskGroup() as group:
        starting = group.create_task(failure(world.start()))
        await reached.wait()
        world.machine.exit("guest-panic", "attempted to kill init")
        error = await starting
    assert isinstance(error, VmExitedError)
    assert "guest-panic: attempted to kill init" in str(error)
    assert "Kernel panic - not syncing" in str(error)
    assert world.steps[-len(STOPPED) :] == STOPPED


@on_loop
async def test_a_shared_folder_that_died_is_the_cause_of_a_machine_that_fails() -> None:
    world = World()
    machine_fails(world)
    world.share.death.set_result("virtiofsd: exit 1")
    with pytest.raises(VmmError, match="virtiofsd: exit 1"):
        await world.start()


@on_loop
async def test_a_start_given_up_leaves_nothing() -> None:
    world = World()
    reached = hold(world.agent, "connect")
    async with asyncio.TaskGroup() as group:
        starting = group.create_task(world.start())
        await reached.wait()
        starting.cancel()
    assert world.steps[-len(STOPPED) :] == STOPPED


@on_loop
async def test_a_stop_during_the_start_ends_it_before_anything_is_given_back() -> None:
    world = World()
    reached = hold(world.agent, "connect")

    async def start() -> None:
        with pytest.raises(VmExitedError, match="stopped before it was up"):
            await world.start()

    async with asyncio.TaskGroup() as group:
        group.create_task(start())
        await reached.wait()
        await world.guest.stop()
    assert world.steps[-len(STOPPED) :] == STOPPED


@on_loop
async def test_a_guest_that_was_stopped_does_not_start() -> None:
    world = World()
    await world.guest.stop()
    with pytest.raises(VmExitedError, match="stopped before it was up"):
        await world.start()
    assert "start machine" not in world.steps


@on_loop
async def test_a_machine_that_ends_is_a_loss_with_its_reason() -> None:
    world = World()
    await world.start()
    world.machine.exit("guest-panic", "oops")
    assert await world.lost() == "guest-panic: oops"
    await world.guest.stop()


@on_loop
async def test_a_shared_folder_that_dies_is_a_loss_with_its_reason() -> None:
    world = World()
    await world.start()
    world.share.death.set_result("virtiofsd: signal 9")
    assert await world.lost() == "virtiofsd: signal 9"
    await world.guest.stop()


@on_loop
async def test_a_connection_that_ends_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_module, "_LAST_WORDS_S", 0.01)
    world = World()
    await world.start()
    world.agent.disconnect()
    assert await world.lost() == "connection to the guest agent closed"
    await world.guest.stop()


@on_loop
async def test_the_machines_reason_counts_more_than_the_connections() -> None:
    world = World()
    await world.start()
    world.agent.disconnect()
    world.machine.exit("guest-reset")
    assert await world.lost() == "guest-reset"
    await world.guest.stop()


@on_loop
async def test_an_agent_that_fails_its_health_check_is_a_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guest_module, "HEALTH_INTERVAL_S", 0.0)
    world = World()
    world.agent.failures["check"] = UnavailableError("hangs")
    await world.start()
    assert await world.lost() == "guest agent failed its health check: hangs"
    await world.guest.stop()


def hold(agent: FakeAgent, method: str) -> asyncio.Event:
    """Hold a method's requests for ever; return what tells that one is reached."""
    reached = asyncio.Event()

    async def gate(name: str) -> None:
        if name == method:
            reached.set()
            await asyncio.Event().wait()

    agent.gate = gate
    return reached


async def failure(work: object) -> KataError | None:
    """Return what an awaitable raises."""
    try:
        await work  # type: ignore[misc]
    except KataError as exc:
        return exc
    return None
