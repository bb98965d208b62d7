"""The disks of a sandbox's machine: each file or device of the host's once, however many use it.

    attach ─▶ (first) the machine gets a disk     detach ─▶ (last) the machine gives it up

Made with the machine, used by root file systems and volumes of every container. Containers come one
after another but go at any time: attaching and detaching take turns, and what a caller gives up
half-way is finished or undone here. The end of the machine is the end of its disks.
"""

import asyncio
import itertools
import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from kata_hybrid.aio.supervisor import Supervisor
from kata_hybrid.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    KataError,
    UnavailableError,
)
from kata_hybrid.types import BlockDevice, GuestDisk

_log = logging.getLogger(__name__)

_Key = tuple[str, int, int]
_GONE: Final = "the machine is gone: it takes no disk"


class DiskMachine(Protocol):
    """What takes disks (``hypervisor/base.py``)."""

    async def add_disk(self, disk: BlockDevice) -> GuestDisk:
        """Give the guest a disk."""

    async def remove_disk(self, disk_id: str) -> None:
        """Take it away."""


@dataclass(slots=True, kw_only=True)
class _Entry:
    device: BlockDevice
    guest: GuestDisk
    users: int = 1


class Disks:
    """The disks of one machine."""

    def __init__(self, machine: DiskMachine) -> None:
        """``machine`` has none yet."""
        self._machine = machine
        self._entries: dict[_Key, _Entry] = {}
        self._lock = asyncio.Lock()
        self._numbers = itertools.count()
        self._supervisor = Supervisor("disks")
        self._is_closed = False

    async def attach(self, path: Path, *, is_read_only: bool) -> GuestDisk:
        """Give the guest a file or block device as a disk, unless it has it.

        Raises:
            InvalidArgumentError: it is neither, or not there.
            FailedPreconditionError: it is in use and may not be written, and now is to be.
            UnavailableError: the machine is gone.
            KataError: the machine does not take it.
        """
        if self._is_closed:
            raise UnavailableError(_GONE)
        key = _key(path)
        task = self._supervisor.start(
            self._attach(key, path, is_read_only=is_read_only),
            name=f"attach {path}",
            is_awaited=True,
        )
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            if not self._is_closed:
                self._supervisor.start(self._give_back(task), name=f"give {path} back")
            raise
        if task.cancelled():
            raise UnavailableError(_GONE)
        return task.result().guest

    async def _attach(self, key: _Key, path: Path, *, is_read_only: bool) -> _Entry:
        async with self._lock:
            entry = self._entries.get(key)
            if entry is not None and not entry.users:
                # It was not given up when it was asked to be; as what it is now, it is of no use.
                await self._remove(key, entry)
                entry = None
            if entry is None:
                device = BlockDevice(
                    id=f"disk-{next(self._numbers)}", path=path, is_read_only=is_read_only
                )
                entry = _Entry(device=device, guest=await self._machine.add_disk(device))
                self._entries[key] = entry
            elif entry.device.is_read_only and not is_read_only:
                message = (
                    f"disk {path} is used read-only by another container of the sandbox, "
                    "and cannot be written by this one"
                )
                raise FailedPreconditionError(message)
            else:
                entry.users += 1
            return entry

    async def _give_back(self, task: "asyncio.Task[_Entry]") -> None:
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is None:
            await self._detach(task.result().guest)

    async def detach(self, disk: GuestDisk) -> None:
        """Give a disk up; the last user's is taken from the machine. What fails is logged.

        Whoever gives up waiting does not keep it from being done.
        """
        if self._is_closed:
            return
        work = self._supervisor.start(self._detach(disk), name=f"detach {disk.source}")
        # The end of the machine, which cancels the work, is its end too.
        await asyncio.wait({work})

    async def _detach(self, disk: GuestDisk) -> None:
        async with self._lock:
            key = next((key for key, each in self._entries.items() if each.guest == disk), None)
            if key is None:
                return
            entry = self._entries[key]
            entry.users = max(entry.users - 1, 0)
            if entry.users:
                return
            try:
                await self._remove(key, entry)
            except KataError as exc:
                _log.warning(
                    "disk stays in the machine",
                    extra={"path": os.fspath(entry.device.path), "error": str(exc)},
                )

    async def _remove(self, key: _Key, entry: _Entry) -> None:
        await self._machine.remove_disk(entry.device.id)
        del self._entries[key]

    async def close(self) -> None:
        """Forget all: the machine is gone. Idempotent."""
        self._is_closed = True
        await self._supervisor.close()
        self._entries.clear()


def _key(path: Path) -> _Key:
    """What tells a file or device from others, by whatever path."""
    try:
        status = path.stat()
    except (OSError, ValueError) as exc:
        message = f"disk {path}: {getattr(exc, 'strerror', None) or exc}"
        raise InvalidArgumentError(message) from exc
    if stat.S_ISBLK(status.st_mode):
        return ("device", os.major(status.st_rdev), os.minor(status.st_rdev))
    if stat.S_ISREG(status.st_mode):
        return ("file", status.st_dev, status.st_ino)
    message = f"disk {path} is neither a file nor a block device"
    raise InvalidArgumentError(message)
