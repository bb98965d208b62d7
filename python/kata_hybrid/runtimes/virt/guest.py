"""The guest of a sandbox: machine, cgroup, folder, network, agent, brought up and watched as one.

    new ──start──▶ up ──(machine, folder daemon or agent gone, or unhealthy)──▶ lost
     └───────────────────────────────── stop ──────────────────────────────────▶ stopped

``start`` unwinds in reverse whatever it acquired if any step fails. ``lost`` is the one place that
knows every way a guest can go away.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

from kata_hybrid.agent.base import Agent
from kata_hybrid.aio.ending import Ending
from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.aio.supervisor import Supervisor
from kata_hybrid.config.model import FORWARD_PORT, AgentConfig
from kata_hybrid.errors import KataError, VmExitedError, VmmError
from kata_hybrid.hypervisor.base import Hypervisor
from kata_hybrid.resource.cgroup import SandboxCgroup
from kata_hybrid.resource.disks import Disks
from kata_hybrid.resource.network.base import Network
from kata_hybrid.resource.share_fs.base import SharedFolder, ShareFs
from kata_hybrid.resource.volume.empty_dir import BlockEmptyDirs
from kata_hybrid.types import (
    GuestDetails,
    GuestStorage,
    LinkHooks,
    ProcessIdentity,
    SandboxId,
)

_log = logging.getLogger(__name__)

WAIT_KEEPS_OUTPUT: Final = "wait-keeps-output"
"""The agent keeps unread output after an exit was collected, so exits need not wait for it."""
PORT_FORWARD: Final = "port-forward"
"""The agent connects the host to ports of the guest's loopback."""
HEALTH_INTERVAL_S: Final = 30.0
_LAST_WORDS_S: Final = 1.0
"""How much later than its effect the cause of a loss may be known."""
_START_END_S: Final = 30.0
"""How long a start that was given up may take to let go: a machine is being made meanwhile."""
_STOPPED: Final = "the guest was stopped before it was up"
DEFAULT_SHM_BYTES: Final = 64 << 20


class Record(Protocol):
    """Writes down what has to be released if this process dies (``persist/store.py``)."""

    def __call__(
        self,
        *,
        processes: tuple[ProcessIdentity, ...] | None = None,
        cgroups: tuple[str, ...] | None = None,
        links: LinkHooks | None = None,
    ) -> None:
        """Replace what is given."""


class Guest(Protocol):
    """What a sandbox needs of its guest."""

    @property
    def agent(self) -> Agent:
        """The agent in it."""

    @property
    def folder(self) -> SharedFolder:
        """What host and guest share."""

    @property
    def details(self) -> GuestDetails:
        """What the agent can do. Valid once started."""

    @property
    def task_pid(self) -> int:
        """A host pid that stands for the guest's processes, 0 before it is started."""

    @property
    def disks(self) -> Disks:
        """The disks of its machine."""

    @property
    def empty_dirs(self) -> BlockEmptyDirs | None:
        """What makes disks of a pod's ``emptyDir`` volumes; nothing if they are shared."""

    @property
    def awaits_links(self) -> bool:
        """Links of its network come between create and start: it is not to boot before."""

    @property
    def is_seccomp_disabled(self) -> bool:
        """Containers run without their seccomp profile."""

    async def start(
        self,
        *,
        hostname: str,
        dns: tuple[str, ...],
        record: Record,
    ) -> None:
        """Bring it up.

        Raises:
            KataError: a part failed; nothing is left running.
        """

    async def lost(self) -> str:
        """Wait until it is gone or of no use, and say why."""

    def console_tail(self) -> str:
        """The last lines of its console."""

    async def stop(self) -> None:
        """End it now and release everything. Idempotent."""


