"""The programs the guest build runs: apt-get, dpkg-deb, lz4, zstd, each with the package it is in.

One way in for all of them, with a deadline, the end of their error output in the exception, and
scratch files instead of pipes, so that neither side can block on a full one.
"""

import asyncio
import shutil
import tempfile
from enum import Enum
from pathlib import Path

from kata_hybrid.aio.process import Process, ProcessReaper
from kata_hybrid.errors import DeadlineExceededError, FailedPreconditionError, InternalError

_ERROR_TAIL_CHARS = 2000


class Tool(Enum):
    """A program, and the Debian package to install for it."""

    APT_GET = ("apt-get", "apt")
    APT_CACHE = ("apt-cache", "apt")
    DPKG_DEB = ("dpkg-deb", "dpkg")
    LZ4 = ("lz4", "lz4")
    ZSTD = ("zstd", "zstd")

    @property
    def program(self) -> str:
        """Name of the executable."""
        return self.value[0]

    @property
    def package(self) -> str:
        """Debian package that has it."""
        return self.value[1]


def find_tool(tool: Tool) -> str | None:
    """Path of a tool, or None if it is not installed."""
    return shutil.which(tool.program)


class Toolbox:
    """Runs tools as children of this process."""

    def __init__(self, reaper: ProcessReaper) -> None:
        """Start children through ``reaper``."""
        self._reaper = reaper

    async def run(
        self,
        tool: Tool,
        arguments: tuple[str, ...],
        *,
        timeout_s: float = 120,
        data: bytes = b"",
        cwd: Path | None = None,
    ) -> bytes:
        """Run a tool with ``data`` on its standard input and return its standard output.

        Raises:
            FailedPreconditionError: it is not installed.
            InternalError: it failed; the text ends with its own words.
            DeadlineExceededError: it took longer than ``timeout_s``.
        """
        program = find_tool(tool)
        if program is None:
            msg = f"{tool.program} is not installed: apt-get install {tool.package}"
            raise FailedPreconditionError(msg)
        with (
            tempfile.TemporaryFile() as stdin,
            tempfile.TemporaryFile() as stdout,
            tempfile.TemporaryFile() as stderr,
        ):
            stdin.write(data)
            stdin.seek(0)
            child = await self._reaper.spawn(
                (program, *arguments),
                stdin=stdin.fileno(),
                stdout=stdout.fileno(),
                stderr=stderr.fileno(),
                cwd=cwd,
            )
            status = await _finish(child, name=tool.program, timeout_s=timeout_s)
            stdout.seek(0)
            if status == 0:
                return stdout.read()
            stderr.seek(0)
            tail = stderr.read().decode("utf-8", "replace").strip()[-_ERROR_TAIL_CHARS:]
        words = " ".join((tool.program, *arguments))
        msg = f"{words}: exit status {status}: {tail}"
        raise InternalError(msg)


async def _finish(child: Process, *, name: str, timeout_s: float) -> int:
    try:
        async with asyncio.timeout(timeout_s):
            return await child.exited()
    except TimeoutError as error:
        msg = f"{name} did not finish in {timeout_s:g} s"
        raise DeadlineExceededError(msg) from error
    finally:
        child.kill()
