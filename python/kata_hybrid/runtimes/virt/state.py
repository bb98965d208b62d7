"""The states of a sandbox; ``sandbox.py``, which alone changes them, draws how they follow."""

from enum import Enum
from typing import Final


class SandboxState(Enum):
    """Where the sandbox is in the drawing."""

    EMPTY = "empty"
    WAITING = "waiting for its start"
    BOOTING = "booting"
    READY = "ready"
    LOST = "lost"
    CLOSED = "closed"


NOT_BOOTED: Final = frozenset({SandboxState.EMPTY, SandboxState.WAITING})
"""Where the guest may still be booted."""
