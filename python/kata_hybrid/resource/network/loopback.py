"""The loopback of a pod's network namespace, where programs of the pod would listen.

They listen in the guest, so on the host nobody does. One socket has every TCP connection to it
instead, whatever the port; its address says which. The kernel undoes this when the hook is closed,
so nothing is left of it when this process is killed.
"""

import contextlib
import os
import socket

from kata_hybrid._native import host
from kata_hybrid.persist import netns

_BACKLOG = 64


class Loopback:
    """A listening socket, and the hook by which it gets its connections."""

    def __init__(self, listener: socket.socket, hook_fd: int) -> None:
        """Own both."""
        self.listener = listener
        self._hook_fd = hook_fd

    def close(self) -> None:
        """Give the loopback back."""
        os.close(self._hook_fd)
        self.listener.close()


def catch_loopback(namespace_fd: int) -> Loopback:
    """Move the calling thread into a network namespace and catch its loopback.

    Raises:
        OSError: the namespace cannot be entered, or the kernel is older than 5.9.
    """
    netns.enter(namespace_fd)
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(_listen())
        hook_fd = host.catch_loopback(namespace_fd, listener.fileno())
        undo.pop_all()
    return Loopback(listener, hook_fd)


def _listen() -> socket.socket:
    """Listen where nobody comes by but through the hook: on a port that the kernel chooses."""
    with contextlib.ExitStack() as undo:
        try:
            listener = undo.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_STREAM))
            # Connections of IPv4 as well.
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        except OSError:
            # A host without IPv6.
            listener = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        listener.setblocking(False)  # noqa: FBT003 - the standard library's signature
        listener.listen(_BACKLOG)
        undo.pop_all()
    return listener
