import io
import threading
import time

import pytest

from kata_hybrid.cli import output as output_module
from kata_hybrid.cli.output import Output, Progress

DEADLINE_S = 10.0


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and tells when something was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        count = super().write(text)
        self.written.set()
        return count


class Pipe(Terminal):
    """The same, for a stream that is none."""

    def isatty(self) -> bool:
        return False


def make(stdout: io.StringIO, *, is_json: bool = False) -> Output:
    return Output(is_json=is_json, stdout=stdout, stderr=io.StringIO())


def test_colour_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert make(Terminal()).good("ok") == "\x1b[32mok\x1b[0m"
    assert make(Pipe()).good("ok") == "ok"


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert make(Terminal()).bad("no") == "no"


def test_lines_are_silent_with_json() -> None:
    stdout = Pipe()
    make(stdout, is_json=True).line("text")
    assert stdout.getvalue() == ""


def test_what_is_quick_shows_no_progress() -> None:
    stream = Terminal()
    with Progress(stream=stream, is_silent=False) as progress:
        progress.step("quick")
    assert stream.getvalue() == ""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_module, "_QUIET_FOR_S", 0.01)
    monkeypatch.setattr(output_module, "_INTERVAL_S", 0.01)


@pytest.mark.usefixtures("impatient")
def test_what_is_slow_spins_on_a_terminal_and_cleans_up() -> None:
    stream = Terminal()
    with Progress(stream=stream, is_silent=False) as progress:
        progress.step("slow")
        assert stream.written.wait(DEADLINE_S)
    assert "slow" in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[K")


@pytest.mark.usefixtures("impatient")
def test_what_is_slow_is_one_plain_line_per_step_elsewhere() -> None:
    stream = Pipe()
    with Progress(stream=stream, is_silent=False) as progress:
        for step in ("first", "second"):
            stream.written.clear()
            progress.step(step)
            assert stream.written.wait(DEADLINE_S)
    lines = stream.getvalue().splitlines()
    assert [line.split("] ")[1] for line in lines] == ["first", "second"]


@pytest.mark.usefixtures("impatient")
def test_json_shows_no_progress_at_all() -> None:
    stream = Terminal()
    with Progress(stream=stream, is_silent=True) as progress:
        progress.step("slow")
        began = time.monotonic()
        assert not stream.written.wait(0.1)
        assert time.monotonic() - began >= 0.1
    assert stream.getvalue() == ""
