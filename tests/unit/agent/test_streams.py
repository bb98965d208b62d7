import fcntl
import gc
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_hybrid.agent.streams import HostStreams, open_streams
from kata_hybrid.errors import InvalidArgumentError, NotFoundError
from kata_hybrid.types import Stdio


@pytest.fixture
def fifos(tmp_path: Path) -> Stdio:
    for name in ("in", "out", "err"):
        os.mkfifo(tmp_path / name)
    return Stdio(
        stdin=str(tmp_path / "in"), stdout=str(tmp_path / "out"), stderr=str(tmp_path / "err")
    )


@pytest.fixture
def open_fds() -> Iterator[None]:
    """No descriptor is left behind."""
    gc.collect()  # what other tests forgot is not to vanish meanwhile
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are what is compared
    yield
    assert set(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


def read_now(path: str) -> bytes:
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(reader, 1 << 16)
    finally:
        os.close(reader)


@pytest.mark.usefixtures("open_fds")
def test_fifos_without_any_reader_open_at_once(fifos: Stdio) -> None:
    streams = open_streams(fifos)
    assert os.write(streams.stdout, b"x") == 1
    streams.close()


@pytest.mark.usefixtures("open_fds")
def test_a_reader_that_vanishes_loses_nothing(fifos: Stdio) -> None:
    streams = open_streams(fifos)
    reader = os.open(fifos.stdout, os.O_RDONLY | os.O_NONBLOCK)
    os.write(streams.stdout, b"first ")
    os.close(reader)
    os.write(streams.stdout, b"second")
    assert read_now(fifos.stdout) == b"first second"
    streams.close()


@pytest.mark.usefixtures("open_fds")
def test_a_full_fifo_does_not_block(fifos: Stdio) -> None:
    streams = open_streams(fifos)
    size = fcntl.fcntl(streams.stdout, fcntl.F_GETPIPE_SZ)
    assert os.write(streams.stdout, bytes(2 * size)) == size
    with pytest.raises(BlockingIOError):
        os.write(streams.stdout, b"x")
    streams.close()


@pytest.mark.usefixtures("open_fds")
def test_outputs_are_told_apart(fifos: Stdio) -> None:
    streams = open_streams(fifos)
    os.write(streams.stdout, b"out")
    os.write(streams.stderr, b"err")
    assert (read_now(fifos.stdout), read_now(fifos.stderr)) == (b"out", b"err")
    streams.close()


@pytest.mark.usefixtures("open_fds")
def test_stdin_does_not_end_when_its_writer_leaves(fifos: Stdio) -> None:
    streams = open_streams(fifos)
    writer = os.open(fifos.stdin, os.O_WRONLY | os.O_NONBLOCK)
    os.write(writer, b"hello")
    os.close(writer)
    assert os.read(streams.stdin, 100) == b"hello"
    with pytest.raises(BlockingIOError):
        os.read(streams.stdin, 100)
    streams.close()


@pytest.mark.usefixtures("open_fds")
def test_stdin_ends_after_what_was_written_once_it_is_not_held(fifos: Stdio) -> None:
    streams = open_streams(fifos)
    writer = os.open(fifos.stdin, os.O_WRONLY | os.O_NONBLOCK)
    os.write(writer, b"hello")
    os.close(writer)
    os.close(streams.take("stdin_hold"))
    assert [os.read(streams.stdin, 100), os.read(streams.stdin, 100)] == [b"hello", b""]
    streams.close()


@pytest.mark.usefixtures("open_fds")
def test_a_terminal_has_one_output(fifos: Stdio) -> None:
    streams = open_streams(Stdio(stdout=fifos.stdout, stderr=fifos.stderr, terminal=True))
    assert streams.is_terminal
    assert streams.stdout >= 0
    assert streams.stderr == -1
    streams.close()


@pytest.mark.usefixtures("open_fds")
def test_no_stdio_writes_to_nowhere() -> None:
    streams = open_streams(Stdio())
    assert os.path.samestat(os.fstat(streams.stdout), Path(os.devnull).stat())
    assert os.path.samestat(os.fstat(streams.stderr), Path(os.devnull).stat())
    assert (streams.stdin, streams.stdin_hold) == (-1, -1)
    streams.close()


@pytest.mark.usefixtures("open_fds")
def test_a_fifo_uri_is_the_same_as_its_path(fifos: Stdio) -> None:
    streams = open_streams(Stdio(stdout=f"fifo://{fifos.stdout}"))
    os.write(streams.stdout, b"x")
    assert read_now(fifos.stdout) == b"x"
    streams.close()


@pytest.mark.usefixtures("open_fds")
def test_a_file_uri_takes_both_outputs_into_one_file(tmp_path: Path) -> None:
    log = tmp_path / "not" / "there" / "a b.log"
    uri = f"file://{tmp_path}/not/there/a%20b.log"
    streams = open_streams(Stdio(stdout=uri, stderr="file:///nowhere/else"))
    os.write(streams.stdout, b"out ")
    os.write(streams.stderr, b"err ")
    os.write(streams.stdout, b"out")
    streams.close()
    assert log.read_bytes() == b"out err out"
    assert not Path("/nowhere").exists()


@pytest.mark.usefixtures("open_fds")
def test_a_file_uri_appends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"old ")
    streams = open_streams(Stdio(stdout=f"file://{log}", terminal=True))
    os.write(streams.stdout, b"new")
    streams.close()
    assert log.read_bytes() == b"old new"