class VirtGuest:
    """A guest in a virtual machine. Implements :class:`Guest`."""

    def __init__(
        self,
        sandbox_id: SandboxId,
        *,
        hypervisor: Hypervisor,
        cgroup: SandboxCgroup,
        share_fs: ShareFs,
        network: Network,
        agent: Agent,
        config: AgentConfig,
        is_seccomp_disabled: bool,
        resources: contextlib.ExitStack,
        empty_dir_maker: ProcessReaper | None = None,
        task_pid: int | None = None,
        awaits_links: bool = False,
    ) -> None:
        """Compose the parts; nothing is started.

        ``resources`` is what the parts stand on, closed after they are stopped. With an
        ``empty_dir_maker``, ``emptyDir`` volumes are disks. ``task_pid`` stands for the guest's
        processes in the machine's stead.
        """
        self.agent = agent
        self.is_seccomp_disabled = is_seccomp_disabled
        self.awaits_links = awaits_links
        self.disks = Disks(hypervisor)
        self.empty_dirs = (
            BlockEmptyDirs(self.disks, reaper=empty_dir_maker) if empty_dir_maker else None
        )
        self.task_pid = task_pid or 0
        self._sandbox_id = sandbox_id
        self._hypervisor = hypervisor
        self._cgroup = cgroup
        self._share_fs = share_fs
        self._network = network
        self._device_paths: tuple[str, ...] = ()
        self._record: Record | None = None
        self._config = config
        self._resources = resources
        self._details: GuestDetails | None = None
        self._supervisor = Supervisor("guest")
        self._starting: asyncio.Task[None] | None = None
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._ending = Ending(self._stop, name="guest end")

    @property
    def folder(self) -> SharedFolder:
        """What host and guest share."""
        return self._share_fs.folder

    @property
    def details(self) -> GuestDetails:
        """What the agent said of itself."""
        if self._details is None:
            message = "the guest is not up"
            raise VmExitedError(message)
        return self._details

    async def start(
        self,
        *,
        hostname: str,
        dns: tuple[str, ...],
        record: Record,
    ) -> None:
        """Bring it up. A stop meanwhile ends it."""
        if self._ending.has_begun:
            raise VmExitedError(_STOPPED)
        self._record = record
        self._starting = self._supervisor.start(
            self._bring_up(record, hostname=hostname, dns=dns), name="guest start", is_awaited=True
        )
        try:
            await asyncio.wait({self._starting})
        finally:
            if not _is_done_well(self._starting):
                await self.stop()
        if self._starting.cancelled():
            raise VmExitedError(_STOPPED)
        self._starting.result()

    async def _bring_up(self, record: Record, *, hostname: str, dns: tuple[str, ...]) -> None:
        began = time.monotonic()
        await self._acquire(record)
        await self._share_fs.start()
        self._hypervisor.add_shared_folder(self._share_fs.device)
        self._watch(self._share_gone, name="shared folder")
        await self._start_machine()
        self.task_pid = self.task_pid or self._hypervisor.task_pid
        self._watch(self._machine_gone, name="machine")
        record(processes=(*self._hypervisor.processes, *self._share_fs.processes))
        _log.info(
            "machine started",
            extra={"hypervisor": self._hypervisor.name, "ms": _since_ms(began)},
        )
        await self._unless_lost(self._meet_agent(hostname=hostname, dns=dns))
        _log.info("guest up", extra={"ms": _since_ms(began)})
        if PORT_FORWARD in self.details.extra_features:
            self._supervisor.start(self._forward_ports(), name="port forward")
        self._watch(self._agent_gone, name="agent")
        self._watch(self._unhealthy, name="health")

    async def _acquire(self, record: Record) -> None:
        """Enter the cgroup, before anything that counts is made, while the links are looked at."""
        done = await asyncio.gather(
            self._cgroup.enter(record), self._open_network(record), return_exceptions=True
        )
        for outcome in done:
            if outcome is not None:
                raise outcome

    async def _open_network(self, record: Record) -> None:
        devices = await self._network.open()
        self._device_paths = tuple(map(self._hypervisor.add_network, devices))
        if (hooks := self._network.hooks) is not None:
            record(links=hooks)
        await self._network.wire()

    async def _start_machine(self) -> None:
        try:
            await self._hypervisor.start()
        except VmmError as exc:
            # A daemon that went away makes the machine fail: then that is the cause.
            if self._share_fs.processes and (reason := await _soon(self._share_fs.died())):
                raise VmmError("serve shared folder", reason) from exc
            raise

    async def _meet_agent(self, *, hostname: str, dns: tuple[str, ...]) -> None:
        address = self._hypervisor.agent_address
        await self.agent.connect(
            address=address, port=self._config.server_port, timeout_s=self._config.boot_timeout_s
        )
        if self._config.log_port:
            self._supervisor.start(
                self.agent.forward_log(address=address, port=self._config.log_port),
                name="agent log",
            )
        network = await self._network.described(device_paths=self._device_paths)
        await self.agent.update_network(network)
        folder = self._share_fs.folder
        storages = (
            GuestStorage(
                driver="virtio-fs",
                source=self._share_fs.device.tag,
                fstype="virtiofs",
                options=("nodev",),
                mount_point=f"{folder.guest_path}/",
            ),
            GuestStorage(
                driver="ephemeral",
                source="shm",
                fstype="tmpfs",
                options=("noexec", "nosuid", "nodev", "mode=1777", f"size={DEFAULT_SHM_BYTES}"),
                mount_point="/run/kata-containers/sandbox/shm",
            ),
        )
        await self.agent.create_sandbox(
            self._sandbox_id, hostname=hostname, dns=dns, storages=storages
        )
        self._details = await self.agent.guest_details()

    async def _forward_ports(self) -> None:
        """Let what listens on the guest's loopback be reached on the pod's."""
        try:
            loopback = await self._network.catch_loopback()
        except KataError as exc:
            _log.warning("ports of the guest are not forwarded", extra={"error": str(exc)})
            return
        if loopback is not None:
            with contextlib.closing(loopback):
                await self.agent.forward_ports(
                    loopback.listener,
                    address=self._hypervisor.agent_address,
                    port=FORWARD_PORT,
                )

    async def _unless_lost(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work``, but give up as soon as the guest is gone."""
        task = self._supervisor.start(work, name="meet agent", is_awaited=True)
        either: set[asyncio.Future[Any]] = {task, self._lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, KataError):
                await task
        if self._lost.done():
            console = self.console_tail()
            message = f"guest ended before its agent answered: {self._lost.result()}"
            raise VmExitedError(f"{message}; console:\n{console}" if console else message)
        await task

    def _watch(self, ending: Callable[[], Coroutine[Any, Any, str]], *, name: str) -> None:
        async def watch() -> None:
            reason = await ending()
            if not self._lost.done():
                self._lost.set_result(reason)

        self._supervisor.start(watch(), name=f"{name} watcher")

    async def _machine_gone(self) -> str:
        end = await self._hypervisor.exited()
        return f"{end.reason}: {end.detail}" if end.detail else end.reason

    async def _share_gone(self) -> str:
        reason = await self._share_fs.died()
        # The daemon ends when its machine does.
        return await _soon(self._machine_gone()) or reason

    async def _agent_gone(self) -> str:
        await self.agent.closed()
        # A machine that ends takes the connection with it: prefer the machine's own reason.
        return await _soon(self._machine_gone()) or "connection to the guest agent closed"

    async def _unhealthy(self) -> str:
        while True:
            await asyncio.sleep(HEALTH_INTERVAL_S)
            try:
                await self.agent.check(timeout_s=self._config.health_check_timeout_s)
            except KataError as exc:
                return f"guest agent failed its health check: {exc}"

    async def lost(self) -> str:
        """Wait until it is gone or of no use, and say why."""
        return await asyncio.shield(self._lost)

    def console_tail(self) -> str:
        """The last lines of its console."""
        return self._hypervisor.console_tail()

    async def stop(self) -> None:
        """End it now and release everything. Idempotent."""
        await self._ending()

    async def _stop(self) -> None:
        steps = (
            self._end_start,
            self.agent.close,
            self._hypervisor.stop,
            self._hypervisor.cleanup,
            self.disks.close,
            self._share_fs.stop,
            self._close_network,
            self._supervisor.close,
            self._leave_cgroup,
        )
        for step in steps:
            try:
                await step()
            except Exception as exc:  # noqa: BLE001 - a broken step keeps nothing else from being released
                _log.warning(
                    "stop step failed",
                    extra={"step": repr(step), "error": str(exc)},
                    exc_info=None if isinstance(exc, KataError) else exc,
                )
        self._resources.close()
        if not self._lost.done():
            self._lost.set_result("stopped")

    async def _end_start(self) -> None:
        """See a start that is under way end: nothing is acquired any more."""
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait({self._starting}, timeout=_START_END_S)

    async def _leave_cgroup(self) -> None:
        if self._record is not None:
            await self._cgroup.leave(self._record)

    async def _close_network(self) -> None:
        hooks = self._network.hooks
        await self._network.stop()
        if hooks is not None and self._record is not None:
            # The links may be another sandbox's by the time that this one is deleted.
            self._record(links=dataclasses.replace(hooks, links=()))


async def _soon(reason: Coroutine[Any, Any, str]) -> str:
    """Return a reason that is known within a moment, else nothing."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LAST_WORDS_S):
            return await reason
    return ""


def _is_done_well(task: asyncio.Task[None]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _since_ms(began: float) -> int:
    return round((time.monotonic() - began) * 1000)
