"""Where a sandbox's shim listens and keeps its files, the same for every action.

    <root>/sb/<key>/shim.sock     root: $KATA_HYBRID_RUN_DIR or /run/kata-hybrid
                                  key: 16 hex digits of SHA-256("<containerd>/<namespace>/<group>")

Every file of ``start`` in that folder:

    shim.sock     the task service
    shim.pid      "<pid> <start ticks>" of the server
    speaks        "<version> <protocol>" as announced when it was started
    options.pb    the runtime options (a serialized Any), if there were any
"""

# ruff: noqa: PLC0415 - imports wait until they are needed: start-up time is this folder's subject

import posix

from kata_hybrid.shim.failure import ShimError

DEFAULT_ROOT = "/run/kata-hybrid"
SOCKET = "shim.sock"
PID_FILE = "shim.pid"
SPEAKS_FILE = "speaks"
OPTIONS_FILE = "options.pb"
ADDRESS_FILE = "address"
SCHEME = "unix://"

ENV_ROOT = "KATA_HYBRID_RUN_DIR"
ENV_SANDBOX_DIR = "KATA_HYBRID_SANDBOX_DIR"
ENV_SANDBOX_ID = "KATA_HYBRID_SANDBOX_ID"
ENV_PROTOCOL = "KATA_HYBRID_PROTOCOL"

_MAX_SOCKET_PATH_BYTES = 106
_KEY_DIGITS = 16
_LONGEST_NAME = "vhost-user-vsock.sock_1025"
_MAX_FILE_BYTES = 16 << 20
_ENOENT = 2


def environment(name: str) -> str:
    """Return an environment variable, or an empty text."""
    return posix.environ.get(name.encode(), b"").decode("utf-8", "surrogateescape")


def sandboxes_dir() -> str:
    """Return the folder that holds every sandbox's folder.

    Raises:
        ShimError: the configured root is not absolute.
    """
    root = environment(ENV_ROOT) or DEFAULT_ROOT
    if not root.startswith("/"):
        raise ShimError(f"{ENV_ROOT} is {root!r}: it must be an absolute path")
    return root.rstrip("/") + "/sb"


def sandbox_dir(containerd_address: str, *, namespace: str, group: str) -> str:
    """Return the folder of one sandbox.

    Raises:
        ShimError: the root is so deep that a socket in it has no valid address.
    """
    key = _sha256_hex(f"{containerd_address}/{namespace}/{group}".encode())[:_KEY_DIGITS]
    folder = f"{sandboxes_dir()}/{key}"
    if len(f"{folder}/{_LONGEST_NAME}".encode()) > _MAX_SOCKET_PATH_BYTES:
        raise ShimError(
            f"{ENV_ROOT} is too long: sockets below {folder} would exceed "
            f"{_MAX_SOCKET_PATH_BYTES} bytes"
        )
    return folder


def is_listening(socket_path: str) -> bool:
    """Tell whether somebody accepts connections at a Unix socket."""
    import _socket

    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        # A full backlog means that somebody is there: do not wait for its turn.
        probe.settimeout(1.0)
        probe.connect(socket_path)
    except TimeoutError:
        return True
    except OSError:
        return False
    finally:
        probe.close()
    return True


def read_file(path: str) -> bytes | None:
    """Return a small file's content, ``None`` if there is no such file.

    Raises:
        OSError: it cannot be read.
        ShimError: it is absurdly large.
    """
    try:
        fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError as exc:
        if exc.errno == _ENOENT:
            return None
        raise
    try:
        return read_all(fd, what=path)
    finally:
        posix.close(fd)


def read_all(fd: int, *, what: str, limit: int = _MAX_FILE_BYTES) -> bytes:
    """Read to end of file.

    Raises:
        ShimError: there is more than ``limit``.
    """
    chunks = []
    size = 0
    while chunk := posix.read(fd, 1 << 16):
        size += len(chunk)
        if size > limit:
            raise ShimError(f"{what} is longer than {limit} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def write_file(path: str, data: bytes) -> None:
    """Replace a small file by rename, so that a reader sees all of it or the old one.

    ``persist/atomic.py`` does more and costs more; what is written here need not survive a crash
    of the machine.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    folder, _, name = path.rpartition("/")
    temporary = f"{folder or '.'}/.{name}.{posix.getpid()}"
    flags = posix.O_WRONLY | posix.O_CREAT | posix.O_TRUNC | posix.O_CLOEXEC
    fd = posix.open(temporary, flags, 0o600)
    try:
        try:
            while data:
                data = data[posix.write(fd, data) :]
        finally:
            posix.close(fd)
        posix.rename(temporary, path)
    except BaseException:
        posix.unlink(temporary)
        raise


def start_ticks(pid: int) -> int:
    """Return when a process started (field 22 of ``/proc/PID/stat``), 0 if it is gone.

    A zombie is gone: how soon somebody reaps it says nothing about it.
    """
    stat = read_file(f"/proc/{pid}/stat")
    fields = stat[stat.rindex(b")") + 2 :].split() if stat else [b"X"]
    return 0 if fields[0] in {b"Z", b"X"} else int(fields[19])


class SandboxLock:
    """Held while a sandbox folder is made or removed, so that neither meets the other half-way.

    A lock on the folder above: there is nothing to leave behind, and the kernel releases it with
    the process. Held for microseconds.
    """

    __slots__ = ("_fd",)

    def __init__(self) -> None:
        """Make the folder if need be and take the lock.

        Raises:
            OSError: the folder cannot be made or locked.
        """
        import fcntl

        folder = sandboxes_dir()
        make_dirs(folder)
        self._fd = posix.open(folder, posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        except BaseException:
            posix.close(self._fd)
            raise

    def release(self) -> None:
        """Give the lock back. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            posix.close(fd)


def make_dirs(path: str) -> None:
    """Make a folder, and those above it, with mode 0700.

    Raises:
        OSError: a name in the path is no folder, or may not be made.
    """
    try:
        posix.mkdir(path, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        make_dirs(path.rpartition("/")[0] or "/")
        try:
            posix.mkdir(path, 0o700)
        except FileExistsError:
            return


def _sha256_hex(data: bytes) -> str:
    # hashlib loads OpenSSL, which takes longer than the rest of ``start``.
    try:
        from _sha2 import sha256  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        try:
            from _sha256 import sha256  # type: ignore[import-not-found,no-redef,unused-ignore]
        except ImportError:
            from hashlib import sha256  # type: ignore[no-redef,unused-ignore]
    return str(sha256(data).hexdigest())
