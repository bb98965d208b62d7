"""Logger programs (``binary://`` standard streams) and the opening of every other kind.

A logger gets the read ends of two pipes as descriptors 3 and 4, and as 5 a pipe it closes (or, for
``binary-v2``, writes to) when it is ready; its environment is CONTAINER_ID and
CONTAINER_NAMESPACE alone. It ends by itself when both streams end.
"""

import asyncio
import contextlib
import os
import signal
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

from kata_hybrid.agent.streams import HostStreams, check_uri, open_streams
from kata_hybrid.aio.process import Process, ProcessReaper
from kata_hybrid.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from kata_hybrid.types import ContainerId, Stdio

_SCHEMES: Final = ("binary://", "binary-v2://")
READY_TIMEOUT_S: Final = 10.0
END_TIMEOUT_S: Final = 3.0
"""How long a logger may take to end by itself, and again after it was asked to."""


class StreamOpener:
    """Opens the host side of processes' streams for one sandbox, and looks after its loggers."""

    def __init__(
        self,
        reaper: ProcessReaper,
        *,
        namespace: str,
        ready_timeout_s: float = READY_TIMEOUT_S,
        end_timeout_s: float = END_TIMEOUT_S,
    ) -> None:
        """Spawn loggers through ``reaper``, telling them ``namespace``."""
        self._reaper = reaper
        self._namespace = namespace
        self._ready_timeout_s = ready_timeout_s
        self._end_timeout_s = end_timeout_s
        self._loggers: list[Process] = []

    async def open(self, stdio: Stdio, *, container_id: ContainerId) -> HostStreams:
        """Open what ``stdio`` names.

        Raises:
            InvalidArgumentError: a scheme that is not known, or a logger without a path.
            NotFoundError: a path that is not there or cannot be opened.
            DeadlineExceededError: the logger did not say it is ready.
            FailedPreconditionError: the logger ended before it was ready.
        """
        if not stdio.stdout.startswith(_SCHEMES):
            return open_streams(stdio)
        streams = HostStreams(is_terminal=stdio.terminal)
        try:
            await self._start_logger(stdio.stdout, streams, container_id=container_id)
        except BaseException:
            streams.close()
            raise
        return streams

    async def _start_logger(
        self, uri: str, streams: HostStreams, *, container_id: ContainerId
    ) -> None:
        check_uri(uri)
        parts = urlsplit(uri)
        program = unquote(parts.path)
        if not program.startswith("/"):
            message = f"logger {uri!r}: an absolute path is needed after binary://"
            raise InvalidArgumentError(message)
        words: dict[str, str] = {}
        for key, value in parse_qsl(parts.query, keep_blank_values=True):
            words.setdefault(key, value)
        argv = [program, *(word for pair in words.items() for word in pair if word)]
        with contextlib.ExitStack() as ends:
            stdout_end, streams.stdout = os.pipe()
            ends.callback(os.close, stdout_end)
            stderr_end, streams.stderr = os.pipe()
            ends.callback(os.close, stderr_end)
            ready, ready_end = os.pipe()
            ends.callback(os.close, ready)
            try:
                logger = await self._reaper.spawn_mapped(
                    argv,
                    name="logger",
                    env={
                        "CONTAINER_ID": container_id,
                        "CONTAINER_NAMESPACE": self._namespace,
                    },
                    fds={3: stdout_end, 4: stderr_end, 5: ready_end},
                )
            except OSError as exc:
                message = f"start logger {program}: {exc.strerror}"
                raise NotFoundError(message) from exc
            finally:
                os.close(ready_end)
            self._loggers = [known for known in self._loggers if not known.has_exited]
            self._loggers.append(logger)
            said = await _first_byte(ready, program, timeout_s=self._ready_timeout_s)
        if parts.scheme == "binary-v2" and not said:
            message = f"logger {program} closed its ready pipe without saying it is ready"
            raise FailedPreconditionError(message)
        if streams.is_terminal:
            os.close(streams.take("stderr"))

    async def close(self) -> None:
        """Give loggers a moment to end, then end them. Their pipes are closed by now."""
        running = [logger for logger in self._loggers if not logger.has_exited]
        self._loggers = []
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if not running:
                return
            if number is not None:
                for logger in running:
                    logger.kill(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._end_timeout_s), asyncio.TaskGroup() as group:
                    for logger in running:
                        group.create_task(logger.exited())
            running = [logger for logger in running if not logger.has_exited]


async def _first_byte(fd: int, program: str, *, timeout_s: float) -> bytes:
    """Read one byte from the ready pipe, or nothing when it is closed."""
    loop = asyncio.get_running_loop()
    readable = loop.create_future()

    def arrived() -> None:
        if not readable.done():
            readable.set_result(None)

    os.set_blocking(fd, False)
    loop.add_reader(fd, arrived)
    try:
        async with asyncio.timeout(timeout_s):
            await readable
    except TimeoutError as exc:
        message = f"logger {program} was not ready after {timeout_s:g} s"
        raise DeadlineExceededError(message) from exc
    finally:
        loop.remove_reader(fd)
    return os.read(fd, 1)
