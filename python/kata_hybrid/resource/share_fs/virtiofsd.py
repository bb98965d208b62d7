"""The shared folder served by virtiofsd: QEMU's (C) or the virtiofs project's (Rust).

    new ──start──▶ serving ──(daemon dies)──▶ gone
     └──────────── stop ───────────────────────▲

We bind the socket and the daemon inherits it listening: QEMU can connect at any time, and neither
daemon makes lock files elsewhere. It confines itself to the folder; mounts made below the folder
later reach it because it shares or follows the shim's mount namespace (see ``SANDBOX``).
"""

import asyncio
import contextlib
import logging
import os
import resource
import socket
from dataclasses import dataclass
from pathlib import Path

from kata_hybrid.aio.process import Process, ProcessReaper
from kata_hybrid.config.model import QemuConfig
from kata_hybrid.errors import InvalidStateError, VmmError
from kata_hybrid.hypervisor.console import OutputReader
from kata_hybrid.hypervisor.probe import VirtiofsdFinding, VirtiofsdKind
from kata_hybrid.resource.share_fs.base import TAG, SharedFolder
from kata_hybrid.types import FolderCache, ProcessIdentity, VhostUserFs

SANDBOX = "chroot"
"""One process, confined to the folder, in the shim's own (private) mount namespace. The other mode,
``namespace``, makes a second process, which outlives a SIGKILL of the first."""
SOCKET_NAME = "virtiofsd.sock"
READY_TEXT = "aiting for vhost-user socket connection"
"""Both daemons say so; a future one that does not is given ``_READY_GRACE_S``."""
_READY_GRACE_S = 3.0
_STOP_TIMEOUT_S = 10.0
_LAST_WORDS_TIMEOUT_S = 1.0
_TAIL_BYTES = 8 << 10

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtiofsdSettings:
    """How to run virtiofsd on this host: from the configuration and the probe."""

    program: Path
    kind: VirtiofsdKind
    cache: FolderCache = FolderCache.AUTO
    extra_arguments: tuple[str, ...] = ()
    is_debug: bool = False


def virtiofsd_settings(config: QemuConfig, found: VirtiofsdFinding) -> VirtiofsdSettings:
    """Combine what is configured and what was found."""
    return VirtiofsdSettings(
        program=found.path,
        kind=found.kind,
        cache=config.virtio_fs_cache,
        extra_arguments=config.virtio_fs_extra_args,
        is_debug=config.enable_debug,
    )


def build_arguments(
    settings: VirtiofsdSettings, *, folder: Path, socket_fd: int, file_limit: int
) -> tuple[str, ...]:
    """Lay out the command line."""
    match settings.kind:
        case VirtiofsdKind.C:
            arguments = _c_arguments(settings, folder=folder)
        case VirtiofsdKind.RUST:
            arguments = _rust_arguments(settings, folder=folder)
    return (
        os.fspath(settings.program),
        f"--fd={socket_fd}",
        f"--rlimit-nofile={file_limit}",
        *arguments,
        *settings.extra_arguments,
    )


def _c_arguments(settings: VirtiofsdSettings, *, folder: Path) -> tuple[str, ...]:
    # fuse_opt unescapes "\," and "\\" in an -o value.
    source = os.fspath(folder).replace("\\", "\\\\").replace(",", "\\,")
    cache = "none" if settings.cache is FolderCache.NEVER else settings.cache.value
    level = "debug" if settings.is_debug else "info"
    options = (
        f"source={source}",
        f"cache={cache}",
        f"sandbox={SANDBOX}",
        f"log_level={level}",
        "xattr",
        "announce_submounts",
    )
    return ("-f", *(word for option in options for word in ("-o", option)))


def _rust_arguments(settings: VirtiofsdSettings, *, folder: Path) -> tuple[str, ...]:
    return (
        f"--shared-dir={folder}",
        f"--cache={settings.cache.value}",
        f"--sandbox={SANDBOX}",
        f"--log-level={'debug' if settings.is_debug else 'info'}",
        "--xattr",
        "--announce-submounts",
    )


