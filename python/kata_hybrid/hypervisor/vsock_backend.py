"""Our own vhost-user-vsock back end as :mod:`.qemu` wants it: a factory on the I/O thread."""

from kata_hybrid._native import vsock
from kata_hybrid.aio.events import NativeEvents
from kata_hybrid.hypervisor.vsock import VsockBackend


class NativeVsockBackendFactory:
    """Starts ``_native.vsock.VhostUserVsock`` back ends on one I/O thread."""

    def __init__(self, io: vsock.IoThread, events: NativeEvents) -> None:
        """Serve on ``io``; the end of a back end is reported through ``events``."""
        self._io = io
        self._events = events

    def __call__(self, *, socket_path: str, hybrid_path: str, guest_cid: int) -> VsockBackend:
        """Listen on both paths; return when QEMU may connect.

        Raises:
            OSError: a path cannot be bound.
        """
        # Nobody waits for the end: without its back end the agent's connection ends, and that is
        # what the sandbox acts on.
        closed_token, _closed = self._events.expect()
        return vsock.VhostUserVsock(
            self._io,
            socket_path=socket_path,
            hybrid_path=hybrid_path,
            guest_cid=guest_cid,
            closed_token=closed_token,
        )
