"""Talking to the guest: dial, the agent's ttRPC client, stdio copies, a vhost-user vsock device.

Everything runs on one native I/O thread. Operations return at once; the result is an
:class:`~kata_hybrid._native.events.Event` bearing the token given. Each token yields exactly one
event. No method blocks for longer than handing a message to the thread.
"""

from typing import Literal, final

from .events import EventPort

@final
class IoThread:
    """The I/O thread (``vsock-io``) and everything it serves."""

    def __new__(cls, port: EventPort) -> IoThread: ...
    def dial(self, token: int, address: str, port: int, *, timeout_ms: int) -> None:
        """Connect to ``port`` of the guest, retrying with backoff until ``timeout_ms`` is over.

        ``address`` is ``vsock://CID``, ``hvsock:///unix/path`` (``CONNECT port`` handshake) or
        ``unix:///path`` (plain). The event's value is the connected descriptor, owned by the
        receiver; on failure the code is UNAVAILABLE, DEADLINE_EXCEEDED or INVALID_ARGUMENT and
        the message names the last cause.

        Raises:
            ValueError: the address has another form.
        """
    def close(self) -> None:
        """Stop the thread: pending operations complete with CANCELLED, descriptors are closed."""

@final
class AgentClient:
    """A ttRPC client on one connection; any number of requests in flight."""

    def __new__(cls, io: IoThread, fd: int, *, closed_token: int) -> AgentClient:
        """Take over ``fd``. When the connection ends, ``closed_token`` gets its event."""
    def call(
        self, token: int, service: str, method: str, payload: bytes, *, timeout_ms: int
    ) -> None:
        """Send a unary request. ``timeout_ms`` 0 means no deadline.

        The event's value is the reply payload, or its code and message the status. The deadline
        is sent to the server and enforced here too.
        """
    def copy_output(
        self,
        token: int,
        container_id: str,
        exec_id: str,
        stream: Literal["stdout", "stderr"],
        fd: int,
    ) -> StdioCopy:
        """Copy a stream of a guest process to ``fd`` until its end, then close ``fd``.

        The event comes when the last byte is written; its value is the byte count. A failed
        write does not stop the reading: the rest is drained and dropped, and the event has code
        DATA_LOSS.
        """
    def copy_input(self, token: int, container_id: str, exec_id: str, fd: int) -> StdioCopy:
        """Copy ``fd`` to the stdin of a guest process until end of file, then close both.

        The event's value is the byte count.
        """
    def close(self) -> None:
        """Close the connection; pending calls complete with CANCELLED."""

@final
class StdioCopy:
    """A running copy."""

    def stop(self) -> None:
        """End the copy now: what is buffered is written if that does not block. Idempotent."""

@final
class VhostUserVsock:
    """A virtio-vsock device for another process's machine (vhost-user back end).

    Serves the hybrid Unix socket protocol on ``hybrid_path``; guest-initiated connections to
    port P go to ``hybrid_path`` + ``_P``.
    """

    def __new__(
        cls,
        io: IoThread,
        *,
        socket_path: str,
        hybrid_path: str,
        guest_cid: int,
        closed_token: int,
    ) -> VhostUserVsock:
        """Listen on both paths (created, mode 0600).

        ``closed_token`` gets its event when the machine disconnects or breaks the protocol.

        Raises:
            OSError: a path cannot be bound.
        """
    def close(self) -> None:
        """Stop serving and unlink both paths. Idempotent."""
