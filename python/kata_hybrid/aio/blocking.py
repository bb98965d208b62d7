"""Calls that block for longer than the event loop may: each on a thread that lives for it alone.

Not the loop's own pool, whose threads stay for as long as the process, and not a native completion,
which would turn a native call's exception into a code and a text. A call has a deadline; one that
is given up goes on, and what becomes of it is dropped: whoever gives up must undo it. Who has to
see the end of a call that may be given up keeps its future (``begin_in_thread``).
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

_T = TypeVar("_T")


async def call_in_thread(work: Callable[[], _T], *, name: str, timeout_s: float) -> _T:
    """Run ``work`` on a thread called ``name`` and wait for its end.

    Raises:
        TimeoutError: it did not end in time.
        Exception: whatever ``work`` raised.
    """
    async with asyncio.timeout(timeout_s):
        return await begin_in_thread(work, name=name)


def begin_in_thread(work: Callable[[], _T], *, name: str) -> "asyncio.Future[_T]":
    """Run ``work`` on a thread called ``name``: done when it returned or raised.

    Cancelling the future ends nothing: wait for it through ``asyncio.shield``.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[_T] = loop.create_future()

    def deliver(set_outcome: Callable[[], None]) -> None:
        if not result.done():
            set_outcome()

    def run() -> None:
        set_outcome: Callable[[], None]
        try:
            set_outcome = partial(result.set_result, work())
        except BaseException as exc:  # noqa: BLE001 - a panic of native code is one; who waits gets it
            set_outcome = partial(result.set_exception, exc)
        # A loop that was closed meanwhile has nobody who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(deliver, set_outcome)

    threading.Thread(target=run, name=name, daemon=True).start()
    return result
