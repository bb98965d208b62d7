"""The running copies between a guest process's streams and the host's descriptors.

The copying itself is native (``_native.vsock``); this owns its handles and says when it is done.
"""

import asyncio
import contextlib
import os
from typing import Literal

from kata_hybrid._native import vsock
from kata_hybrid.agent.streams import HostStreams
from kata_hybrid.aio.events import NativeEvents
from kata_hybrid.errors import KataError


class ProcessCopies:
    """The running copies of one process (implements ``agent.base.StreamCopies``)."""

    def __init__(
        self,
        client: vsock.AgentClient,
        events: NativeEvents,
        *,
        container_id: str,
        exec_id: str,
        streams: HostStreams,
    ) -> None:
        """Start copying. Descriptors in ``streams`` are taken over."""
        self._streams = streams
        self._copies: list[vsock.StdioCopy] = []
        self._outputs: list[asyncio.Future[object]] = []
        self._input: asyncio.Future[object] | None = None
        outputs: tuple[Literal["stdout", "stderr"], ...] = ("stdout", "stderr")
        for stream in outputs[:1] if streams.is_terminal else outputs:
            token, done = events.expect()
            fd = streams.take(stream)
            self._copies.append(client.copy_output(token, container_id, exec_id, stream, fd))
            self._outputs.append(done)
        stdin = streams.take("stdin")
        if stdin < 0 and not streams.is_terminal:
            # No stdin: the process sees its end at once, as from /dev/null.
            stdin = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        if stdin >= 0:
            token, self._input = events.expect()
            self._copies.append(client.copy_input(token, container_id, exec_id, stdin))
            self._input.add_done_callback(_ignore_result)

    async def drained(self) -> None:
        """Return when the last byte of every output is written, or could not be."""
        for done in self._outputs:
            with contextlib.suppress(KataError):
                await asyncio.shield(done)

    def close_stdin(self) -> None:
        """Let stdin end once what the client wrote has been copied. Idempotent."""
        hold = self._streams.take("stdin_hold")
        if hold >= 0:
            os.close(hold)

    def stop(self) -> None:
        """End every copy now. Idempotent."""
        self.close_stdin()
        self._streams.close()
        for copy in self._copies:
            copy.stop()


def _ignore_result(done: asyncio.Future[object]) -> None:
    """Mark a failure as seen: a process that does not read its stdin is no error."""
    if not done.cancelled():
        done.exception()
