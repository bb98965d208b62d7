"""An ext4 of its own for what the lab's file systems lack.

A tmpfs has neither extended attributes nor direct I/O, and io_uring waits in what the lab's root
is; on this one it does not.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

_SIZE_MIB = 1024


@contextlib.contextmanager
def mounted_ext4(place: Path, *, files: int | None = None) -> Iterator[Path]:
    """Make one in a file below ``place``, with room for so many files, and give its folder."""
    disk, folder = place / "ext4.img", place / "ext4"
    folder.mkdir()
    with disk.open("wb") as file:
        file.truncate(_SIZE_MIB << 20)
    inodes = () if files is None else ("-N", str(files))
    subprocess.run(["mkfs.ext4", "-q", *inodes, os.fspath(disk)], check=True, timeout=60)
    # Where it is built in there is no such module.
    subprocess.run(["modprobe", "loop"], check=False, timeout=30)
    subprocess.run(["mount", "-o", "loop", disk, folder], check=True, timeout=30)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True, timeout=60)
        folder.rmdir()
        disk.unlink()
