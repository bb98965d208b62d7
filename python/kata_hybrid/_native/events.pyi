"""The event port: how native threads tell Python that something is done, without attaching."""

from typing import final

__all__ = ["Event", "EventPort"]

@final
class Event:
    """One completion, or a line for a log. Frozen."""

    @property
    def token(self) -> int:
        """The number Python gave the operation; 0 when a part of the I/O thread died (a bug).

        A token that Python gave for a log comes with each of its lines.
        """
    @property
    def code(self) -> int:
        """google.rpc status code; 0 is success."""
    @property
    def message(self) -> str:
        """Error text, empty on success; the line of a log."""
    @property
    def value(self) -> int | bytes | None:
        """The result: reply payload, a file descriptor the receiver now owns, a byte count.

        Stdio copies report their count on failure too.
        """

@final
class EventPort:
    """A queue of events and an eventfd that is readable while the queue is not empty.

    At most 64 MiB of reply payloads wait here; a reply past that arrives without its payload,
    with code RESOURCE_EXHAUSTED. No completion is ever dropped. Lines of logs are, past 256: the
    last event of such a token has code RESOURCE_EXHAUSTED then, and their number as its value.
    """

    def __new__(cls) -> EventPort:
        """Make an empty port.

        Raises:
            OSError: no descriptor is left.
        """
    def fileno(self) -> int:
        """The eventfd (non-blocking). Owned by the port: do not close it."""
    def drain(self) -> list[Event]:
        """Take every queued event, in order, and reset the eventfd."""
