"""How the command speaks: results on standard output, progress and errors on standard error.

Colour and a moving spinner only on a terminal (and no colour with ``NO_COLOR``); elsewhere plain
lines; with ``--json`` one JSON document and nothing else on standard output, no progress at all.
"""

import json
import os
import sys
import threading
import time
from types import TracebackType
from typing import Self, TextIO

_SPINNER = "|/-\\"
_INTERVAL_S = 0.1
_QUIET_FOR_S = 1.0
"""Progress is for what takes longer than this."""
_CLEAR_LINE = "\r\x1b[K"
_RED, _GREEN, _YELLOW, _BOLD, _RESET = "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[1m", "\x1b[0m"


class Output:
    """Where and how results go."""

    def __init__(self, *, is_json: bool, stdout: TextIO, stderr: TextIO) -> None:
        """Print to these streams."""
        self.is_json = is_json
        self._stdout = stdout
        self._stderr = stderr
        self._has_colour = stdout.isatty() and not os.environ.get("NO_COLOR")

    def line(self, text: str = "") -> None:
        """Print a line of the result; nothing with ``--json``."""
        if not self.is_json:
            print(text, file=self._stdout)

    def document(self, value: object) -> None:
        """Print the result as JSON; nothing without ``--json``."""
        if self.is_json:
            print(json.dumps(value, indent=2, sort_keys=True), file=self._stdout)

    def error(self, text: str) -> None:
        """Print an error."""
        if self.is_json:
            print(json.dumps({"error": text}, indent=2), file=self._stdout)
        print(f"kata-hybrid: {text}", file=self._stderr)

    def good(self, text: str) -> str:
        """Colour a text as good news."""
        return self._colour(_GREEN, text)

    def bad(self, text: str) -> str:
        """Colour a text as bad news."""
        return self._colour(_RED, text)

    def notable(self, text: str) -> str:
        """Colour a text as worth noticing."""
        return self._colour(_YELLOW, text)

    def strong(self, text: str) -> str:
        """Make a text stand out."""
        return self._colour(_BOLD, text)

    def _colour(self, colour: str, text: str) -> str:
        return f"{colour}{text}{_RESET}" if self._has_colour else text

    def progress(self) -> "Progress":
        """Return a context that shows the steps of something slow."""
        return Progress(stream=self._stderr, is_silent=self.is_json)


class Progress:
    """Shows steps once they have taken a second; a context manager, one at a time.

    The steps are blocking tools and file copies, so a thread of its own keeps the display moving.
    """

    def __init__(self, *, stream: TextIO, is_silent: bool) -> None:
        """Show steps on ``stream``."""
        self._stream = stream
        self._is_silent = is_silent
        self._is_terminal = stream.isatty()
        self._step = ""
        self._shown_step = ""
        self._began_s = 0.0
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> Self:
        """Begin."""
        self._began_s = time.monotonic()
        if not self._is_silent:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End, and leave the line clean."""
        self._done.set()
        if not self._is_silent:
            self._thread.join()

    def step(self, text: str) -> None:
        """Say what is being done now."""
        with self._lock:
            self._step = text

    def _follow(self) -> None:
        if self._done.wait(_QUIET_FOR_S):
            return
        turn = 0
        while not self._done.wait(_INTERVAL_S):
            with self._lock:
                step = self._step
            self._show(step, turn=turn)
            turn += 1
        if turn and self._is_terminal:
            self._stream.write(_CLEAR_LINE)
            self._stream.flush()

    def _show(self, step: str, *, turn: int) -> None:
        elapsed_s = time.monotonic() - self._began_s
        if self._is_terminal:
            sign = _SPINNER[turn % len(_SPINNER)]
            self._stream.write(f"{_CLEAR_LINE}{sign} {step} ({elapsed_s:.0f} s)")
        elif step != self._shown_step:
            self._shown_step = step
            self._stream.write(f"[{elapsed_s:.0f} s] {step}\n")
        self._stream.flush()


def standard_output(*, is_json: bool) -> Output:
    """Speak through this process's own streams."""
    return Output(is_json=is_json, stdout=sys.stdout, stderr=sys.stderr)
