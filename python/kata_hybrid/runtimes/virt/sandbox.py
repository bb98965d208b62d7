"""The sandbox: one guest and its containers. Implements :class:`kata_hybrid.runtimes.base.Runtime`.

    EMPTY ── first create ──┬───────────▶ BOOTING ──▶ READY ──┬─ guest lost ──▶ LOST ──┐
      links are still to come                ▲  │             └─ last delete ──────────┼──▶ CLOSED
                            └──▶ WAITING ────┘  └── boot failed ───────────────────────┘
                                         start

This class alone changes the state of containers and processes, on the loop thread. A request that
changes a process holds that process's lock; State, Pids and Connect read memory and take none, so
they answer while the guest hangs. Exits are watched and reported by ``exits.py``.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from kata_hybrid.agent import convert
from kata_hybrid.agent.streams import StreamOpening
from kata_hybrid.aio.ending import Ending
from kata_hybrid.aio.supervisor import Supervisor
from kata_hybrid.errors import (
    AgentTimeoutError,
    ExecExistsError,
    FailedPreconditionError,
    KataError,
    ProcessNotFoundError,
    UnavailableError,
)
from kata_hybrid.persist.store import SandboxStore
from kata_hybrid.resource.pod_files import write_pod_files
from kata_hybrid.runtimes.base import (
    CreateRequest,
    EventSink,
    ExecAdded,
    ExecStarted,
    TaskCreated,
    TaskDeleted,
    TaskPaused,
    TaskResumed,
    TaskStarted,
)
from kata_hybrid.runtimes.oci import spec as oci_spec
from kata_hybrid.runtimes.oci.hooks import HostHooks
from kata_hybrid.runtimes.oci.rewrite import guest_resources
from kata_hybrid.runtimes.virt.container import Container, PodDefaults, Preparer, prepare
from kata_hybrid.runtimes.virt.containers import Containers
from kata_hybrid.runtimes.virt.exits import KILLED_STATUS, LOST_STATUS, Exits
from kata_hybrid.runtimes.virt.guest import Guest
from kata_hybrid.runtimes.virt.process import Process
from kata_hybrid.runtimes.virt.state import NOT_BOOTED, SandboxState
from kata_hybrid.types import (
    ContainerId,
    ContainerStats,
    ExecId,
    ExitInfo,
    JsonObject,
    ProcessState,
    Stdio,
    TaskStatus,
)

_log = logging.getLogger(__name__)

SIGKILL: Final = 9
_CLOSED_MEANWHILE: Final = "the sandbox was closed while its guest booted"
_ENDING_SIGNALS: Final = frozenset({SIGKILL, 15})
"""The agent turns SIGTERM for a process that cannot handle it into SIGKILL."""


GuestFactory = Callable[[CreateRequest, oci_spec.Spec], Awaitable[Guest]]


class VirtSandbox:
    """Containers in a virtual machine."""

    def __init__(
        self,
        *,
        guest_factory: GuestFactory,
        streams: StreamOpening,
        store: SandboxStore,
        events: EventSink,
        hooks: HostHooks,
        preparer: Preparer = prepare,
    ) -> None:
        """Begin EMPTY: the first create makes the guest from ``guest_factory``.

        ``preparer`` acquires a container's root file system on the host.
        """
        self._guest_factory = guest_factory
        self._streams = streams
        self._prepare = preparer
        self._store = store
        self._events = events
        self._hooks = hooks
        self._supervisor = Supervisor("sandbox")
        self._ending = Ending(self._close, name="sandbox end")
        self._exits = Exits(events, pid=self._task_pid)
        self._containers = Containers(exits=self._exits, hooks=hooks)
        self._state = SandboxState.EMPTY
        self._guest: Guest | None = None
        self._create_lock = asyncio.Lock()
        self.held_as: ContainerId | None = None
        """By whom it is wanted for its own sake, so that it outlives its last container."""
        self._pod = PodDefaults()

    # --- create -----------------------------------------------------------------------------

    async def create(self, request: CreateRequest) -> int:
        """Create a container, and the guest if this is the first."""
        with self._containers.reserve(request.container_id):
            spec = oci_spec.load(request.bundle)
            convert.spec_message(spec.raw)  # names a malformed field before a machine is started
            async with self._create_lock:
                await self._create(request, spec)
        return self._task_pid()

    async def _create(self, request: CreateRequest, spec: oci_spec.Spec) -> None:
        async with contextlib.AsyncExitStack() as undo:
            guest = self._guest
            if self._state is SandboxState.EMPTY:
                guest = await self._guest_factory(request, spec)
                undo.push_async_callback(self.close)
                undo.push_async_callback(guest.stop)
            elif guest is None or self._state is not SandboxState.READY:
                message = f"sandbox is {self._state.value}: no container can be created in it"
                raise FailedPreconditionError(message)
            container = await self._prepare(request, spec, guest=guest)
            undo.callback(self._containers.discard, container)
            undo.push_async_callback(self._containers.release, container, guest)
            if spec.hooks:
                # Before the machine: the first container's make the links that it is to have.
                creating = container.state("creating", pid=self._task_pid() or os.getpid())
                await self._hooks.create(spec.hooks, creating)
            container.process.streams = await self._streams.open(
                request.stdio, container_id=container.id
            )
            if self._state is SandboxState.EMPTY and guest.awaits_links:
                self._state, self._guest = SandboxState.WAITING, guest
            else:
                await self._bring_in(guest, container)
            self._store.update(containers=(*self._recorded, container.id))
            undo.pop_all()
        self._containers.add(container)
        self._events.emit(
            TaskCreated(
                container_id=container.id,
                bundle=str(request.bundle),
                rootfs=request.rootfs,
                stdio=request.stdio,
                pid=self._task_pid(),
            )
        )

    async def boot(
        self,
        request: CreateRequest,
        spec: oci_spec.Spec,
        *,
        resolver: tuple[str, ...],
        sysctls: Mapping[str, str],
    ) -> int:
        """Bring the guest up before there is a container; it stays until :meth:`close`."""
        async with self._create_lock, contextlib.AsyncExitStack() as undo:
            if self._state is not SandboxState.EMPTY:
                message = f"sandbox is {self._state.value}: it cannot be started"
                raise FailedPreconditionError(message)
            self.held_as = request.container_id
            undo.callback(setattr, self, "held_as", None)
            undo.push_async_callback(self.close)
            guest = await self._guest_factory(request, spec)
            undo.push_async_callback(guest.stop)
            if self._state is not SandboxState.EMPTY:
                raise UnavailableError(_CLOSED_MEANWHILE)
            files = write_pod_files(guest.folder, hostname=spec.hostname, resolver=resolver)
            self._pod = PodDefaults(files=files, sysctls=sysctls)
            await self._boot(guest, hostname=spec.hostname, resolver=resolver)
            undo.pop_all()
        return self._task_pid()

    async def lost(self) -> None:
        """Wait until the guest is gone."""
        if self._guest is not None:
            await self._guest.lost()

    async def _boot(self, guest: Guest, *, hostname: str, resolver: tuple[str, ...]) -> None:
        self._state = SandboxState.BOOTING
        self._guest = guest
        self._store.update(containers=self._recorded)
        try:
            await guest.start(
                hostname=hostname,
                dns=resolver,
                record=self._store.update,
            )
        except BaseException:
            if self._state is SandboxState.BOOTING:
                self._state = SandboxState.LOST
            raise
        if self._state is not SandboxState.BOOTING:
            raise UnavailableError(_CLOSED_MEANWHILE)
        self._state = SandboxState.READY
        self._supervisor.start(self._watch_guest(guest), name="guest watcher")
        self._exits.watch_oom(guest, self._containers)

    async def _bring_in(self, guest: Guest, container: Container) -> None:
        """Create a container in the guest, which is booted if it has not been."""
        if self._state in NOT_BOOTED:
            spec = container.spec
            await self._boot(guest, hostname=spec.hostname, resolver=spec.name_servers())
        self._ready_guest()
        await container.create(
            guest.agent, is_seccomp_disabled=guest.is_seccomp_disabled, pod=self._pod
        )
        if self._state is not SandboxState.READY:
            message = "the guest was lost while the container was created"
            raise UnavailableError(message)

    # --- start and exec ---------------------------------------------------------------------

    async def start(self, container_id: ContainerId, exec_id: ExecId | None) -> int:
        """Start a container or an exec."""
        container = self._containers.find(container_id)
        process = container.find(exec_id)
        async with process.lock:
            process.request("start")
            is_waiting = self._state is SandboxState.WAITING and exec_id is None
            guest = self._guest if is_waiting and self._guest else self._ready_guest()
            try:
                if is_waiting:
                    await self._bring_in(guest, container)
                if exec_id is None:
                    await self._start_container(guest, container, process)
                else:
                    await self._start_exec(guest, container, process, exec_id)
            except BaseException:
                process.end(LOST_STATUS)
                process.release()
                raise
            self._exits.watch(guest, container, process)
        if exec_id is None:
            running = container.state("running", pid=self._task_pid())
            await self._hooks.started(container.spec.hooks, running)
        return self._task_pid()

    async def _start_container(self, guest: Guest, container: Container, process: Process) -> None:
        await guest.agent.start_container(container.id)
        await process.run(guest.agent)
        self._events.emit(TaskStarted(container_id=container.id, pid=self._task_pid()))

    async def _start_exec(
        self, guest: Guest, container: Container, process: Process, exec_id: ExecId
    ) -> None:
        if container.process.is_stopped:
            message = f"container {container.id} init process is not running"
            raise FailedPreconditionError(message)
        process.streams = await self._streams.open(process.stdio, container_id=container.id)
        await guest.agent.exec_process(container.id, exec_id, process=container.exec_specs[exec_id])
        await process.run(guest.agent)
        self._events.emit(
            ExecStarted(container_id=container.id, exec_id=exec_id, pid=self._task_pid())
        )

    async def exec(
        self, container_id: ContainerId, exec_id: ExecId, *, process: JsonObject, stdio: Stdio
    ) -> None:
        """Register an exec; nothing is opened yet."""
        container = self._containers.find(container_id)
        container.process.request("exec")
        if exec_id in container.execs:
            message = f"exec {exec_id} of container {container_id} already exists"
            raise ExecExistsError(message)
        oci_spec.check_process(process, "process")
        convert.process_message(process)
        container.exec_specs[exec_id] = process
        container.execs[exec_id] = Process(
            container_id, exec_id, stdio=stdio, bundle=container.process.bundle
        )
        self._events.emit(ExecAdded(container_id=container_id, exec_id=exec_id))

    # --- exit -------------------------------------------------------------------------------

    async def _watch_guest(self, guest: Guest) -> None:
        reason = await guest.lost()
        if self._state is not SandboxState.READY:
            return
        self._state = SandboxState.LOST
        _log.error("guest lost", extra={"reason": reason, "console": guest.console_tail()})
        # First, so that no request goes on waiting for it.
        await guest.stop()
        await self._exits.end_all(self._containers.all)
        with contextlib.suppress(KataError):
            self._store.update(processes=())

    async def wait(self, container_id: ContainerId, exec_id: ExecId | None) -> ExitInfo:
        """Wait for a process to end."""
        return await self._containers.find(container_id).find(exec_id).wait()

    # --- signals, streams, limits -----------------------------------------------------------

    async def kill(
        self, container_id: ContainerId, exec_id: ExecId | None, *, signal: int, is_all: bool
    ) -> None:
        """Signal a process, or all of a container's."""
        container = self._containers.find(container_id)
        process = container.find(exec_id)
        if process.is_stopped:
            message = f"{process} not found: it has already finished"
            raise ProcessNotFoundError(message)
        if exec_id is not None and process.status is TaskStatus.CREATED:
            message = f"{process}: process not created"
            raise FailedPreconditionError(message)
        if self._state is SandboxState.WAITING and signal in _ENDING_SIGNALS:
            await self._exits.end_all([container], KILLED_STATUS)
            return
        if self._state is SandboxState.BOOTING and signal in _ENDING_SIGNALS and self._guest:
            await self._guest.stop()  # Whoever boots it ends the process.
            return
        guest = self._ready_guest()
        if signal in _ENDING_SIGNALS:
            # A process created but not started has nobody else to see it end.
            self._exits.watch(guest, container, process)
        target = None if is_all else exec_id
        try:
            await guest.agent.signal_process(container_id, target, signal)
        except (AgentTimeoutError, UnavailableError):
            if signal != SIGKILL:
                raise
            # A guest that no longer answers is ended from outside.
            await guest.stop()
            return
        if signal == SIGKILL:
            self._exits.bound_drain(process)

    async def pause(self, container_id: ContainerId) -> None:
        """Freeze a container."""
        process = self._containers.find(container_id).process
        async with process.lock:
            process.request("pause")
            process.move(TaskStatus.PAUSING)
            try:
                await self._ready_guest().agent.pause_container(container_id)
            except BaseException:
                if process.status is TaskStatus.PAUSING:
                    process.move(TaskStatus.RUNNING)
                raise
            if process.status is TaskStatus.PAUSING:
                process.move(TaskStatus.PAUSED)
                self._events.emit(TaskPaused(container_id=container_id))

    async def resume(self, container_id: ContainerId) -> None:
        """Thaw a container."""
        process = self._containers.find(container_id).process
        async with process.lock:
            process.request("resume")
            await self._ready_guest().agent.resume_container(container_id)
            if process.status is TaskStatus.PAUSED:
                process.move(TaskStatus.RUNNING)
                self._events.emit(TaskResumed(container_id=container_id))

    async def resize(
        self, container_id: ContainerId, exec_id: ExecId | None, *, rows: int, columns: int
    ) -> None:
        """Set a terminal's size; without a terminal there is nothing to do."""
        process = self._containers.find(container_id).find(exec_id)
        if not process.stdio.terminal or process.is_stopped:
            return
        process.window = (rows, columns)
        if process.copies is not None:
            await self._ready_guest().agent.resize_terminal(
                container_id, exec_id, rows=rows, columns=columns
            )

    async def close_stdin(self, container_id: ContainerId, exec_id: ExecId | None) -> None:
        """Let stdin end after what was written."""
        self._containers.find(container_id).find(exec_id).close_stdin()

    async def update(self, container_id: ContainerId, *, resources: JsonObject) -> None:
        """Change a container's limits."""
        process = self._containers.find(container_id).process
        process.request("update")
        await self._ready_guest().agent.update_container(
            container_id, resources=guest_resources(resources)
        )

    async def stats(self, container_id: ContainerId) -> ContainerStats:
        """Read a container's resource use."""
        process = self._containers.find(container_id).process
        if process.is_stopped:
            message = f"{process} has ended: no statistics"
            raise ProcessNotFoundError(message)
        return await self._ready_guest().agent.stats_container(container_id)

    # --- delete -----------------------------------------------------------------------------

    async def delete(
        self, container_id: ContainerId, exec_id: ExecId | None
    ) -> tuple[int, ExitInfo]:
        """Forget a process that does not run."""
        container = self._containers.find(container_id)
        process = container.find(exec_id)
        async with process.lock:
            self._containers.find(container_id)  # Another delete may have held the lock.
            process.request("delete")
            pid = self._task_pid()
            ended = process.exit
            if ended is None:
                ended = process.end(KILLED_STATUS)
            if ended is None:
                message = f"{process} has no exit"
                raise AssertionError(message)
            await self._exits.drain(process)
            process.release()
            if exec_id is None:
                await self._delete_container(container, pid, ended)
            else:
                container.execs.pop(exec_id, None)
                container.exec_specs.pop(exec_id, None)
        # Not while the lock is held, for which the end of the sandbox waits.
        if self.is_empty:
            await self.close()
        return pid, ended

    async def _delete_container(self, container: Container, pid: int, ended: ExitInfo) -> None:
        await self._containers.release(container, self._guest)
        self._containers.discard(container)
        with contextlib.suppress(KataError):
            # A full disk must not keep a container from being deleted; the old record errs on
            # the side of naming too much.
            self._store.update(containers=self._recorded)
        self._events.emit(TaskDeleted(container_id=container.id, pid=pid, exit=ended))

    async def close(self) -> None:
        """End the guest and release everything. Idempotent."""
        before, self._state = self._state, SandboxState.CLOSED
        if before is SandboxState.BOOTING and self._guest is not None:
            await self._guest.stop()  # Whoever boots it holds the lock of a process.
        await self._ending()

    async def _close(self) -> None:
        await self._exits.end_all(self._containers.all)
        await self._exits.close()
        await self._supervisor.close()
        if self._guest is not None:
            await self._guest.stop()
        for container in self._containers.all:
            await self._containers.release(container, self._guest)
        await self._streams.close()
        with contextlib.suppress(KataError):
            # Who holds it still asks how it ended.
            self._store.update(processes=(), containers=(self.held_as,) if self.held_as else ())

    # --- answers from memory ----------------------------------------------------------------

    def state(self, container_id: ContainerId, exec_id: ExecId | None) -> ProcessState:
        """Describe a process."""
        container = self._containers.find(container_id)
        return container.find(exec_id).describe(pid=self._task_pid())

    def execs(self, container_id: ContainerId) -> tuple[ExecId, ...]:
        """List the execs of a container."""
        return tuple(self._containers.find(container_id).execs)

    def task_pid(self, container_id: ContainerId) -> int:
        """Return the pid that stands for a container, 0 if it is not there."""
        return self._task_pid() if container_id in self._containers else 0

    @property
    def is_empty(self) -> bool:
        """No container is there or on its way, nor is it held."""
        return self._containers.is_empty and self.held_as is None

    @property
    def _recorded(self) -> tuple[ContainerId, ...]:
        """Those for whose sake ``delete`` of another one must leave this process alone."""
        return (*([self.held_as] if self.held_as else []), *self._containers.ids)

    @property
    def is_ready(self) -> bool:
        """The guest is up."""
        return self._state is SandboxState.READY

    @property
    def is_over(self) -> bool:
        """The guest has come and gone."""
        return self._state is SandboxState.CLOSED

    def _task_pid(self) -> int:
        return 0 if self._guest is None else self._guest.task_pid

    def _ready_guest(self) -> Guest:
        if self._guest is None or self._state is not SandboxState.READY:
            message = f"sandbox is {self._state.value}"
            raise UnavailableError(message)
        return self._guest
