"""A network namespace of this process's own, for a sandbox that is given none.

The pid that clients get for a task is this process's then: they find the namespace by it
(``/proc/PID/ns/net``, which is the main thread's) and put links there. So the main thread moves and
never leaves again; one thread stays behind and starts the children: what those do on a network (a
logger, a hook) is the host's.
"""

import fcntl
import os
import socket
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from kata_hybrid.errors import FailedPreconditionError
from kata_hybrid.persist import netns

_HERE = "/proc/thread-self/ns/net"
# linux/sockios.h, linux/if.h
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_REQUEST = struct.Struct("16sH14x")
_T = TypeVar("_T")


class OwnNamespace:
    """The namespace, and the thread that is not in it. Lasts as long as the process."""

    def __init__(self) -> None:
        """Make it and move the calling thread, the main one, into it; its loopback is up.

        Raises:
            FailedPreconditionError: the host does not let us; the thread is where it was.
        """
        self.path = Path(f"/proc/{os.getpid()}/ns/net")
        self._behind = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outside")
        # A thread begins where its maker is: this one, before anything has moved.
        self.outside(os.getpid)
        try:
            before = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _enter_new(before)
            finally:
                os.close(before)
        except OSError as exc:
            self._behind.shutdown()
            message = f"make a network namespace for the sandbox: {exc.strerror}"
            raise FailedPreconditionError(message) from exc

    def outside(self, function: Callable[[], _T]) -> _T:
        """Call a function where this process was before, and wait for it."""
        return self._behind.submit(function).result()


def _enter_new(before: int) -> None:
    netns.enter_new()
    try:
        _set_loopback_up()
    except OSError:
        netns.enter(before)
        raise


def _set_loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        answer = fcntl.ioctl(control, _SIOCGIFFLAGS, _REQUEST.pack(b"lo", 0))
        flags = _REQUEST.unpack(answer)[1] | _IFF_UP
        fcntl.ioctl(control, _SIOCSIFFLAGS, _REQUEST.pack(b"lo", flags))
