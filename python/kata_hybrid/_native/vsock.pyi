"""Talking to the guest: dial, the agent's ttRPC client, stdio copies, a vhost-user vsock device.

Everything runs on one native I/O thread. Operations return at once; the result is an
:class:`~kata_hybrid._native.events.Event` bearing the token given. Each token yields exactly one
event. No method blocks for longer than handing a message to the thread.
"""

from typing import Literal, final

from kata_hybrid._native.events import EventPort

__all__ = ["AgentClient", "IoThread", "StdioCopy", "VhostUserVsock"]

@final
class IoThread:
    """The I/O thread (``vsock-io``) and everything it serves."""

    def __new__(cls, port: EventPort) -> IoThread:
        """Start the thread; its results go to ``port``.

        Raises:
            OSError: no thread or descriptor is to be had.
        """
    def dial(self, token: int, address: str, port: int, *, timeout_ms: int) -> None:
        """Connect to ``port`` of the guest, retrying with backoff until ``timeout_ms`` is over.

        ``address`` is ``vsock://CID``, ``hvsock:///unix/path`` (``CONNECT port`` handshake) or
        ``unix:///path`` (plain). The event's value is the connected descriptor (non-blocking),
        owned by the receiver; on failure the code is UNAVAILABLE (no retry would help),
        DEADLINE_EXCEEDED or CANCELLED and the message names the last cause.

        Raises:
            ValueError: the address has another form.
        """
    def relay(self, token: int, first_fd: int, second_fd: int) -> None:
        """Copy between two connected stream sockets, both ways, each until its end of file.

        Both are taken over, and closed when both directions have ended or one fails. The event's
        value is the byte count, both ways together; its code is UNAVAILABLE after a failure.

        Raises:
            OSError: a descriptor is not open; the first may have been taken.
        """
    def close(self) -> None:
        """Stop the thread: pending operations complete with CANCELLED, descriptors are closed.

        Their events are in the port when this returns. Operations begun later complete with
        CANCELLED at once. Repeating it is harmless.

        Raises:
            RuntimeError: the thread did not end within 5 s; it is left behind.
        """

@final
class AgentClient:
    """A ttRPC client on one connection; any number of requests in flight."""

    def __new__(cls, io: IoThread, fd: int, *, closed_token: int) -> AgentClient:
        """Take over ``fd``. When the connection ends, ``closed_token`` gets its event.

        Its code is CANCELLED after :meth:`close`, UNAVAILABLE when the guest ended it. Calls in
        flight complete first, with the same code.

        Raises:
            OSError: ``fd`` is not open.
        """
    def call(
        self, token: int, service: str, method: str, payload: bytes, *, timeout_ms: int
    ) -> None:
        """Send a unary request. ``timeout_ms`` 0 means no deadline.

        The event's value is the reply payload, or its code and message the status. The deadline
        is sent to the server and enforced here too. A payload above 4 MiB, or more than 16 MiB
        that the guest does not read, is RESOURCE_EXHAUSTED. A lost connection is UNAVAILABLE.
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
        DATA_LOSS. A process that is gone (NOT_FOUND) is the stream's end; any other failure of
        the guest ends the copy with its code, after what came before is written. ``fd`` is made
        non-blocking; a FIFO without reader is waited for.

        Raises:
            OSError: ``fd`` is not open.
            ValueError: ``stream`` is neither word; ``fd`` was not taken.
        """
    def copy_input(self, token: int, container_id: str, exec_id: str, fd: int) -> StdioCopy:
        """Copy ``fd`` to the stdin of a guest process until end of file, then close both.

        The event's value is the byte count that the process took. A process that is gone
        (NOT_FOUND) ends the copy without error.

        Raises:
            OSError: ``fd`` is not open.
        """
    def close(self) -> None:
        """Close the connection; pending calls complete with CANCELLED."""

@final
class StdioCopy:
    """A running copy. It runs on when this object is dropped."""

    def stop(self) -> None:
        """End the copy now: what is buffered is written if that does not block. Idempotent.

        The copy's event then has code CANCELLED, unless it had ended.
        """

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
