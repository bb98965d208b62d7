"""A cpio archive in the "newc" format the kernel unpacks, with the same bytes for the same tree.

Format: ``Documentation/driver-api/early-userspace/buffer-format.rst`` of the kernel. Every entry
belongs to root, has modification time 0 and an inode number by its place; entries are sorted by
path, which also puts a directory before what is in it.
"""

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from kata_hybrid.errors import InvalidArgumentError

_MAGIC = b"070701"
_HEADER_BYTES = 110
_ALIGNMENT = 4
_ARCHIVE_ALIGNMENT = 512
_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True, kw_only=True)
class CpioEntry:
    """One file, directory, link or device node; ``path`` is relative, without ``./``."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(path: str, *, mode: int = 0o755) -> CpioEntry:
    """Make a directory entry."""
    return CpioEntry(path=path, mode=stat.S_IFDIR | mode)


def regular_file(path: str, *, data: bytes, mode: int = 0o644) -> CpioEntry:
    """Make a file entry."""
    return CpioEntry(path=path, mode=stat.S_IFREG | mode, data=data)


def symbolic_link(path: str, *, target: str) -> CpioEntry:
    """Make a symbolic link entry."""
    return CpioEntry(path=path, mode=stat.S_IFLNK | 0o777, data=target.encode())


def character_device(path: str, *, major: int, minor: int, mode: int = 0o600) -> CpioEntry:
    """Make a device node entry."""
    return CpioEntry(path=path, mode=stat.S_IFCHR | mode, device=(major, minor))


def write_archive(entries: Iterable[CpioEntry]) -> bytes:
    """Lay the entries out as one archive, adding the directories they need.

    Raises:
        InvalidArgumentError: a path is absolute, escapes the root, or comes twice.
    """
    archive = bytearray()
    for inode, entry in enumerate(_with_parents(entries), start=1):
        _append(archive, entry, inode=inode)
    _append(archive, CpioEntry(path=_TRAILER, mode=0), inode=0)
    archive.extend(bytes(-len(archive) % _ARCHIVE_ALIGNMENT))
    return bytes(archive)


def _with_parents(entries: Iterable[CpioEntry]) -> list[CpioEntry]:
    tree: dict[str, CpioEntry] = {}
    for entry in entries:
        path = PurePosixPath(entry.path)
        if path.is_absolute() or ".." in path.parts or str(path) != entry.path or not path.name:
            msg = f"{entry.path!r} is no path inside an archive"
            raise InvalidArgumentError(msg)
        if entry.path in tree:
            msg = f"{entry.path!r} is in the archive twice"
            raise InvalidArgumentError(msg)
        tree[entry.path] = entry
    for name in list(tree):
        for parent in PurePosixPath(name).parents:
            if parent.name:
                tree.setdefault(str(parent), directory(str(parent)))
    return [tree[name] for name in sorted(tree, key=lambda name: PurePosixPath(name).parts)]


def _append(archive: bytearray, entry: CpioEntry, *, inode: int) -> None:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    major, minor = entry.device
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, major, minor, len(name), 0)
    archive.extend(_MAGIC)
    for value in fields:
        archive.extend(b"%08X" % value)
    archive.extend(name)
    archive.extend(bytes(-len(archive) % _ALIGNMENT))
    archive.extend(entry.data)
    archive.extend(bytes(-len(archive) % _ALIGNMENT))


def read_archive(archive: bytes) -> Iterator[CpioEntry]:
    """Read an archive back, up to its trailer.

    Raises:
        InvalidArgumentError: it is damaged.
    """
    position = 0
    while True:
        header = archive[position : position + _HEADER_BYTES]
        if len(header) != _HEADER_BYTES or not header.startswith(_MAGIC):
            msg = f"no cpio header at offset {position}"
            raise InvalidArgumentError(msg)
        try:
            fields = [int(header[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
        except ValueError as error:
            msg = f"malformed cpio header at offset {position}"
            raise InvalidArgumentError(msg) from error
        name_end = position + _HEADER_BYTES + fields[11]
        name = archive[position + _HEADER_BYTES : name_end - 1].decode("utf-8", "replace")
        if name == _TRAILER:
            return
        begin = name_end + -name_end % _ALIGNMENT
        end = begin + fields[6]
        if end > len(archive):
            msg = f"{name!r} reaches past the end of the archive"
            raise InvalidArgumentError(msg)
        yield CpioEntry(
            path=name, mode=fields[1], data=archive[begin:end], device=(fields[9], fields[10])
        )
        position = end + -end % _ALIGNMENT
