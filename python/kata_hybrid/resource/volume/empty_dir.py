"""``emptyDir`` volumes as disks of the guest's (``emptydir_mode = "block-plain"``).

The kubelet gives a pod a folder of the host's. Instead of sharing it, an image file is made in it,
as large as the file system there could hold and empty, and formatted here: the guest mounts it, and
does without the way to the host for each file. All containers of the pod have the same; it stays in
the machine until its end, and goes with the folder.
"""

import asyncio
import base64
import os
import stat
from pathlib import Path
from typing import Final

from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.errors import FailedPreconditionError, UnimplementedError
from kata_hybrid.hypervisor.console import OutputReader
from kata_hybrid.persist.mounts import file_system_at
from kata_hybrid.resource.disks import Disks
from kata_hybrid.resource.volume.direct import GUEST_FOLDER
from kata_hybrid.resource.volume.ephemeral import EMPTY_DIR
from kata_hybrid.types import GuestStorage

_IMAGE: Final = "disk.img"
_SUB_PATHS: Final = "volume-subpaths"
_DEPTH: Final = 4
"""Of a subPath below the pod's folder."""
_FORMAT_TIMEOUT_S: Final = 60
_TAIL_BYTES: Final = 4096


class BlockEmptyDirs:
    """Those of one pod."""

    def __init__(self, disks: Disks, *, reaper: ProcessReaper) -> None:
        """``disks`` takes the images, ``reaper`` starts what formats them."""
        self._disks = disks
        self._reaper = reaper
        self._storages: dict[Path, GuestStorage] = {}
        self._lock = asyncio.Lock()

    async def storage(self, source: str) -> GuestStorage | None:
        """Describe the disk that stands for a bind's source; None for any other source.

        Raises:
            FailedPreconditionError: it cannot be made; the text says why.
            UnimplementedError: it is a folder in such a volume.
            KataError: the machine does not take it.
        """
        folder = _empty_dir(source)
        if folder is None:
            _refuse_sub_path(source)
            return None
        async with self._lock:
            if folder not in self._storages:
                image = folder / _IMAGE
                if not _is_image(image):
                    await self._make(image)
                disk = await self._disks.attach(image, is_read_only=False)
                name = base64.urlsafe_b64encode(os.fsencode(folder)).decode()
                self._storages[folder] = GuestStorage(
                    driver=disk.driver,
                    source=disk.source,
                    fstype="ext4",
                    options=("discard",),
                    mount_point=f"{GUEST_FOLDER}/{name}",
                    is_shared=True,
                )
            return self._storages[folder]

    async def _make(self, image: Path) -> None:
        """Make an image with a file system whose root is as the folder is."""
        part = image.with_suffix(".part")
        status, room = image.parent.stat(), os.statvfs(image.parent)
        try:
            part.unlink(missing_ok=True)
            with part.open("xb") as file:
                file.truncate(room.f_blocks * room.f_frsize)
        except OSError as exc:
            message = f"make {part}: {exc.strerror}"
            raise FailedPreconditionError(message) from exc
        owner = f"root_owner={status.st_uid}:{status.st_gid}"
        lazy = "lazy_itable_init=1,lazy_journal_init=1,nodiscard"
        await self._run("mkfs.ext4", "-q", "-F", "-m", "0", "-E", f"{lazy},{owner}", part)
        mode = stat.S_IFDIR | stat.S_IMODE(status.st_mode)
        await self._run("debugfs", "-w", "-R", f"set_inode_field <2> mode 0{mode:o}", part)
        part.rename(image)

    async def _run(self, *words: str | Path) -> None:
        read_end, write_end = os.pipe()
        said = OutputReader(read_end, sink=None, tail_bytes=_TAIL_BYTES)
        try:
            with os.fdopen(write_end, "wb"):
                process = await self._reaper.spawn(words, stderr=write_end)
            async with asyncio.timeout(_FORMAT_TIMEOUT_S):
                status = await process.exited()
                await said.ended()
        except FileNotFoundError as exc:
            message = f"{words[0]} is not installed: emptydir_mode needs e2fsprogs"
            raise FailedPreconditionError(message) from exc
        except TimeoutError as exc:
            process.kill()
            message = f"{words[0]} {words[-1]}: not done in {_FORMAT_TIMEOUT_S} s"
            raise FailedPreconditionError(message) from exc
        finally:
            said.close()
        if status != 0:
            message = f"{words[0]} {words[-1]}: exit status {status}: {said.tail()}"
            raise FailedPreconditionError(message)


def _empty_dir(source: str) -> Path | None:
    folder = Path(os.path.normpath(source))
    return folder if folder.parent.name == EMPTY_DIR and folder.is_dir() else None


def _refuse_sub_path(source: str) -> None:
    """Tell the ``subPath`` of a volume, which is a folder of the host's that the guest's is not.

    The kubelet binds it to ``POD/volume-subpaths/VOLUME/CONTAINER/INDEX``.
    """
    path = Path(os.path.normpath(source))
    if len(path.parts) <= _DEPTH or path.parents[2].name != _SUB_PATHS:
        return
    volume = path.parents[3] / "volumes" / EMPTY_DIR / path.parents[1].name
    mounted = file_system_at(os.fspath(volume)) if volume.is_dir() else None
    if volume.is_dir() and (mounted is None or mounted[0] != "tmpfs"):
        message = (
            f'mount of {source}: a subPath of emptyDir "{volume.name}" is not possible with '
            'emptydir_mode = "block-plain"; mount the whole volume, or use "shared-fs"'
        )
        raise UnimplementedError(message)


def _is_image(path: Path) -> bool:
    """Whether an image is there, of the same volume's machine before.

    Raises:
        FailedPreconditionError: something else is, which is not to be given to a guest.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
        return True
    message = f"{path} is no image file of this volume's: remove it"
    raise FailedPreconditionError(message)
