"""The event port: how native threads tell Python that something is done, without attaching."""

from typing import final

@final
class Event:
    """One completion. Frozen."""

    @property
    def token(self) -> int:
        """The number Python gave the operation."""
    @property
    def code(self) -> int:
        """google.rpc status code; 0 is success."""
    @property
    def message(self) -> str:
        """Error text, empty on success."""
    @property
    def value(self) -> int | bytes | None:
        """The result: reply payload, a file descriptor the receiver now owns, a byte count."""

@final
class EventPort:
    """A queue of events and an eventfd that is readable while the queue is not empty."""

    def __new__(cls) -> EventPort: ...
    def fileno(self) -> int:
        """The eventfd (non-blocking). Owned by the port: do not close it."""
    def drain(self) -> list[Event]:
        """Take every queued event, in order, and reset the eventfd."""