class VirtiofsdShare:
    """A folder served by one virtiofsd (implements ``ShareFs``)."""

    def __init__(
        self,
        folder: SharedFolder,
        *,
        run_dir: Path,
        settings: VirtiofsdSettings,
        reaper: ProcessReaper,
    ) -> None:
        """Describe the service; nothing is started."""
        self._folder = folder
        self._socket_path = run_dir / SOCKET_NAME
        self._settings = settings
        self._reaper = reaper
        self._process: Process | None = None
        self._stderr: OutputReader | None = None
        self._is_ready = asyncio.Event()
        self._is_stopping = False

    @property
    def folder(self) -> SharedFolder:
        """What is served."""
        return self._folder

    @property
    def device(self) -> VhostUserFs:
        """The device to give to the machine."""
        return VhostUserFs(tag=TAG, socket_path=self._socket_path)

    @property
    def processes(self) -> tuple[ProcessIdentity, ...]:
        """The daemon, once it is started."""
        return () if self._process is None else (self._process.identity,)

    async def start(self) -> None:
        """Serve the folder, which must exist.

        Raises:
            VmmError: the daemon did not come up; the text has its own last words.
            InvalidStateError: it was started or stopped before.
        """
        if self._process is not None or self._is_stopping:
            msg = "shared folder"
            raise InvalidStateError(msg, state="started or stopped", request="start")
        try:
            self._process = await self._spawn()
            await self._come_up(self._process)
        except OSError as error:
            await self.stop()
            msg = "start virtiofsd"
            raise VmmError(msg, str(error)) from error
        except BaseException:
            await self.stop()
            raise

    async def _spawn(self) -> Process:
        if not self._folder.host_path.is_dir():
            msg = "start virtiofsd"
            raise VmmError(msg, f"{self._folder.host_path} is not a folder")
        _soft, file_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        read_end, write_end = os.pipe()
        try:
            self._stderr = OutputReader(read_end, sink=self._hear, tail_bytes=_TAIL_BYTES)
            with _listening_socket(self._socket_path) as listener:
                return await self._reaper.spawn(
                    build_arguments(
                        self._settings,
                        folder=self._folder.host_path,
                        socket_fd=listener.fileno(),
                        file_limit=file_limit,
                    ),
                    name="virtiofsd",
                    pass_fds=(listener.fileno(),),
                    stderr=write_end,
                )
        finally:
            os.close(write_end)

    def _hear(self, line: str) -> None:
        _log.debug("virtiofsd says", extra={"line": line})
        if READY_TEXT in line:
            self._is_ready.set()

    async def _come_up(self, daemon: Process) -> None:
        async with asyncio.TaskGroup() as group:
            ready = group.create_task(self._is_ready.wait())
            gone = group.create_task(daemon.exited())
            await asyncio.wait(
                {ready, gone}, timeout=_READY_GRACE_S, return_when=asyncio.FIRST_COMPLETED
            )
            ready.cancel()
            gone.cancel()
        if daemon.has_exited:
            msg = "start virtiofsd"
            raise VmmError(msg, await self.died())

    async def died(self) -> str:
        """Wait for the daemon to be gone and say why."""
        if self._process is None:
            return "virtiofsd was not started"
        status = await self._process.exited()
        if self._stderr is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
                    await self._stderr.ended()
        if self._is_stopping:
            return "virtiofsd was stopped"
        words = self._stderr.tail() if self._stderr is not None else ""
        return f"virtiofsd ended with status {status}: {words}".rstrip(": ")

    async def stop(self) -> None:
        """End the daemon now and remove its socket. Idempotent.

        Raises:
            VmmError: it is still there after several seconds (stuck in the kernel).
        """
        self._is_stopping = True
        try:
            if self._process is not None:
                await _end(self._process)
        finally:
            if self._stderr is not None:
                self._stderr.close()
            self._socket_path.unlink(missing_ok=True)


async def _end(daemon: Process) -> None:
    daemon.kill()
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await daemon.exited()
    except TimeoutError as error:
        message = f"pid {daemon.pid} outlives SIGKILL by {_STOP_TIMEOUT_S:g} s"
        msg = "stop virtiofsd"
        raise VmmError(msg, message) from error


def _listening_socket(path: Path) -> socket.socket:
    # Left by a shim that was killed: the folder is ours alone.
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(os.fspath(path))
        path.chmod(0o600)
        listener.listen(1)
    except OSError as error:
        listener.close()
        operation = f"listen on {path}"
        raise VmmError(operation, str(error)) from error
    return listener
