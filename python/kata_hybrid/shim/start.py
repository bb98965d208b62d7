"""The ``start`` action: find the sandbox's shim or leave one running, and print its address.

    read stdin ─▶ find the group ─┬─ its shim answers ─────────▶ write address, print, done
                                  └─ make the folder, listen,
                                     spawn the server (fd 3) ──▶ write address, print, done

The socket listens before the server has even loaded, so containerd's first call just waits for
it. Everything done is undone when a later step fails. Nothing is written to standard error unless
the action fails: containerd takes both streams together for the address.
"""

# ruff: noqa: PLC0415 - imports wait until they are needed: start-up time is this folder's subject

import posix
import sys

from kata_hybrid.shim import address, bootstrap
from kata_hybrid.shim.failure import ShimError
from kata_hybrid.shim.group import find_group

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket

    from kata_hybrid.shim.args import Arguments
    from kata_hybrid.shim.group import Group

LISTEN_FD = 3
"""Where the server finds its listening socket, or in gRPC mode the pipe that says it listens."""
GRPC_READY = b"+"
_BACKLOG = 128
_EADDRINUSE = 98
_MAX_OOM_SCORE = 1000
_GRPC_START_TIMEOUT_S = 20.0
_DEBUG_LEVEL = -4


def start(arguments: "Arguments") -> bytes:
    """Run the action in the bundle, which is the present directory.

    Returns:
        What to print.

    Raises:
        ShimError: it cannot be done; the text says why.
        OSError: the system refused a step.
    """
    arguments.require_identity()
    data = address.read_all(0, what="standard input", limit=bootstrap.MAX_STDIN_BYTES)
    given = bootstrap.decode_start_input(
        data, instance_id=arguments.id, namespace=arguments.namespace
    )
    group = find_group(".", container_id=arguments.id)
    folder = address.sandbox_dir(arguments.address, namespace=arguments.namespace, group=group.id)
    starter = Starter(arguments, given=given, group=group, folder=folder)
    return starter.run()


