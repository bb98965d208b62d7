"""The mount table: what is mounted on or below a folder, and how to detach it.

Used before anything is removed recursively: a bind mount may be of the same file system as the
folder it lies in, so that nothing but the mount table tells it apart, and what is below it is
somebody's data. Imports only what the interpreter has built in, for ``delete``'s sake.
"""

# ruff: noqa: PLC0415 - ctypes is imported only when something is mounted

import posix

# linux/fs.h, linux/mount.h
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_ENOENT = 2
_EINVAL = 22
_CHUNK_BYTES = 1 << 16


class Mount:
    """One line of the table (proc_pid_mountinfo(5)); names as ``os.fsdecode`` gives them."""

    __slots__ = ("kind", "options", "point", "root")

    def __init__(self, line: bytes) -> None:
        """Read a line; nothing but blanks and line feeds separates, whatever is in the names."""
        before, _, after = line.partition(b" - ")
        fields = before.split(b" ", 5)
        self.root = _plain(fields[3])
        """The part of the file system that is mounted."""
        self.point = _plain(fields[4])
        # After the dash: type, source, options of the file system; a source may be empty.
        kind, *_, options = after.split(b" ")
        self.kind = kind.decode()
        self.options = options.decode("utf-8", "surrogateescape").split(",")


def mount_table() -> list[Mount]:
    """Return what is mounted in this mount namespace, in the order it was.

    Raises:
        OSError: the table cannot be read.
    """
    return [Mount(line) for line in _read_table().split(b"\n") if line]


def mounts_below(path: str) -> list[str]:
    """Return the mount points at and below a folder, in the order they were mounted.

    Raises:
        OSError: the folder or the mount table cannot be read.
    """
    try:
        real = _real_path(path)
    except FileNotFoundError:
        return []
    points = [mount.point for mount in mount_table()]
    return [point for point in points if point == real or point.startswith(real + "/")]


def file_system_at(path: str) -> tuple[str, list[str]] | None:
    """Return type and options of the file system that is mounted on a path; None: none is.

    Raises:
        OSError: the mount table cannot be read.
    """
    found = None
    for mount in mount_table():
        # The last mount on a point is the one that is seen.
        if mount.point == path:
            found = mount.kind, mount.options
    return found


def unmount_below(path: str) -> list[str]:
    """Detach every mount at or below a folder in this mount namespace.

    Returns:
        What could not be detached, one text for each.
    """
    problems = []
    # The last mounted is the uppermost and must go first.
    for point in reversed(mounts_below(path)):
        try:
            unmount(point)
        except OSError as exc:
            problems.append(f"unmount {point}: {exc.strerror}")
    return problems


def unmount(path: str) -> None:
    """Detach one mount; a path that is no mount point, or is gone, is no error.

    Raises:
        OSError: the kernel refused; the file name is the path.
    """
    # Not the extension's call: this must work with a broken or half-removed installation too.
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(path.encode("utf-8", "surrogateescape"), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
        error = ctypes.get_errno()
        if error not in {_ENOENT, _EINVAL}:
            raise OSError(error, posix.strerror(error), path)


def _real_path(folder: str) -> str:
    """Return the path as the mount table has it, links resolved."""
    fd = posix.open(folder, posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
    try:
        return posix.readlink(f"/proc/self/fd/{fd}")
    finally:
        posix.close(fd)


def _read_table() -> bytes:
    fd = posix.open("/proc/self/mountinfo", posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        chunks = []
        while chunk := posix.read(fd, _CHUNK_BYTES):
            chunks.append(chunk)
        return b"".join(chunks)
    finally:
        posix.close(fd)


def _plain(text: bytes) -> str:
    r"""Undo a name's octal escapes: blank, tab, newline, backslash."""
    for code, plain in ((b"040", b" "), (b"011", b"\t"), (b"012", b"\n"), (b"134", b"\\")):
        text = text.replace(b"\\" + code, plain)
    return text.decode("utf-8", "surrogateescape")
