"""A process's standard streams on the host side: containerd's fifos and files.

Opens descriptors for the native copies (``stdio.py``); no byte of a stream passes through Python.

Output fifos are opened for reading too, so a reader that goes away (containerd restarts, a client
detaches) is neither an error nor a loss. The input fifo's write end is held until CloseIO, so a
client that leaves is not an end of file. Nothing here blocks.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import unquote, urlsplit

from kata_hybrid.errors import InvalidArgumentError, NotFoundError
from kata_hybrid.types import ContainerId, Stdio

_FILE_FLAGS: Final = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC


@dataclass(slots=True, kw_only=True)
class HostStreams:
    """Open descriptors, each -1 once given away or if there is none.

    ``stdin_hold`` keeps the input fifo from ending before CloseIO.
    """

    stdin: int = -1
    stdin_hold: int = -1
    stdout: int = -1
    stderr: int = -1
    is_terminal: bool = False

    def take(self, name: str) -> int:
        """Hand a descriptor over."""
        fd: int = getattr(self, name)
        setattr(self, name, -1)
        return fd

    def close(self) -> None:
        """Close what was not given away. Idempotent."""
        for name in ("stdin", "stdin_hold", "stdout", "stderr"):
            fd = self.take(name)
            if fd >= 0:
                os.close(fd)


def open_streams(stdio: Stdio) -> HostStreams:
    """Open what ``stdio`` names (``binary://`` is opened by ``logger.py``).

    Raises:
        InvalidArgumentError: a scheme that is not known, or what can be no path.
        NotFoundError: a path that is not there or cannot be opened.
    """
    for uri in (stdio.stdin, stdio.stdout, stdio.stderr):
        check_uri(uri)
    streams = HostStreams(is_terminal=stdio.terminal)
    try:
        if stdio.stdin:
            streams.stdin, streams.stdin_hold = _open_input(stdio.stdin)
        if _scheme(stdio.stdout) == "file":
            # One file for both: the URI of stdout counts.
            streams.stdout = _open_file(_path(stdio.stdout))
            if not stdio.terminal:
                streams.stderr = _open_file(_path(stdio.stdout))
        else:
            streams.stdout = _open_output(stdio.stdout)
            if not stdio.terminal:
                streams.stderr = _open_output(stdio.stderr)
    except BaseException:
        streams.close()
        raise
    return streams


def check_uri(uri: str) -> None:
    """Check that ``uri`` is a path or can be taken apart, and holds no NUL.

    Raises:
        InvalidArgumentError: it is not.
    """
    try:
        text = uri if uri.startswith("/") else unquote(urlsplit(uri).geturl())
    except ValueError as exc:
        message = f"stdio {uri!r} is no URI"
        raise InvalidArgumentError(message) from exc
    if "\0" in text:
        message = f"stdio {uri!r} holds a NUL character"
        raise InvalidArgumentError(message)


def _scheme(uri: str) -> str:
    return "" if uri.startswith("/") or not uri else urlsplit(uri).scheme


def _path(uri: str) -> Path:
    return Path(uri) if uri.startswith("/") else Path(unquote(urlsplit(uri).path))


def _open_output(uri: str) -> int:
    if not uri:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    _check_scheme(uri)
    path = _path(uri)
    try:
        if stat.S_ISFIFO(path.stat().st_mode):
            return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    except OSError as exc:
        message = f"open output {uri}: {exc.strerror}"
        raise NotFoundError(message) from exc


def _open_input(uri: str) -> tuple[int, int]:
    _check_scheme(uri)
    path = _path(uri)
    try:
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        message = f"open stdin {uri}: {exc.strerror}"
        raise NotFoundError(message) from exc
    if not stat.S_ISFIFO(os.fstat(reader).st_mode):
        return reader, -1
    try:
        return reader, os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        os.close(reader)
        message = f"open stdin {uri}: {exc.strerror}"
        raise NotFoundError(message) from exc


def _open_file(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        return os.open(path, _FILE_FLAGS, 0o644)
    except OSError as exc:
        message = f"open output file {path}: {exc.strerror}"
        raise NotFoundError(message) from exc


def _check_scheme(uri: str) -> None:
    scheme = _scheme(uri)
    if scheme not in {"", "fifo"}:
        message = f"stdio {uri!r}: scheme {scheme!r} is not known; fifo, file and binary are"
        raise InvalidArgumentError(message)


class StreamOpening(Protocol):
    """Opens the host side of a process's streams (``agent/logger.py``)."""

    async def open(self, stdio: Stdio, *, container_id: ContainerId) -> HostStreams:
        """Open what ``stdio`` names."""

    async def close(self) -> None:
        """Release what outlives a process. Idempotent."""
