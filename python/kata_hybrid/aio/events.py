"""Native completions on the event loop: the only reader of the event port.

Native threads queue events and make the port's descriptor readable; :class:`NativeEvents` drains
it in one call and resolves the future that waits for each token. No native thread runs Python.

Some native objects also have lines for a log: those come under a token that :meth:`follow` gave,
any number of times.

A waiter may be cancelled while the native operation goes on. Its token stays known until its event
arrives, so a value that owns something (a descriptor) can be released by ``on_abandoned``.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kata_hybrid._native.events import Event, EventPort
from kata_hybrid.errors import InternalError, KataError, UnavailableError, error_from_code

_LOG = logging.getLogger(__name__)

_CANCELLED: Final = 1
_FATAL_TOKEN: Final = 0
"""Never handed out: the event of a native thread that panicked."""


LineSink = Callable[[str], None]
"""Gets one line for a log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiter:
    future: asyncio.Future[object]
    on_abandoned: Callable[[object], None] | None


class NativeEvents:
    """Hands out tokens and resolves them."""

    def __init__(self, port: EventPort) -> None:
        """Start to listen to ``port`` on the running loop."""
        self._port = port
        self._loop = asyncio.get_running_loop()
        self._waiters: dict[int, _Waiter] = {}
        self._followers: dict[int, LineSink] = {}
        self._last_token = 0
        self._is_closed = False
        self._loop.add_reader(port.fileno(), self._drain)

    @property
    def port(self) -> EventPort:
        """The port native objects report to."""
        return self._port

    def expect(
        self, *, on_abandoned: Callable[[object], None] | None = None
    ) -> tuple[int, asyncio.Future[object]]:
        """Return a fresh token and the future its event resolves.

        The future raises the KataError subclass of the event's code. One that nobody awaits is
        not reported as forgotten.

        Raises:
            UnavailableError: closed.
        """
        token = self._next_token()
        future: asyncio.Future[object] = self._loop.create_future()
        future.add_done_callback(_mark_observed)
        self._waiters[token] = _Waiter(future=future, on_abandoned=on_abandoned)
        return token, future

    def follow(self, sink: LineSink) -> int:
        """Return a fresh token whose events are lines for ``sink``, until closed.

        Raises:
            UnavailableError: closed.
        """
        token = self._next_token()
        self._followers[token] = sink
        return token

    def _next_token(self) -> int:
        if self._is_closed:
            message = "native events are closed"
            raise UnavailableError(message)
        self._last_token += 1
        return self._last_token

    async def call(
        self,
        start: Callable[[int], object],
        *,
        on_abandoned: Callable[[object], None] | None = None,
    ) -> object:
        """Start an operation with a fresh token and wait for its event.

        The operation itself bounds the wait (every native call takes a deadline).

        Raises:
            KataError: the subclass of the event's code, or what ``start`` raised.
        """
        token, future = self.expect(on_abandoned=on_abandoned)
        try:
            start(token)
        except BaseException:
            del self._waiters[token]
            raise
        return await future

    def close(self) -> None:
        """Stop listening; whoever still waits gets UnavailableError. Idempotent.

        Close the native objects first, so that their last events have arrived.
        """
        if self._is_closed:
            return
        self._drain()
        self._is_closed = True
        self._loop.remove_reader(self._port.fileno())
        self._fail_all(UnavailableError("native events are closed"))

    def _fail_all(self, error: KataError) -> None:
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters.values():
            if not waiter.future.done():
                waiter.future.set_exception(error)

    def _drain(self) -> None:
        for event in self._port.drain():
            if event.token == _FATAL_TOKEN:
                # Nothing that is under way will ever be answered: end it all, never silently.
                _LOG.critical("the native I/O thread failed", extra={"reason": event.message})
                self._fail_all(InternalError(f"native I/O thread failed: {event.message}"))
                continue
            if (follower := self._followers.get(event.token)) is not None:
                # Those that found no room come last, as their number.
                follower(event.message if event.code == 0 else f"[{event.value!r} lines dropped]")
                continue
            waiter = self._waiters.pop(event.token, None)
            if waiter is None:
                _LOG.warning("event of unknown token", extra={"token": event.token})
            else:
                _resolve(waiter, event)


def _resolve(waiter: _Waiter, event: Event) -> None:
    if waiter.future.done():
        if event.code == 0 and waiter.on_abandoned is not None:
            waiter.on_abandoned(event.value)
    elif event.code == 0:
        waiter.future.set_result(event.value)
    elif event.code == _CANCELLED:
        # Not a cancellation of the waiting task: the native side was closed under it.
        waiter.future.set_exception(UnavailableError(event.message or "connection closed"))
    else:
        waiter.future.set_exception(error_from_code(event.code, event.message))


def _mark_observed(future: asyncio.Future[object]) -> None:
    if not future.cancelled():
        future.exception()
