"""Child processes of the shim, and the one reaper.

The serving shim is a child subreaper, so orphans of its helpers become its children. One handler
for SIGCHLD calls ``waitpid(-1)`` until nothing is left: exits of processes spawned here resolve
their futures, adopted orphans are just reaped. Nothing else in the process may wait for children.

Children start through vfork (``subprocess`` does so without ``preexec_fn``) in their own session,
and by default die with the shim: ``setpriv`` sets the parent-death signal and execs the program.
Event loop thread only, which must be the main thread: the signal follows the spawning thread.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol, TypeVar

from kata_hybrid.types import ProcessIdentity

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


class Outside(Protocol):
    """Calls a function on another thread of this process, and waits."""

    def __call__(self, function: Callable[[], _T]) -> _T:
        """Return what it returns, raise what it raises."""


_DIE_WITH_PARENT: Final = ("setpriv", "--pdeathsig", "KILL", "--")


class Process:
    """A child spawned by :class:`ProcessReaper`."""

    def __init__(self, identity: ProcessIdentity, *, exited: asyncio.Future[int]) -> None:
        """Stand for a child whose exit resolves ``exited``."""
        self._identity = identity
        self._exited = exited

    @property
    def pid(self) -> int:
        """Its pid; once it has exited the number may be another process's."""
        return self._identity.pid

    @property
    def identity(self) -> ProcessIdentity:
        """What tells it from a later process of the same pid."""
        return self._identity

    @property
    def has_exited(self) -> bool:
        """It has ended and been reaped."""
        return self._exited.done()

    async def exited(self) -> int:
        """Wait for its end.

        Returns:
            The exit status, or minus the signal that killed it.
        """
        return await asyncio.shield(self._exited)

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal; nothing happens when it has ended.

        Raises:
            PermissionError: it changed its credentials.
        """
        if not self._exited.done():
            # Not reaped yet, so the pid is still its own, be it only a zombie.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal_number)


class ProcessReaper:
    """Spawns children and collects every exit."""

    def __init__(self) -> None:
        """Handle SIGCHLD on the running loop, which must belong to the main thread."""
        self._loop = asyncio.get_running_loop()
        self._waiters: dict[int, tuple[subprocess.Popen[bytes] | None, asyncio.Future[int]]] = {}
        self._outside: Outside = _here
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap)

    def spawn_from(self, outside: Outside) -> None:
        """Start every child from now on from a thread: what it inherits is that thread's.

        The thread must last as long as the process: children die with it.
        """
        self._outside = outside

    async def spawn(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        name: str = "",
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        stderr: int = subprocess.DEVNULL,
        pass_fds: Sequence[int] = (),
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        dies_with_parent: bool = True,
    ) -> Process:
        """Start a program with the given descriptors as its standard streams.

        The caller keeps (and closes) its descriptors. ``pass_fds`` keep their numbers. ``name``
        is for the record on disk; by default the program's.

        Raises:
            FileNotFoundError: the program, or ``cwd``, is not there.
            OSError: it could not be started.
        """
        words = [os.fspath(word) for word in argv]
        search = None if env is None else env.get("PATH", os.defpath)
        program = shutil.which(words[0], path=search)
        if program is None:
            raise FileNotFoundError(2, os.strerror(2), words[0])
        words[0] = program
        if dies_with_parent:
            words = [*_DIE_WITH_PARENT, *words]
        # Returns once the child has exec'ed: microseconds to a few milliseconds.
        child = self._outside(
            lambda: subprocess.Popen(
                words,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=pass_fds,
                cwd=cwd,
                env=env,
                start_new_session=True,
            )
        )
        return self._adopt(name or Path(program).name, child.pid, popen=child)

    async def spawn_mapped(
        self,
        argv: Sequence[str],
        *,
        name: str,
        env: Mapping[str, str],
        fds: Mapping[int, int],
        program: str = "",
    ) -> Process:
        """Start a program whose descriptors are exactly ``fds`` (theirs: ours) and /dev/null.

        It is left to end by itself when this process dies. The caller keeps its descriptors.
        ``program`` is its path, if that is not the first of ``argv``.

        Raises:
            OSError: it could not be started.
        """
        with contextlib.ExitStack() as copies:
            # Copies above every target, so that no target is overwritten before it is copied.
            actions: list[tuple[object, ...]] = [
                (os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)
            ]
            for theirs, ours in fds.items():
                copy = fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, max(fds) + 1)
                copies.callback(os.close, copy)
                actions.append((os.POSIX_SPAWN_DUP2, copy, theirs))
            actions += [
                (os.POSIX_SPAWN_CLOSE, number)
                for number in _inheritable_descriptors()
                if number > 2 and number not in fds  # noqa: PLR2004 - past standard error
            ]
            pid = self._outside(
                lambda: os.posix_spawn(
                    program or argv[0],
                    list(argv),
                    dict(env),
                    file_actions=actions,
                    setsid=True,
                    # What this process ignores is no business of the program's.
                    setsigdef=(signal.SIGPIPE, signal.SIGHUP),
                )
            )
        return self._adopt(name, pid, popen=None)

    def _adopt(self, name: str, pid: int, *, popen: subprocess.Popen[bytes] | None) -> Process:
        # No await since it was started, so the reaper has not run: /proc/PID is there.
        exited: asyncio.Future[int] = self._loop.create_future()
        self._waiters[pid] = (popen, exited)
        return Process(identify(name, pid), exited=exited)

    def close(self) -> None:
        """Stop reaping. Processes still running are left alone; nobody may wait for them."""
        self._loop.remove_signal_handler(signal.SIGCHLD)
        for child, exited in self._waiters.values():
            if child is not None:
                child.returncode = 0  # Popen's finalizer must not look for it.
            exited.cancel()
        self._waiters.clear()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            waiter = self._waiters.pop(pid, None)
            if waiter is None:
                _LOG.debug("reaped an orphan", extra={"pid": pid, "status": status})
                continue
            child, exited = waiter
            code = os.waitstatus_to_exitcode(status)
            if child is not None:
                child.returncode = code
            if not exited.done():
                exited.set_result(code)


def _here(function: Callable[[], _T]) -> _T:
    return function()


def _inheritable_descriptors() -> list[int]:
    """Return what a child would keep: our standard streams and what we were ourselves left with."""
    numbers = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are what is asked for
        with contextlib.suppress(OSError):  # the listing's own is closed by now
            if os.get_inheritable(int(name)):
                numbers.append(int(name))
    return numbers


def identify(name: str, pid: int) -> ProcessIdentity:
    """Identify a live process (or a zombie not yet reaped).

    Raises:
        FileNotFoundError: no such process.
    """
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    # The command name in field 2 may hold anything: count from its last parenthesis.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return ProcessIdentity(name=name, pid=pid, start_ticks=int(fields[19]))
