"""The exception tree: one class per way to fail, each with the google.rpc code containerd acts on.

The catchable axis is the code (containerd's errdefs table); the domain is the subclass. Only
``ttrpc/status.py`` turns an exception into a status, and only it reads ``code``.

    KataError                         UNKNOWN 2        (raised by nobody directly)
    ├─ InvalidArgumentError           3    InvalidSpecError · InvalidConfigError · InvalidIdError
    ├─ DeadlineExceededError          4    GuestBootTimeoutError · AgentTimeoutError
    ├─ NotFoundError                  5    SandboxNotFoundError · ContainerNotFoundError ·
    │                                      ProcessNotFoundError
    ├─ AlreadyExistsError             6    ContainerExistsError · ExecExistsError
    ├─ PermissionDeniedError          7    KvmAccessError
    ├─ ResourceExhaustedError         8
    ├─ FailedPreconditionError        9    InvalidStateError
    ├─ AbortedError                  10
    ├─ UnimplementedError            12
    ├─ InternalError                 13    VmmError · AgentProtocolError
    └─ UnavailableError              14    AgentUnavailableError · VmExitedError
"""

from typing import ClassVar


class KataError(Exception):
    """Root of every error this package raises on purpose."""

    code: ClassVar[int] = 2


class InvalidArgumentError(KataError):
    """The caller sent something that can never work."""

    code = 3


class InvalidSpecError(InvalidArgumentError):
    """The OCI spec is malformed; the text names the field."""


class InvalidConfigError(InvalidArgumentError):
    """The configuration file is malformed; the text names the file and the key."""


class InvalidIdError(InvalidArgumentError):
    """A container, sandbox or exec id has a forbidden character or length."""


class DeadlineExceededError(KataError):
    """Something did not answer in the time it was given."""

    code = 4


class GuestBootTimeoutError(DeadlineExceededError):
    """The guest did not come up in time."""


class AgentTimeoutError(DeadlineExceededError):
    """The guest agent did not answer a request in time."""


class NotFoundError(KataError):
    """The named thing does not exist."""

    code = 5


class SandboxNotFoundError(NotFoundError):
    """No sandbox of that id."""


class ContainerNotFoundError(NotFoundError):
    """No container of that id in this sandbox."""


class ProcessNotFoundError(NotFoundError):
    """No such exec, or the process has already finished."""


class AlreadyExistsError(KataError):
    """The named thing exists already."""

    code = 6


class ContainerExistsError(AlreadyExistsError):
    """A container of that id is in this sandbox already."""


class ExecExistsError(AlreadyExistsError):
    """An exec of that id is in this container already."""


class PermissionDeniedError(KataError):
    """The host or the guest refused."""

    code = 7


class KvmAccessError(PermissionDeniedError):
    """KVM cannot be used: ``/dev/kvm`` is absent, forbidden, or runs no kernel."""


class ResourceExhaustedError(KataError):
    """Out of memory, slots, descriptors or message size."""

    code = 8


class FailedPreconditionError(KataError):
    """The request is valid but not now."""

    code = 9


class InvalidStateError(FailedPreconditionError):
    """The request does not fit the present state; holds both."""

    def __init__(self, subject: str, *, state: str, request: str) -> None:
        """Say that ``subject`` is in ``state`` and ``request`` was asked of it."""
        super().__init__(f"cannot {request} {subject} in state {state}")
        self.subject = subject
        self.state = state
        self.request = request


class AbortedError(KataError):
    """Lost a race with another request; safe to retry."""

    code = 10


class UnimplementedError(KataError):
    """Not built yet; the README lists what."""

    code = 12


class InternalError(KataError):
    """Our bug; the log entry has the trace."""

    code = 13


class VmmError(InternalError):
    """The machine monitor failed; holds the operation that did."""

    def __init__(self, operation: str, message: str) -> None:
        """Say that ``operation`` failed and why."""
        super().__init__(f"{operation}: {message}")
        self.operation = operation


class AgentProtocolError(InternalError):
    """The guest broke the agent protocol."""


class UnavailableError(KataError):
    """The other side is gone."""

    code = 14


class AgentUnavailableError(UnavailableError):
    """The connection to the guest agent is closed."""


class VmExitedError(UnavailableError):
    """The virtual machine is gone; the text holds the exit reason."""


_CLASS_BY_CODE = {error.code: error for error in KataError.__subclasses__()}


def error_from_code(code: int, message: str) -> KataError:
    """Return the error that stands for a google.rpc status code, as another side reported it."""
    return _CLASS_BY_CODE.get(code, KataError)(message)