class Starter:
    """One run of the action."""

    __slots__ = ("_arguments", "_folder", "_given", "_group", "_protocol", "_socket_path")

    def __init__(
        self,
        arguments: "Arguments",
        *,
        given: bootstrap.StartInput,
        group: "Group",
        folder: str,
    ) -> None:
        """Start, or find, the shim of ``group`` in ``folder``."""
        self._arguments = arguments
        self._given = given
        self._group = group
        self._folder = folder
        self._socket_path = f"{folder}/{address.SOCKET}"
        self._protocol = given.protocol or address.environment(address.ENV_PROTOCOL) or "ttrpc"

    def run(self) -> bytes:
        """Return the text to print.

        Raises:
            ShimError: it cannot be done.
            OSError: the system refused a step.
        """
        if self._protocol not in {"ttrpc", "grpc"}:
            raise ShimError(f"protocol {self._protocol!r} is neither ttrpc nor grpc")
        if self._group.is_member:
            if not address.is_listening(self._socket_path):
                raise ShimError(
                    f"sandbox {self._group.id} of container {self._arguments.id} is not running"
                )
            return self._announce(self._recorded())
        lock = address.SandboxLock()
        try:
            listener = self._listen()
            if listener is None:
                return self._announce(self._recorded())
            speaks = self._choose()
            self._protocol = speaks[1]
            pid = 0
            try:
                address.write_file(
                    f"{self._folder}/{address.SPEAKS_FILE}", f"{speaks[0]} {speaks[1]}".encode()
                )
                if self._given.options:
                    address.write_file(
                        f"{self._folder}/{address.OPTIONS_FILE}", self._given.options
                    )
                is_grpc = speaks[1] == "grpc"
                pid = self._spawn_grpc() if is_grpc else self._spawn(listener.fileno())
                address.write_file(
                    f"{self._folder}/{address.PID_FILE}",
                    f"{pid} {address.start_ticks(pid)}".encode(),
                )
                _adjust_oom_score(pid)
                return self._announce(speaks)
            except BaseException:
                self._undo(pid)
                raise
            finally:
                listener.close()
        finally:
            lock.release()

    def _listen(self) -> "_socket.socket | None":
        """Return a listening socket, or nothing if the sandbox's shim has one."""
        import _socket

        address.make_dirs(self._folder)
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        mask = posix.umask(0o177)
        try:
            try:
                listener.bind(self._socket_path)
            except OSError as exc:
                if exc.errno != _EADDRINUSE:
                    raise
                if address.is_listening(self._socket_path):
                    listener.close()
                    return None
                self._clear_stale()
                listener.bind(self._socket_path)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        finally:
            posix.umask(mask)
        return listener

    def _clear_stale(self) -> None:
        """Release what a shim that died left in the folder, then make it anew."""
        # The same as ``delete`` does; rare, so its imports do not matter.
        from kata_hybrid.shim.delete import clean_up_sandbox

        clean_up_sandbox(self._folder)
        address.make_dirs(self._folder)

    def _choose(self) -> tuple[int, str]:
        """Return the version and protocol of a new server."""
        if self._protocol == "grpc":
            if self._given.takes_bootstrap_result:
                return 3, "grpc"
            daemon = _daemon_version(self._arguments.publish_binary)
            if daemon >= (2, 0):
                return 3, "grpc"
            if daemon >= (1, 7):
                return 2, "grpc"
        return (3 if self._given.takes_bootstrap_result else 2), "ttrpc"

    def _recorded(self) -> tuple[int, str]:
        """Return what the running server spoke when it was started, perhaps by an older shim."""
        words = (address.read_file(f"{self._folder}/{address.SPEAKS_FILE}") or b"").split()
        try:
            return int(words[0]), words[1].decode("ascii")
        except (IndexError, ValueError):
            return 2, "ttrpc"

    def _announce(self, speaks: tuple[int, str]) -> bytes:
        """Write the bundle's ``address`` file and return the same for standard output."""
        version, protocol = speaks
        text = address.SCHEME + self._socket_path
        if protocol == "grpc":
            # gRPC clients dial a bare path; only JSON or BootstrapResult can name the protocol.
            text = f'{{"version":{version},"address":"{self._socket_path}","protocol":"grpc"}}'
        address.write_file(address.ADDRESS_FILE, text.encode())
        if version > 2 and self._given.takes_bootstrap_result:  # noqa: PLR2004 - Task v3
            dialled = self._socket_path if protocol == "grpc" else text
            return bootstrap.encode_bootstrap_result(version, address=dialled, protocol=protocol)
        return text.encode()

    def _spawn(self, inherited_fd: int) -> int:
        """Start the server, detached, with ``inherited_fd`` as its fd 3."""
        arguments = self._arguments
        words = [sys.executable, "-I", f"{__file__.rpartition('/')[0]}/__main__.py"]
        words += ["-namespace", arguments.namespace, "-id", arguments.id]
        words += ["-address", arguments.address]
        if arguments.publish_binary:
            words += ["-publish-binary", arguments.publish_binary]
        if arguments.is_debug or (self._given.has_params and self._given.log_level <= _DEBUG_LEVEL):
            words.append("-debug")
        # For the server's log: this action may not say anything.
        words += arguments.unknown
        variables = dict(posix.environ)
        variables[address.ENV_SANDBOX_DIR.encode()] = self._folder.encode()
        variables[address.ENV_SANDBOX_ID.encode()] = self._group.id.encode()
        variables[address.ENV_PROTOCOL.encode()] = self._protocol.encode()
        if self._given.ttrpc_address:
            variables.setdefault(b"TTRPC_ADDRESS", self._given.ttrpc_address.encode())
        if inherited_fd == LISTEN_FD:
            posix.set_inheritable(inherited_fd, True)  # noqa: FBT003 - positional only
        actions = [
            (posix.POSIX_SPAWN_OPEN, 0, "/dev/null", posix.O_RDWR, 0),
            (posix.POSIX_SPAWN_DUP2, 0, 1),
            (posix.POSIX_SPAWN_DUP2, 0, 2),
            (posix.POSIX_SPAWN_DUP2, inherited_fd, LISTEN_FD),
        ]
        return posix.posix_spawn(words[0], words, variables, file_actions=actions, setsid=True)

    def _spawn_grpc(self) -> int:
        """Start a server that binds the socket itself, and wait until it has.

        gRPC cannot take over a listening socket.
        """
        import select

        posix.unlink(self._socket_path)
        readable, writable = posix.pipe()
        try:
            try:
                pid = self._spawn(writable)
            finally:
                posix.close(writable)
            poll = select.poll()
            poll.register(readable, select.POLLIN)
            is_ready = poll.poll(_GRPC_START_TIMEOUT_S * 1000)
            if not is_ready or posix.read(readable, 1) != GRPC_READY:
                _kill(pid)
                raise ShimError("the server did not begin to serve gRPC; its log says why")
        finally:
            posix.close(readable)
        return pid

    def _undo(self, pid: int) -> None:
        """Leave nothing of a failed start."""
        if pid:
            _kill(pid)
        for name in posix.listdir(self._folder):
            posix.unlink(f"{self._folder}/{name}")
        posix.rmdir(self._folder)


def _adjust_oom_score(pid: int) -> None:
    """Make the kernel take the shim before containerd, whose child ``start`` is."""
    try:
        score = int(address.read_file(f"/proc/{posix.getppid()}/oom_score_adj") or b"0")
        score = min(score + 1, _MAX_OOM_SCORE)
        fd = posix.open(f"/proc/{pid}/oom_score_adj", posix.O_WRONLY | posix.O_CLOEXEC)
        try:
            posix.write(fd, str(score).encode())
        finally:
            posix.close(fd)
    except OSError:
        pass  # Not allowed to lower it: the inherited score is containerd's own.


def _daemon_version(binary: str) -> tuple[int, int]:
    """Ask containerd for its version, zeros if it does not tell within five seconds."""
    import subprocess

    try:
        done = subprocess.run([binary, "--version"], capture_output=True, timeout=5, check=False)
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0, 0
    for word in done.stdout.decode("utf-8", "replace").split():
        version = bootstrap.parse_version(word)
        if version != (0, 0):
            return version
    return 0, 0


def _kill(pid: int) -> None:
    """Kill our own child, which nobody else can have reaped."""
    posix.kill(pid, 9)
    posix.waitpid(pid, 0)
