"""What a log record belongs to: sandbox, container, exec and request, by context variable.

Set once where a request or task begins; asyncio copies the context into every task started from
there, so nothing below needs to pass ids along for the log's sake.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Final

_SANDBOX: Final = ContextVar("sandbox", default="")
_CONTAINER: Final = ContextVar("container", default="")
_EXEC: Final = ContextVar("exec", default="")
_REQUEST: Final = ContextVar("request", default="")
_ALL: Final = (_SANDBOX, _CONTAINER, _EXEC, _REQUEST)


def current_fields() -> dict[str, str]:
    """Return the ids in force, without the empty ones."""
    return {variable.name: value for variable in _ALL if (value := variable.get())}


def set_sandbox(sandbox_id: str) -> None:
    """Name the sandbox for the rest of this context: a shim serves only one."""
    _SANDBOX.set(sandbox_id)


@contextlib.contextmanager
def log_context(*, container: str = "", exec_id: str = "", request: str = "") -> Iterator[None]:
    """Add ids to every record logged inside; an empty one leaves what is in force."""
    values = ((_CONTAINER, container), (_EXEC, exec_id), (_REQUEST, request))
    tokens = [(variable, variable.set(value)) for variable, value in values if value]
    try:
        yield
    finally:
        for variable, token in reversed(tokens):
            variable.reset(token)
