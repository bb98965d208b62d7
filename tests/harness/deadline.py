"""The one place that waits for something the kernel sends no event for.

Prefer an event: a ``pidfd``, a line from ``ctr events``, a readable socket. What is left (a path
of ``/proc`` or of a mount table that has to vanish) is looked at again every few milliseconds,
always with a deadline. Called from the test thread.
"""

import os
import select
import threading
import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


class DeadlineError(AssertionError):
    """Something did not come about in time; the text says what, and what was seen last."""


def wait_until(
    observe: Callable[[], _T], *, what: str, timeout_s: float = 10.0, interval_s: float = 0.01
) -> _T:
    """Return the first true value of ``observe``.

    Raises:
        DeadlineError: it stayed false for ``timeout_s``.
    """
    pause = threading.Event()
    deadline = time.monotonic() + timeout_s
    while True:
        seen = observe()
        if seen:
            return seen
        if time.monotonic() >= deadline:
            msg = f"{what}: not within {timeout_s:g} s; last seen: {seen!r}"
            raise DeadlineError(msg)
        pause.wait(interval_s)


def wait_gone(pid: int, *, timeout_s: float = 10.0) -> None:
    """Wait for a process, not necessarily a child, to be gone.

    Raises:
        DeadlineError: it lives on.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ready, _, _ = select.select([descriptor], [], [], timeout_s)
    finally:
        os.close(descriptor)
    if not ready:
        msg = f"process {pid}: still there after {timeout_s:g} s"
        raise DeadlineError(msg)
