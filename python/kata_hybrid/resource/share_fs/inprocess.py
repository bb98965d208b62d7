"""The shared folder served by the built-in machine monitor, in this process: no daemon.

    new ──start──▶ serving ──stop──▶ gone

The monitor opens the folder when the machine starts and serves it on its I/O thread, in the shim's
own mount namespace: what is mounted below it later is seen. It cannot die alone.
"""

import asyncio

from kata_hybrid.errors import InvalidStateError, VmmError
from kata_hybrid.resource.share_fs.base import TAG, SharedFolder
from kata_hybrid.types import FolderCache, HostFolder, ProcessIdentity


class InProcessShare:
    """A folder that the machine's monitor serves (implements ``ShareFs``)."""

    def __init__(self, folder: SharedFolder, *, cache: FolderCache) -> None:
        """Describe the service; ``cache`` is what the guest may keep."""
        self._folder = folder
        self._cache = cache
        self._is_started = False
        self._stopped = asyncio.Event()

    @property
    def folder(self) -> SharedFolder:
        """What is served."""
        return self._folder

    @property
    def device(self) -> HostFolder:
        """The device to give to the machine."""
        return HostFolder(tag=TAG, path=self._folder.host_path, cache=self._cache)

    @property
    def processes(self) -> tuple[ProcessIdentity, ...]:
        """None: the machine's monitor is in this process."""
        return ()

    async def start(self) -> None:
        """Check that the folder is there; the machine's start does the rest.

        Raises:
            VmmError: it is no folder.
            InvalidStateError: it was started or stopped before.
        """
        if self._is_started or self._stopped.is_set():
            subject = "shared folder"
            raise InvalidStateError(subject, state="started or stopped", request="start")
        self._is_started = True
        if not self._folder.host_path.is_dir():
            operation = "share a folder"
            raise VmmError(operation, f"{self._folder.host_path} is not a folder")

    async def died(self) -> str:
        """Wait for :meth:`stop`: nothing else ends it while there is a machine."""
        await self._stopped.wait()
        return "the shared folder was stopped"

    async def stop(self) -> None:
        """Serve no more. Idempotent."""
        self._stopped.set()
