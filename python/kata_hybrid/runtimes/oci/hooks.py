"""Hooks of an OCI spec that run on the host (runtime-spec, config.md "POSIX-platform Hooks").

    create: prestart, createRuntime, createContainer      start: poststart      delete: poststop

``startContainer`` is the guest's. A hook gets the container's state on its standard input, as JSON,
and nothing of this process but what the spec says. One of create's that fails ends the creation;
of the others, the log tells. A hook without ``timeout`` has two minutes.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from kata_hybrid.aio.process import Process, ProcessReaper
from kata_hybrid.errors import FailedPreconditionError, InvalidSpecError
from kata_hybrid.hypervisor.console import OutputReader
from kata_hybrid.runtimes.oci.values import as_list, as_object, as_text
from kata_hybrid.types import JsonObject

_CREATE: Final = ("prestart", "createRuntime", "createContainer")
_START: Final = ("poststart",)
_DELETE: Final = ("poststop",)
HOST_HOOKS: Final = (*_CREATE, *_START, *_DELETE)
_TIMEOUT_S: Final = 120
_MAX_TIMEOUT_S: Final = 3600
_MAX_ERROR_BYTES: Final = 4096
_LAST_WORDS_S: Final = 0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """One program to run."""

    path: str
    args: tuple[str, ...]
    """With the name it is to have in front; never empty."""
    env: dict[str, str]
    timeout_s: int


Hooks = Mapping[str, tuple[Hook, ...]]
"""By the point in the container's life, of :data:`HOST_HOOKS`."""


def parse_hooks(value: object) -> Hooks:
    """Read the host's part of a spec's ``hooks``.

    Raises:
        InvalidSpecError: a field is missing or has the wrong type; the text names it.
    """
    document = as_object(value or {}, "hooks")
    return {
        point: tuple(
            _hook(item, f"hooks.{point}[{index}]")
            for index, item in enumerate(as_list(document[point], f"hooks.{point}"))
        )
        for point in HOST_HOOKS
        if document.get(point)
    }


def _hook(value: object, field: str) -> Hook:
    entry = as_object(value, field)
    path = as_text(entry.get("path", ""), f"{field}.path")
    if not path.startswith("/"):
        message = f"{field}.path must be absolute, is {path!r}"
        raise InvalidSpecError(message)
    args, env = (_words(entry.get(key), f"{field}.{key}") for key in ("args", "env"))
    for index, word in enumerate(env):
        if word.partition("=")[0] == "":
            message = f"{field}.env[{index}] {word!r} has no name"
            raise InvalidSpecError(message)
    timeout = entry.get("timeout")
    if timeout is None:
        timeout = _TIMEOUT_S
    if isinstance(timeout, bool) or not isinstance(timeout, int) or timeout <= 0:
        message = f"{field}.timeout must be a number of seconds above 0, is {timeout!r}"
        raise InvalidSpecError(message)
    return Hook(
        path=path,
        args=args or (path,),
        env=dict(word.partition("=")[::2] for word in env),
        timeout_s=min(timeout, _MAX_TIMEOUT_S),
    )


def _words(value: object, field: str) -> tuple[str, ...]:
    words = enumerate(as_list(value or [], field))
    return tuple(as_text(word, f"{field}[{index}]") for index, word in words)


class HostHooks(Protocol):
    """Runs hooks of a container, which ``state`` describes."""

    async def create(self, hooks: Hooks, state: JsonObject) -> None:
        """Run those of the creation, in order, until one fails.

        Raises:
            FailedPreconditionError: a hook failed; the text is what it said.
        """

    async def started(self, hooks: Hooks, state: JsonObject) -> None:
        """Run those that follow the start."""

    async def deleted(self, hooks: Hooks, state: JsonObject) -> None:
        """Run those that follow the end."""


class HookRunner:
    """Runs them as children of this process."""

    def __init__(self, reaper: ProcessReaper) -> None:
        """``reaper`` starts them."""
        self._reaper = reaper

    async def create(self, hooks: Hooks, state: JsonObject) -> None:
        """Run those of the creation; see :class:`HostHooks`."""
        for point in _CREATE:
            for hook in hooks.get(point, ()):
                await self._run(hook, point, state)

    async def started(self, hooks: Hooks, state: JsonObject) -> None:
        """Run those that follow the start."""
        await self._run_all(hooks, _START, state)

    async def deleted(self, hooks: Hooks, state: JsonObject) -> None:
        """Run those that follow the end."""
        await self._run_all(hooks, _DELETE, state)

    async def _run_all(self, hooks: Hooks, points: tuple[str, ...], state: JsonObject) -> None:
        for point in points:
            for hook in hooks.get(point, ()):
                try:
                    await self._run(hook, point, state)
                except FailedPreconditionError as exc:
                    _log.warning("hook failed", extra={"error": str(exc)})

    async def _run(self, hook: Hook, point: str, state: JsonObject) -> None:
        try:
            reason = await self._outcome(hook, state)
        except (OSError, ValueError) as exc:
            reason = getattr(exc, "strerror", None) or str(exc)
        if reason:
            message = f"{point} hook {hook.path}: {reason}"
            raise FailedPreconditionError(message)

    async def _outcome(self, hook: Hook, state: JsonObject) -> str:
        """Run it; return why it failed, if it did.

        Raises:
            OSError, ValueError: it could not be started.
        """
        with contextlib.ExitStack() as resources:
            given = os.memfd_create("hook-state")
            resources.callback(os.close, given)
            os.pwrite(given, json.dumps(state).encode(), 0)
            read_end, write_end = os.pipe()
            said = OutputReader(read_end, sink=None, tail_bytes=_MAX_ERROR_BYTES)
            resources.callback(said.close)
            with os.fdopen(write_end, "wb"):
                process = await self._reaper.spawn_mapped(
                    hook.args,
                    program=hook.path,
                    name="hook",
                    env=hook.env,
                    fds={0: given, 1: write_end, 2: write_end},
                )
            reason = await _end(process, timeout_s=hook.timeout_s)
            if reason:
                # Its last words; whoever it left behind may hold the pipe open.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LAST_WORDS_S):
                        await said.ended()
            words = said.tail()
            return f"{reason}: {words}" if reason and words else reason


async def _end(process: Process, *, timeout_s: int) -> str:
    """Wait for it; return why it failed, if it did."""
    try:
        async with asyncio.timeout(timeout_s):
            status = await process.exited()
    except TimeoutError:
        return f"it has not ended in {timeout_s} s"
    finally:
        # With what it started: it leads a session of its own.
        if not process.has_exited:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return "" if status == 0 else f"exit status {status}"
