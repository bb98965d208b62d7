import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_hybrid.observability.context import log_context
from kata_hybrid.observability.log import FifoHandler, JsonFormatter, LogfmtFormatter


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    os.mkfifo(path)
    return path


@pytest.fixture
def handler(fifo: Path) -> Iterator[FifoHandler]:
    handler = FifoHandler(fifo)
    handler.setFormatter(logging.Formatter("%(message)s"))
    yield handler
    handler.close()


def record(message: str, **fields: object) -> logging.LogRecord:
    return logging.makeLogRecord(
        {"name": "kata_hybrid.shim.run", "levelno": logging.INFO, "msg": message, **fields}
    )


def open_reader(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK)


def test_a_line_is_logfmt() -> None:
    line = LogfmtFormatter().format(record("shim serves", pid=7, text='a "b"\n', created=0.5))
    assert line == (
        "time=1970-01-01T00:00:00.500000Z level=info "
        'msg="shim serves" logger=shim.run pid=7 text="a \\"b\\"\\n"'
    )


def test_the_context_is_in_every_record() -> None:
    with log_context(container="c1"), log_context(exec_id="e1"):
        line = LogfmtFormatter().format(record("x"))
    assert "container=c1 exec=e1" in line
    assert "container" not in LogfmtFormatter().format(record("x"))


def test_json_has_the_same_fields() -> None:
    fields = json.loads(JsonFormatter().format(record("x", pid=7)))
    assert (fields["msg"], fields["level"], fields["pid"]) == ("x", "info", 7)


def test_a_record_reaches_the_reader(fifo: Path, handler: FifoHandler) -> None:
    reader = open_reader(fifo)
    handler.emit(record("hello"))
    assert os.read(reader, 100) == b"hello\n"
    os.close(reader)


def test_without_a_reader_records_are_counted(handler: FifoHandler) -> None:
    handler.emit(record("a"))
    handler.emit(record("b"))
    assert handler.dropped == 2


def test_a_full_fifo_drops_and_later_says_so(fifo: Path, handler: FifoHandler) -> None:
    reader = open_reader(fifo)
    while not handler.dropped:
        handler.emit(record("x" * 1000))
    dropped = handler.dropped
    while True:
        try:
            os.read(reader, 1 << 16)
        except BlockingIOError:
            break
    handler.emit(record("after"))
    assert os.read(reader, 1 << 16).splitlines()[-1] == f"after dropped={dropped}".encode()
    os.close(reader)


def test_a_new_reader_gets_the_next_record(fifo: Path, handler: FifoHandler) -> None:
    first = open_reader(fifo)
    handler.emit(record("one"))
    os.close(first)
    second = open_reader(fifo)
    handler.emit(record("two"))
    assert os.read(second, 100).endswith(b"two\n")
    os.close(second)


def test_a_vanished_reader_is_survived_and_found_again(fifo: Path, handler: FifoHandler) -> None:
    first = open_reader(fifo)
    handler.emit(record("one"))
    os.close(first)
    handler.emit(record("lost"))
    assert handler.dropped == 1
    second = open_reader(fifo)
    handler._next_open = 0.0
    handler.emit(record("two"))
    assert os.read(second, 100) == b"two dropped=1\n"
    os.close(second)


def test_a_bad_record_does_not_raise(fifo: Path, handler: FifoHandler) -> None:
    reader = open_reader(fifo)
    handler.emit(logging.makeLogRecord({"name": "x", "msg": "%d", "args": ("a",)}))
    assert b"unprintable log record from x" in os.read(reader, 1000)
    os.close(reader)
