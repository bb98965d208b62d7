"""What the interleavings of ``tests/property`` do not single out."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from harness.loop import on_loop, until
from harness.mounts import in_own_mounts, make_tmpfs
from kata_hybrid.agent.streams import HostStreams
from kata_hybrid.errors import (
    AgentTimeoutError,
    FailedPreconditionError,
    GuestBootTimeoutError,
    InternalError,
    InvalidSpecError,
    NotFoundError,
    ProcessNotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from kata_hybrid.persist.store import FILE_NAME, SandboxStore
from kata_hybrid.runtimes.base import CreateRequest, TaskEvent, TaskExited, TaskOom
from kata_hybrid.runtimes.oci.spec import Spec
from kata_hybrid.runtimes.virt.guest import Record
from kata_hybrid.runtimes.virt.sandbox import VirtSandbox
from kata_hybrid.testing.fake_agent import FakeAgent, FakeCopies
from kata_hybrid.testing.fake_guest import FakeGuest, FakeHooks, FakeStreams, prepare_nothing
from kata_hybrid.types import (
    ContainerId,
    ExecId,
    ExitInfo,
    SandboxId,
    Stdio,
    TaskStatus,
)

C1, C2 = ContainerId("c1"), ContainerId("c2")
E1 = ExecId("e1")
PROCESS: dict[str, object] = {"args": ["/bin/true"], "cwd": "/"}
SPEC: dict[str, object] = {"ociVersion": "1.0.2", "root": {"path": "r"}, "process": PROCESS}


class AskedGuest(FakeGuest):
    """Remembers how it was started and whether it was stopped."""

    def __init__(self, agent: FakeAgent, *, folder: Path) -> None:
        super().__init__(agent, folder=folder)
        self.hostname = ""
        self.dns: tuple[str, ...] = ()
        self.starts = 0
        self.stops = 0

    async def start(
        self,
        *,
        hostname: str,
        dns: tuple[str, ...],
        record: Record,
    ) -> None:
        self.hostname, self.dns = hostname, dns
        self.starts += 1
        await super().start(hostname=hostname, dns=dns, record=record)

    async def stop(self) -> None:
        self.stops += 1
        await super().stop()


class AskedAgent(FakeAgent):
    """Remembers sizes, signals and copies."""

    def __init__(self, *, features: frozenset[str] = frozenset()) -> None:
        super().__init__(features=features)
        self.sizes: list[tuple[ExecId | None, int, int]] = []
        self.signals: list[tuple[ExecId | None, int]] = []
        self.copies: list[FakeCopies] = []

    async def resize_terminal(
        self, container_id: ContainerId, exec_id: ExecId | None, *, rows: int, columns: int
    ) -> None:
        self.sizes.append((exec_id, rows, columns))
        await super().resize_terminal(container_id, exec_id, rows=rows, columns=columns)

    async def signal_process(
        self, container_id: ContainerId, exec_id: ExecId | None, signal: int
    ) -> None:
        self.signals.append((exec_id, signal))
        await super().signal_process(container_id, exec_id, signal)

    def copy_streams(
        self, container_id: ContainerId, exec_id: ExecId | None, *, streams: HostStreams
    ) -> FakeCopies:
        copies = super().copy_streams(container_id, exec_id, streams=streams)
        self.copies.append(copies)
        return copies


class FailingStreams(FakeStreams):
    """Opens nothing, once told."""

    def __init__(self) -> None:
        self.failure: Exception | None = None

    async def open(self, stdio: Stdio, *, container_id: ContainerId) -> HostStreams:
        if self.failure is not None:
            raise self.failure
        return await super().open(stdio, container_id=container_id)


class Log:
    """Collects events."""

    def __init__(self) -> None:
        self.events: list[TaskEvent] = []

    def emit(self, event: TaskEvent) -> None:
        self.events.append(event)

    @property
    def names(self) -> list[str]:
        return [type(event).__name__ for event in self.events]


class World:
    """A sandbox over a fake guest."""

    def __init__(self, folder: Path, *, features: frozenset[str] = frozenset()) -> None:
        self.folder = folder
        self.agent = AskedAgent(features=features)
        self.guest = AskedGuest(self.agent, folder=folder)
        self.streams = FailingStreams()
        self.log = Log()
        self.hooks = FakeHooks()
        self.bundle = folder / "bundle"
        self.bundle.mkdir()
        self.write_spec(SPEC)
        self.sandbox = VirtSandbox(
            guest_factory=self._make_guest,
            streams=self.streams,
            store=SandboxStore(folder, sandbox_id=SandboxId("s"), namespace="test"),
            events=self.log,
            hooks=self.hooks,
            preparer=prepare_nothing,
        )

    async def _make_guest(self, _request: CreateRequest, _spec: Spec) -> AskedGuest:
        return self.guest

    def write_spec(self, spec: dict[str, object]) -> None:
        (self.bundle / "config.json").write_text(json.dumps(spec))

    async def create(self, container_id: ContainerId = C1, *, stdio: Stdio | None = None) -> int:
        request = CreateRequest(
            container_id=container_id,
            bundle=self.bundle,
            rootfs=(),
            stdio=stdio or Stdio(),
            config_path=None,
        )
        return await self.sandbox.create(request)

    async def run(self, container_id: ContainerId = C1, *, stdio: Stdio | None = None) -> None:
        await self.create(container_id, stdio=stdio)
        await self.sandbox.start(container_id, None)

    async def run_exec(self, *, stdio: Stdio | None = None) -> None:
        await self.sandbox.exec(C1, E1, process=PROCESS, stdio=stdio or Stdio())
        await self.sandbox.start(C1, E1)

    async def ended(
        self, container_id: ContainerId = C1, exec_id: ExecId | None = None
    ) -> ExitInfo:
        async with asyncio.timeout(10):
            return await self.sandbox.wait(container_id, exec_id)

    def status(self, exec_id: ExecId | None = None) -> TaskStatus:
        return self.sandbox.state(C1, exec_id).status

    def record(self) -> Any:
        return json.loads((self.folder / FILE_NAME).read_bytes())


# --- hooks ---------------------------------------------------------------------------------------

HOOKED = {
    **SPEC,
    "annotations": {"a": "b"},
    "hooks": {"createRuntime": [{"path": "/bin/a"}], "poststop": [{"path": "/bin/b"}]},
}


@on_loop
async def test_hooks_are_run_with_the_containers_state(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.write_spec(HOOKED)
    await world.run()
    pid = world.guest.task_pid
    await world.sandbox.kill(C1, None, signal=9, is_all=False)
    await world.ended()
    await world.sandbox.delete(C1, None)
    basics = {
        "ociVersion": SPEC["ociVersion"],
        "id": "c1",
        "bundle": str(world.bundle),
        "annotations": {"a": "b"},
    }
    assert world.hooks.ran == [
        # Of the machine there is nothing yet.
        ("create", {**basics, "status": "creating", "pid": os.getpid()}),
        ("start", {**basics, "status": "running", "pid": pid}),
        ("delete", {**basics, "status": "stopped", "pid": 0}),
    ]


@on_loop
async def test_a_sandbox_that_is_closed_runs_the_last_hooks_too(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.write_spec(HOOKED)
    await world.run()
    await world.sandbox.close()
    assert [point for point, _ in world.hooks.ran] == ["create", "start", "delete"]


@on_loop
async def test_a_hook_that_fails_undoes_the_creation(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.write_spec(HOOKED)
    world.hooks.failure = FailedPreconditionError("hook failed")
    with pytest.raises(FailedPreconditionError, match="hook failed"):
        await world.create()
    assert [point for point, _ in world.hooks.ran] == ["create", "delete"]
    assert world.guest.stops > 0
    assert world.sandbox.is_over


@on_loop
async def test_a_guest_lost_during_a_hook_is_not_booted_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.create()
    world.write_spec(HOOKED)
    gate = world.hooks.gates["create"] = asyncio.Event()

    async def create() -> None:
        with pytest.raises(UnavailableError, match="sandbox is lost"):
            await world.create(C2)

    async with asyncio.TaskGroup() as group:
        group.create_task(create())
        await until(lambda: bool(world.hooks.ran))
        world.guest.lose("crash")
        await until(lambda: world.guest.stops > 0)
        gate.set()
    assert world.guest.starts == 1
    assert [point for point, _ in world.hooks.ran] == ["create", "delete"]
    await world.sandbox.close()


@on_loop
async def test_a_delete_given_up_during_a_hook_is_finished_by_the_next(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.write_spec(HOOKED)
    await world.create()
    gate = world.hooks.gates["delete"] = asyncio.Event()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await world.sandbox.delete(C1, None)
    assert not world.sandbox.is_empty
    gate.set()
    await world.sandbox.delete(C1, None)
    assert [point for point, _ in world.hooks.ran] == ["create", "delete"]
    assert world.log.names[-1] == "TaskDeleted"
    assert world.sandbox.is_over


@on_loop
async def test_a_sandbox_closed_during_its_last_delete_does_not_wait_in_a_circle(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    world.write_spec(HOOKED)
    await world.create()
    gate = world.hooks.gates["delete"] = asyncio.Event()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(world.sandbox.delete(C1, None))
        await until(lambda: len(world.hooks.ran) == 2)
        group.create_task(world.sandbox.close())
        await asyncio.sleep(0)
        gate.set()
    assert [point for point, _ in world.hooks.ran] == ["create", "delete"]
    assert world.sandbox.is_empty


# --- links that come between create and start ----------------------------------------------------


@on_loop
async def test_a_guest_that_awaits_links_boots_at_the_start(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.guest.awaits_links = True
    await world.create()
    assert world.log.names == ["TaskCreated"]
    assert not world.agent.processes
    assert world.status() is TaskStatus.CREATED
    with pytest.raises(UnavailableError, match="waiting for its start"):
        await world.sandbox.stats(C1)
    with pytest.raises(FailedPreconditionError, match="waiting for its start"):
        await world.create(C2)
    await world.sandbox.start(C1, None)
    assert world.status() is TaskStatus.RUNNING
    await world.create(C2)
    await world.sandbox.close()


@on_loop
async def test_one_that_is_killed_before_its_start_never_boots(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.guest.awaits_links = True
    await world.create()
    with pytest.raises(UnavailableError, match="waiting for its start"):
        await world.sandbox.kill(C1, None, signal=1, is_all=False)
    await world.sandbox.kill(C1, None, signal=9, is_all=False)
    assert (await world.ended()).status == 137
    await world.sandbox.delete(C1, None)
    assert world.log.names == ["TaskCreated", "TaskExited", "TaskDeleted"]
    assert world.guest.stops == 1
    assert world.sandbox.is_over


@on_loop
async def test_one_that_does_not_boot_fails_its_start_and_can_be_deleted(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.guest.awaits_links = True
    await world.create()
    world.agent.failures["create_sandbox"] = GuestBootTimeoutError("silence")
    with pytest.raises(GuestBootTimeoutError):
        await world.sandbox.start(C1, None)
    assert (await world.ended()).status == 255
    await world.sandbox.delete(C1, None)
    assert world.guest.stops > 0
    assert world.sandbox.is_over


@on_loop
async def test_after_a_boot_that_failed_nothing_is_waited_for(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.guest.awaits_links = True
    await world.create()
    world.agent.failures["create_sandbox"] = GuestBootTimeoutError("silence")
    with pytest.raises(GuestBootTimeoutError):
        await world.sandbox.start(C1, None)
    with pytest.raises(FailedPreconditionError, match="sandbox is lost"):
        await world.create(C2)
    await world.sandbox.close()


@on_loop
async def test_one_that_is_killed_while_it_boots_ends(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.guest.awaits_links = True
    await world.create()
    boots, stopped = asyncio.Event(), asyncio.Event()

    async def slow(_method: str) -> None:
        boots.set()
        await stopped.wait()
        raise UnavailableError("stopped")

    world.agent.gate = slow

    async def stop() -> None:
        stopped.set()

    world.guest.stop = stop  # type: ignore[method-assign]

    async def start() -> None:
        with pytest.raises(UnavailableError):
            await world.sandbox.start(C1, None)

    async with asyncio.TaskGroup() as group:
        group.create_task(start())
        await boots.wait()
        with pytest.raises(UnavailableError, match="booting"):
            await world.sandbox.kill(C1, None, signal=1, is_all=False)
        await world.sandbox.kill(C1, None, signal=9, is_all=False)
    assert (await world.ended()).status == 255
    await world.sandbox.delete(C1, None)


@on_loop
async def test_one_that_is_closed_while_it_boots_stays_closed(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.guest.awaits_links = True
    await world.create()
    boots, go_on = asyncio.Event(), asyncio.Event()

    async def slow(_method: str) -> None:
        boots.set()
        await go_on.wait()

    world.agent.gate = slow

    async def stop() -> None:
        go_on.set()

    world.guest.stop = stop  # type: ignore[method-assign]

    async def start() -> None:
        with pytest.raises(UnavailableError, match="closed while its guest booted"):
            await world.sandbox.start(C1, None)

    async with asyncio.TaskGroup() as group:
        group.create_task(start())
        await boots.wait()
        group.create_task(world.sandbox.close())
    assert world.sandbox.is_over


@on_loop
async def test_one_that_is_closed_before_its_start_is_given_back(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.guest.awaits_links = True
    await world.create()
    await world.sandbox.close()
    assert (await world.ended()).status == 255
    assert world.guest.stops == 1


# --- create -------------------------------------------------------------------------------------


@in_own_mounts
@on_loop
async def test_the_guest_is_told_host_name_and_name_servers(tmp_path: Path) -> None:
    world = World(tmp_path)
    (tmp_path / "resolv.conf").write_text("nameserver 10.0.0.1\n\nsearch example.org\n")
    mount = {"destination": "/etc/resolv.conf", "type": "bind", "source": f"{tmp_path}/resolv.conf"}
    world.write_spec({**SPEC, "hostname": "box", "mounts": [mount]})
    await world.create()
    assert world.guest.hostname == "box"
    assert world.guest.dns == ("nameserver 10.0.0.1", "search example.org")
    await world.sandbox.close()


@on_loop
async def test_a_bad_spec_makes_no_guest(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.write_spec({**SPEC, "linux": {"sysctl": []}})
    with pytest.raises(InvalidSpecError, match=r"linux\.sysctl must be an object"):
        await world.create()
    assert world.guest.stops == 0
    assert world.sandbox.is_empty


@on_loop
async def test_a_boot_that_fails_is_told_and_stops_the_guest(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.agent.failures["create_sandbox"] = GuestBootTimeoutError("silent")
    with pytest.raises(GuestBootTimeoutError, match="silent"):
        await world.create()
    assert world.guest.stops > 0
    assert world.sandbox.is_empty
    assert world.log.events == []
    assert world.record()["containers"] == []


@on_loop
async def test_a_first_container_that_fails_takes_the_guest_along(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.agent.failures["create_container"] = InternalError("no such program")
    with pytest.raises(InternalError, match="no such program"):
        await world.create()
    assert world.guest.stops > 0
    assert world.log.events == []


@on_loop
async def test_a_create_that_nobody_waits_for_any_more_is_undone(tmp_path: Path) -> None:
    world = World(tmp_path)
    reached = asyncio.Event()

    async def hold(method: str) -> None:
        if method == "create_container":
            reached.set()
            await asyncio.get_running_loop().create_future()

    world.agent.gate = hold
    task = asyncio.get_running_loop().create_task(world.create())
    async with asyncio.timeout(10):
        await reached.wait()
        task.cancel()
        await asyncio.wait({task})
    assert task.cancelled()
    assert world.guest.stops > 0
    assert world.sandbox.is_empty
    assert world.sandbox.is_over
    assert world.log.events == []


@on_loop
async def test_a_second_container_that_fails_leaves_the_first_alone(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.run()
    world.agent.failures["create_container"] = InternalError("no such program")
    with pytest.raises(InternalError):
        await world.create(C2)
    assert world.status() is TaskStatus.RUNNING
    assert world.guest.stops == 0
    assert world.record()["containers"] == ["c1"]
    await world.create(C2)
    await world.sandbox.close()


@on_loop
async def test_streams_that_cannot_be_opened_undo_the_create(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.streams.failure = NotFoundError("open output /x: No such file")
    with pytest.raises(NotFoundError, match="open output /x"):
        await world.create()
    assert world.sandbox.is_empty
    assert world.agent.processes == {}


@on_loop
async def test_containers_are_recorded_as_they_come_and_go(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.create(C1)
    await world.create(C2)
    assert world.record()["containers"] == ["c1", "c2"]
    await world.sandbox.delete(C1, None)
    assert world.record()["containers"] == ["c2"]
    await world.sandbox.delete(C2, None)
    assert world.record()["containers"] == []


@in_own_mounts
@on_loop
async def test_a_full_disk_is_told_and_undoes_the_create(tmp_path: Path) -> None:
    world = World(make_tmpfs(tmp_path / "small", size="24k"))
    await world.create(C1)
    filler = world.folder / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(1 << 20))
    with pytest.raises(ResourceExhaustedError, match=r"state\.json: No space left"):
        await world.create(C2)
    assert (C2, None) not in world.agent.processes
    assert world.record()["containers"] == ["c1"]
    await world.sandbox.delete(C1, None)


@on_loop
async def test_a_close_given_up_is_waited_for_by_the_next(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.create()
    reached, go_on = asyncio.Event(), asyncio.Event()
    stop = world.guest.stop

    async def slow() -> None:
        reached.set()
        await go_on.wait()
        await stop()

    world.guest.stop = slow  # type: ignore[method-assign]
    async with asyncio.TaskGroup() as group:
        first = group.create_task(world.sandbox.close())
        await reached.wait()
        first.cancel()
        second = group.create_task(world.sandbox.close())
        await asyncio.wait([first])
        assert not second.done()
        go_on.set()
    assert world.record()["containers"] == []


@on_loop
async def test_a_closed_sandbox_takes_no_container(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.create()
    await world.sandbox.delete(C1, None)
    with pytest.raises(FailedPreconditionError, match="sandbox is closed"):
        await world.create()


# --- start and exec -----------------------------------------------------------------------------


@on_loop
async def test_a_start_that_fails_ends_the_container(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.create()
    world.agent.failures["start_container"] = InternalError("exec format error")
    with pytest.raises(InternalError, match="exec format error"):
        await world.sandbox.start(C1, None)
    assert world.status() is TaskStatus.STOPPED
    await world.sandbox.delete(C1, None)


@on_loop
async def test_an_exec_of_a_container_that_has_ended_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.run()
    await world.sandbox.exec(C1, E1, process=PROCESS, stdio=Stdio())
    world.agent.exit(C1, None, 0)
    await world.ended()
    with pytest.raises(FailedPreconditionError, match="init process is not running"):
        await world.sandbox.start(C1, E1)
    with pytest.raises(FailedPreconditionError, match="cannot exec"):
        await world.sandbox.exec(C1, ExecId("e2"), process=PROCESS, stdio=Stdio())
    await world.sandbox.close()


@on_loop
async def test_a_window_asked_for_early_is_set_at_the_start(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.create(stdio=Stdio(terminal=True))
    await world.sandbox.resize(C1, None, rows=30, columns=100)
    assert world.agent.sizes == []
    await world.sandbox.start(C1, None)
    await world.sandbox.resize(C1, None, rows=40, columns=120)
    assert world.agent.sizes == [(None, 30, 100), (None, 40, 120)]
    await world.sandbox.close()


@on_loop
async def test_without_a_terminal_there_is_no_window(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.run()
    await world.sandbox.resize(C1, None, rows=30, columns=100)
    assert world.agent.sizes == []
    await world.sandbox.close()


@on_loop
async def test_stdin_closed_early_is_closed_at_the_start(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.create()
    await world.sandbox.close_stdin(C1, None)
    await world.sandbox.start(C1, None)
    assert world.agent.copies[0].is_stdin_closed
    await world.sandbox.close()


# --- kill and exits -----------------------------------------------------------------------------


@on_loop
async def test_a_container_never_started_can_be_killed(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.create()
    await world.sandbox.kill(C1, None, signal=9, is_all=False)
    assert (await world.ended()).status == 137
    await world.sandbox.delete(C1, None)


@on_loop
async def test_an_exec_never_started_cannot_be_killed(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.run()
    await world.sandbox.exec(C1, E1, process=PROCESS, stdio=Stdio())
    with pytest.raises(FailedPreconditionError, match="process not created"):
        await world.sandbox.kill(C1, E1, signal=9, is_all=False)
    await world.sandbox.close()


@on_loop
async def test_kill_of_all_names_no_exec(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.run()
    await world.run_exec()
    await world.sandbox.kill(C1, E1, signal=15, is_all=True)
    assert world.agent.signals == [(None, 15)]
    await world.sandbox.close()


@on_loop
async def test_a_guest_that_does_not_answer_a_kill_is_ended_from_outside(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.run()
    world.agent.failures["signal_process"] = AgentTimeoutError("hangs")
    await world.sandbox.kill(C1, None, signal=9, is_all=False)
    assert world.guest.stops > 0
    assert (await world.ended()).status == 255
    await world.sandbox.delete(C1, None)


@on_loop
async def test_another_signal_does_not_end_a_guest_that_hangs(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.run()
    world.agent.failures["signal_process"] = AgentTimeoutError("hangs")
    with pytest.raises(AgentTimeoutError):
        await world.sandbox.kill(C1, None, signal=10, is_all=False)
    assert world.guest.stops == 0
    await world.sandbox.close()


@on_loop
async def test_execs_end_before_their_container(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.run()
    await world.run_exec()
    world.agent.exit(C1, None, 3)
    await world.ended()
    exits = [event.exec_id for event in world.log.events if isinstance(event, TaskExited)]
    assert exits == [E1, None]
    await world.sandbox.close()


@on_loop
async def test_output_is_read_before_an_exit_is_collected(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.run()
    process = world.agent.processes[C1, None]
    process.exit.set_result(0)
    asked = record(world.agent)
    await world.sandbox.stats(C1)
    assert asked == ["stats_container"]
    process.end_of_output.set()
    await world.ended()
    assert asked == ["stats_container", "wait_process"]
    await world.sandbox.close()


@on_loop
async def test_an_agent_that_keeps_output_is_asked_for_the_exit_at_once(tmp_path: Path) -> None:
    world = World(tmp_path, features=frozenset({"wait-keeps-output"}))
    await world.run()
    world.agent.processes[C1, None].exit.set_result(4)
    assert (await world.ended()).status == 4
    await world.sandbox.close()


@on_loop
async def test_a_lost_guest_ends_every_process(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.run()
    await world.run_exec()
    await world.run(C2)
    world.guest.lose("guest-panic")
    ends = [await world.ended(), await world.ended(C1, E1), await world.ended(C2)]
    assert [end.status for end in ends] == [255] * 3
    assert world.log.names.count("TaskExited") == 3
    with pytest.raises(FailedPreconditionError, match="sandbox is lost"):
        await world.create(ContainerId("c3"))
    with pytest.raises((UnavailableError, FailedPreconditionError)):
        await world.sandbox.pause(C2)
    for container in (C1, C2):
        assert (await world.sandbox.delete(container, None))[1].status == 255
    assert world.sandbox.is_empty


@on_loop
async def test_a_pause_that_fails_leaves_the_container_running(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.run()
    world.agent.failures["pause_container"] = InternalError("no freezer")
    with pytest.raises(InternalError, match="no freezer"):
        await world.sandbox.pause(C1)
    assert world.status() is TaskStatus.RUNNING
    await world.sandbox.close()


@on_loop
async def test_statistics_of_what_has_ended_are_not_found(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.run()
    world.agent.exit(C1, None, 0)
    await world.ended()
    with pytest.raises(ProcessNotFoundError, match="no statistics"):
        await world.sandbox.stats(C1)
    await world.sandbox.close()


@on_loop
async def test_an_oom_of_a_container_that_is_not_ours_is_not_reported(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.run()
    world.agent.out_of_memory(ContainerId("stranger"))
    world.agent.out_of_memory(C1)
    world.agent.exit(C1, None, 137)
    await world.ended()
    events = [event for event in world.log.events if isinstance(event, TaskOom)]
    assert events == [TaskOom(container_id=C1)]
    await world.sandbox.close()


# --- the end ------------------------------------------------------------------------------------


@on_loop
async def test_the_last_delete_ends_the_guest(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.create(C1)
    await world.create(C2)
    await world.sandbox.delete(C1, None)
    assert world.guest.stops == 0
    await world.sandbox.delete(C2, None)
    assert world.guest.stops > 0
    assert world.sandbox.is_empty


@on_loop
async def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.run()
    await world.sandbox.close()
    await world.sandbox.close()
    assert (await world.ended()).status == 255


@on_loop
async def test_a_delete_wakes_who_waits_for_an_exec_never_started(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.create()
    await world.sandbox.exec(C1, E1, process=PROCESS, stdio=Stdio())
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        waiting = group.create_task(world.sandbox.wait(C1, E1))
        await asyncio.sleep(0)
        await world.sandbox.delete(C1, None)
    assert waiting.result().status == 137


def record(agent: FakeAgent) -> list[str]:
    """Return a list that grows by the name of each request."""
    asked: list[str] = []

    async def gate(method: str) -> None:
        asked.append(method)

    agent.gate = gate
    return asked
