"""Runs a coroutine test on an event loop of its own, with nothing left running at its end."""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

_P = ParamSpec("_P")


def on_loop(test: Callable[_P, Coroutine[Any, Any, None]]) -> Callable[_P, None]:
    """Make a test of a coroutine function; fixtures are asked for as usual."""

    @functools.wraps(test)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def until(condition: Callable[[], bool], *, timeout_s: float = 10) -> None:
    """Let other tasks run until ``condition`` holds.

    Raises:
        TimeoutError: it does not in time.
    """
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - of anything, which tells nobody
            await asyncio.sleep(0)