@pytest.mark.usefixtures("open_fds")
def test_a_file_made_for_output_is_readable_by_all(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        open_streams(Stdio(stdout=f"file://{tmp_path}/log")).close()
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o644


@pytest.mark.usefixtures("open_fds")
def test_a_plain_path_that_is_a_file_is_appended_to(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"old ")
    streams = open_streams(Stdio(stdout=str(log)))
    os.write(streams.stdout, b"new")
    streams.close()
    assert log.read_bytes() == b"old new"


@pytest.mark.usefixtures("open_fds")
def test_a_plain_file_as_stdin_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"data")
    streams = open_streams(Stdio(stdin=str(tmp_path / "in")))
    assert [os.read(streams.stdin, 9), os.read(streams.stdin, 9)] == [b"data", b""]
    assert streams.stdin_hold == -1
    streams.close()


@pytest.mark.usefixtures("open_fds")
@pytest.mark.parametrize(
    "stdio",
    [
        Stdio(stdout="tcp://127.0.0.1:1"),
        Stdio(stderr="tcp://127.0.0.1:1"),
        Stdio(stdin="file:///dev/null"),
        Stdio(stdin="binary:///bin/true"),
    ],
)
def test_an_unknown_scheme_is_refused(stdio: Stdio) -> None:
    with pytest.raises(InvalidArgumentError, match="is not known; fifo, file and binary are"):
        open_streams(stdio)


@pytest.mark.usefixtures("open_fds")
@pytest.mark.parametrize("uri", ["file://[", "fifo://[x/y", "/tmp/a\0b", "file:///tmp/a%00b"])
@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_what_can_be_no_path_is_refused(name: str, uri: str) -> None:
    with pytest.raises(InvalidArgumentError):
        open_streams(Stdio(**{name: uri}))  # type: ignore[arg-type]


@pytest.mark.usefixtures("open_fds")
@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_path_that_is_not_there_is_named_and_nothing_stays_open(
    name: str, fifos: Stdio, tmp_path: Path
) -> None:
    missing = str(tmp_path / "missing")
    uris = {"stdin": fifos.stdin, "stdout": fifos.stdout, "stderr": fifos.stderr, name: missing}
    with pytest.raises(NotFoundError, match=missing):
        open_streams(Stdio(**uris))  # type: ignore[arg-type]


@pytest.mark.usefixtures("open_fds")
def test_a_file_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotFoundError, match="open output file"):
        open_streams(Stdio(stdout=f"file://{tmp_path}/file/log"))


@pytest.mark.usefixtures("open_fds")
def test_what_was_taken_stays_open_and_close_repeats() -> None:
    streams = HostStreams()
    reader, streams.stdout = os.pipe()
    writer = streams.take("stdout")
    assert streams.take("stdout") == -1
    streams.close()
    streams.close()
    os.write(writer, b"x")
    os.close(reader)
    os.close(writer)
