"""Task events to containerd: one queue, one sender, in order.

    publish ─▶ queue ─▶ sender ─▶ Events.Forward on TTRPC_ADDRESS

The order of the queue is the order of the calls to ``publish``. While containerd restarts, the
head of the queue is tried again with growing pauses until it is taken, so nothing overtakes it. An
event that containerd itself refuses is tried a few times and dropped. Without an address (other
callers than containerd) events are only logged. Event loop thread only.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from typing import Final

from google.protobuf.any_pb2 import Any
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from kata_hybrid.aio.supervisor import Supervisor
from kata_hybrid.errors import DeadlineExceededError, KataError, UnavailableError
from kata_hybrid.protos import events_forward_pb2
from kata_hybrid.service.convert import timestamp
from kata_hybrid.ttrpc.client import Client

_LOG = logging.getLogger(__name__)

SERVICE: Final = "containerd.services.events.ttrpc.v1.Events"
METHOD: Final = "Forward"
TYPE_URL_PREFIX: Final = "containerd.events."
MAX_QUEUED: Final = 2048
"""As many as containerd's own shims keep. When containerd is away only exits add to the queue."""
_CALL_TIMEOUT_S: Final = 5.0
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 2.0
_MAX_REFUSALS: Final = 5


class EventPublisher:
    """Publishes this shim's events."""

    def __init__(self, address: str, *, namespace: str) -> None:
        """Forward to containerd's ttRPC socket at ``address``; only log when it is empty."""
        self._address = address.removeprefix("unix://")
        self._namespace = namespace
        self._queue: deque[events_forward_pb2.Envelope] = deque()
        self._has_events = asyncio.Event()
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._supervisor = Supervisor("events")
        self._client: Client | None = None
        self._is_away = False
        if self._address:
            self._supervisor.start(self._send_all(), name="event sender")

    @property
    def queued(self) -> int:
        """How many events containerd has not taken yet."""
        return len(self._queue)

    def publish(self, topic: str, message: Message) -> None:
        """Queue an event (``/tasks/…`` and its ``containerd_events_pb2`` message)."""
        _LOG.debug("event", extra={"topic": topic})
        if not self._address:
            return
        if len(self._queue) >= MAX_QUEUED:
            # The older ones are the start of every story; a gap must not come before them.
            _LOG.error("event queue is full, event dropped", extra={"topic": topic})
            return
        self._queue.append(
            events_forward_pb2.Envelope(
                timestamp=timestamp(time.time_ns()),
                namespace=self._namespace,
                topic=topic,
                event=Any(
                    type_url=TYPE_URL_PREFIX + message.DESCRIPTOR.name,
                    value=message.SerializeToString(),
                ),
            )
        )
        self._is_empty.clear()
        self._has_events.set()

    async def flush(self, timeout_s: float) -> bool:
        """Wait until containerd has taken every event.

        Returns:
            Whether it has, within the time.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._is_empty.wait()
        return not self._queue

    async def close(self) -> None:
        """Stop sending; what is still queued is lost. Idempotent."""
        if self._queue:
            _LOG.warning("events not delivered", extra={"count": len(self._queue)})
        await self._supervisor.close()
        self._disconnect()

    async def _send_all(self) -> None:
        while True:
            await self._has_events.wait()
            await self._send_head(self._queue[0])
            self._queue.popleft()
            if not self._queue:
                self._has_events.clear()
                self._is_empty.set()

    async def _send_head(self, envelope: events_forward_pb2.Envelope) -> None:
        """Send one event, returning when containerd took it or it will never be taken."""
        pause_s = _FIRST_PAUSE_S
        refusals = 0
        while True:
            try:
                await self._forward(envelope)
            except (UnavailableError, DeadlineExceededError) as error:
                self._disconnect()
                if not self._is_away:
                    self._is_away = True
                    _LOG.warning("containerd takes no events", extra={"reason": error})
            except KataError as error:
                refusals += 1
                if refusals >= _MAX_REFUSALS:
                    _LOG.error("event refused", extra={"topic": envelope.topic, "reason": error})
                    return
            else:
                if self._is_away:
                    self._is_away = False
                    _LOG.info("containerd takes events again")
                return
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def _forward(self, envelope: events_forward_pb2.Envelope) -> None:
        if self._client is None or self._client.is_closed:
            self._client = await Client.connect(self._address, timeout_s=_CALL_TIMEOUT_S)
        await self._client.call(
            SERVICE,
            method=METHOD,
            request=events_forward_pb2.ForwardRequest(envelope=envelope),
            reply_type=Empty,
            timeout_s=_CALL_TIMEOUT_S,
            metadata={"containerd-namespace-ttrpc": self._namespace},
        )

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()
