"""A network namespace of this process's own, for a sandbox that is given none.

The pid that clients get for a task is this process's then: they find the namespace by it
(``/proc/PID/ns/net``) and put links there. Only the main thread moves, and children are started
outside: what they do on a network (a logger, a hook) is the host's.
"""

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from kata_hybrid.errors import FailedPreconditionError
from kata_hybrid.persist import netns

_HERE = "/proc/thread-self/ns/net"
# linux/sockios.h, linux/if.h
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_REQUEST = struct.Struct("16sH14x")


class OwnNamespace:
    """The namespace, and the way out of it. Lasts as long as the process."""

    def __init__(self) -> None:
        """Make it and move the calling thread, the main one, into it; its loopback is up.

        Raises:
            FailedPreconditionError: the host does not let us.
        """
        self.path = Path(f"/proc/{os.getpid()}/ns/net")
        try:
            self._outside = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
            netns.enter_new()
            self._inside = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
            _set_loopback_up()
        except OSError as exc:
            message = f"make a network namespace for the sandbox: {exc.strerror}"
            raise FailedPreconditionError(message) from exc

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Be where this process was before, for as long as nothing else runs."""
        netns.enter(self._outside)
        try:
            yield
        finally:
            netns.enter(self._inside)


def _set_loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        answer = fcntl.ioctl(control, _SIOCGIFFLAGS, _REQUEST.pack(b"lo", 0))
        flags = _REQUEST.unpack(answer)[1] | _IFF_UP
        fcntl.ioctl(control, _SIOCSIFFLAGS, _REQUEST.pack(b"lo", flags))
