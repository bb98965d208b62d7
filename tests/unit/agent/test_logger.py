import asyncio
import contextlib
import gc
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from harness.loop import on_loop
from kata_hybrid.agent.logger import StreamOpener
from kata_hybrid.agent.streams import HostStreams
from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from kata_hybrid.types import ContainerId, Stdio

C1 = ContainerId("c1")
TIMEOUT_S = 10.0


@contextlib.asynccontextmanager
async def opening(
    *, ready_timeout_s: float = TIMEOUT_S, end_timeout_s: float = TIMEOUT_S
) -> AsyncIterator[StreamOpener]:
    """Open streams for a while; at the end no descriptor of ours is left."""
    gc.collect()  # what other tests forgot is not to vanish meanwhile
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only counted
    reaper = ProcessReaper()
    opener = StreamOpener(
        reaper, namespace="k8s", ready_timeout_s=ready_timeout_s, end_timeout_s=end_timeout_s
    )
    try:
        async with asyncio.timeout(2 * TIMEOUT_S):
            yield opener
    finally:
        await opener.close()
        reaper.close()
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


def script(path: Path, text: str, *, interpreter: str = "/bin/sh") -> str:
    path.write_text(f"#!{interpreter}\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return f"binary://{path}"


async def ended(opener: StreamOpener) -> list[int]:
    return [await logger.exited() for logger in opener._loggers]


def write_and_close(streams: HostStreams, *, stdout: bytes, stderr: bytes = b"") -> None:
    os.write(streams.stdout, stdout)
    if stderr:
        os.write(streams.stderr, stderr)
    streams.close()


COPY = 'exec 5>&-\ncat <&3 >"$0.out"\ncat <&4 >"$0.err"'


@on_loop
async def test_both_outputs_reach_the_logger(tmp_path: Path) -> None:
    async with opening() as opener:
        uri = script(tmp_path / "log", COPY)
        streams = await opener.open(Stdio(stdout=uri, stderr="ignored"), container_id=C1)
        write_and_close(streams, stdout=b"to stdout", stderr=b"to stderr")
        assert await ended(opener) == [0]
    assert (tmp_path / "log.out").read_bytes() == b"to stdout"
    assert (tmp_path / "log.err").read_bytes() == b"to stderr"


@on_loop
async def test_the_environment_is_two_variables(tmp_path: Path) -> None:
    async with opening() as opener:
        uri = script(tmp_path / "log", 'cat /proc/$$/environ >"$0.env"')
        streams = await opener.open(Stdio(stdout=uri), container_id=C1)
        streams.close()
        await ended(opener)
    words = (tmp_path / "log.env").read_bytes().rstrip(b"\0").split(b"\0")
    assert sorted(words) == [b"CONTAINER_ID=c1", b"CONTAINER_NAMESPACE=k8s"]


@on_loop
async def test_the_descriptors_are_three_pipes_and_nowhere(tmp_path: Path) -> None:
    text = (
        "import json, os, sys\n"
        "found = {}\n"
        "for number in range(3, 6):\n"
        "    found[number] = os.readlink(f'/proc/self/fd/{number}').split(':')[0]\n"
        "for number in range(3):\n"
        "    found[number] = os.readlink(f'/proc/self/fd/{number}')\n"
        "found['more'] = [n for n in range(6, 256) if os.path.exists(f'/proc/self/fd/{n}')]\n"
        "found['session'] = os.getsid(0) == os.getpid()\n"
        "with open(sys.argv[0] + '.json', 'w') as file:\n"
        "    json.dump(found, file)\n"
    )
    inheritable, other = os.pipe()
    os.set_inheritable(other, True)  # noqa: FBT003 - positional only
    async with opening() as opener:
        uri = script(tmp_path / "log", text, interpreter="/usr/bin/env -S python3 -I")
        streams = await opener.open(Stdio(stdout=uri), container_id=C1)
        streams.close()
        assert await ended(opener) == [0]
    os.close(inheritable)
    os.close(other)
    found = json.loads((tmp_path / "log.json").read_text())
    assert [found[number] for number in "012"] == [os.devnull] * 3
    assert [found[number] for number in "345"] == ["pipe"] * 3
    assert found["session"]
    assert found["more"] == []


@on_loop
async def test_the_query_becomes_arguments(tmp_path: Path) -> None:
    async with opening() as opener:
        uri = script(tmp_path / "log", 'printf "%s\\n" "$@" >"$0.args"')
        uri += "?size=10m&name=a%20b&flag&size=ignored"
        streams = await opener.open(Stdio(stdout=uri), container_id=C1)
        streams.close()
        await ended(opener)
    assert (tmp_path / "log.args").read_text().split("\n")[:-1] == [
        "size",
        "10m",
        "name",
        "a b",
        "flag",
    ]


@on_loop
async def test_opening_waits_until_the_logger_is_ready(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    async with opening() as opener, asyncio.TaskGroup() as group:
        uri = script(tmp_path / "log", f'read word <"{tmp_path}/go"\necho "$word" >&5\n{COPY}')
        task = group.create_task(opener.open(Stdio(stdout=uri), container_id=C1))
        # Opens once the logger reads, so the logger runs; it has not said that it is ready.
        await asyncio.to_thread((tmp_path / "go").touch)
        writer = await asyncio.to_thread(os.open, tmp_path / "go", os.O_WRONLY)
        assert not task.done()
        os.write(writer, b"now\n")
        os.close(writer)
        streams = await task
        write_and_close(streams, stdout=b"kept")
        await ended(opener)
    assert (tmp_path / "log.out").read_bytes() == b"kept"


@on_loop
async def test_a_v2_logger_must_send_a_byte(tmp_path: Path) -> None:
    async with opening() as opener:
        uri = script(tmp_path / "log", COPY).replace("binary:", "binary-v2:")
        with pytest.raises(FailedPreconditionError, match="without saying it is ready"):
            await opener.open(Stdio(stdout=uri), container_id=C1)


@on_loop
async def test_a_v2_logger_that_sends_a_byte_is_ready(tmp_path: Path) -> None:
    async with opening() as opener:
        uri = script(tmp_path / "log", f"printf x >&5\n{COPY}").replace("binary:", "binary-v2:")
        streams = await opener.open(Stdio(stdout=uri), container_id=C1)
        write_and_close(streams, stdout=b"out")
        assert await ended(opener) == [0]
    assert (tmp_path / "log.out").read_bytes() == b"out"


@on_loop
async def test_a_logger_that_is_not_there_is_named(tmp_path: Path) -> None:
    async with opening() as opener:
        with pytest.raises(NotFoundError, match=f"start logger {tmp_path}/log"):
            await opener.open(Stdio(stdout=f"binary://{tmp_path}/log"), container_id=C1)


@on_loop
async def test_a_logger_that_is_no_program_is_named(tmp_path: Path) -> None:
    (tmp_path / "log").touch(mode=0o644)
    async with opening() as opener:
        with pytest.raises(NotFoundError, match=f"start logger {tmp_path}/log: Permission denied"):
            await opener.open(Stdio(stdout=f"binary://{tmp_path}/log"), container_id=C1)


@pytest.mark.parametrize(
    "uri", ["binary://", "binary://log", "binary://[", "binary:///bin/a%00b", "binary:///x?a=%00"]
)
@on_loop
async def test_a_logger_without_a_usable_path_is_refused(uri: str) -> None:
    async with opening() as opener:
        with pytest.raises(InvalidArgumentError):
            await opener.open(Stdio(stdout=uri), container_id=C1)


@on_loop
async def test_a_logger_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    async with opening(ready_timeout_s=0.05) as opener:
        uri = script(tmp_path / "log", COPY.removeprefix("exec 5>&-\n"))
        with pytest.raises(DeadlineExceededError, match=r"log was not ready after 0\.05 s"):
            await opener.open(Stdio(stdout=uri), container_id=C1)
        # Its pipes are closed, so it ends by itself.
        assert await ended(opener) == [0]


@on_loop
async def test_a_terminal_uses_only_stdout(tmp_path: Path) -> None:
    async with opening() as opener:
        uri = script(tmp_path / "log", COPY)
        streams = await opener.open(Stdio(stdout=uri, terminal=True), container_id=C1)
        assert streams.is_terminal
        assert streams.stderr == -1
        write_and_close(streams, stdout=b"tty")
        assert await ended(opener) == [0]
    assert (tmp_path / "log.out").read_bytes() == b"tty"


@on_loop
async def test_close_ends_a_logger_that_does_not_end_by_itself(tmp_path: Path) -> None:
    async with opening(end_timeout_s=0.05) as opener:
        streams = await opener.open(
            Stdio(stdout=script(tmp_path / "log", "exec 5>&-\nexec /bin/sleep 600")),
            container_id=C1,
        )
        (logger,) = opener._loggers
        streams.close()
        await opener.close()
        assert await logger.exited() == -signal.SIGTERM


@on_loop
async def test_close_kills_a_logger_that_ignores_the_request(tmp_path: Path) -> None:
    async with opening(end_timeout_s=0.05) as opener:
        text = "trap '' TERM\nexec 5>&-\nexec /bin/sleep 600"
        streams = await opener.open(Stdio(stdout=script(tmp_path / "log", text)), container_id=C1)
        (logger,) = opener._loggers
        streams.close()
        await opener.close()
        assert await logger.exited() == -signal.SIGKILL


@on_loop
async def test_every_other_kind_is_opened_as_usual(tmp_path: Path) -> None:
    async with opening() as opener:
        streams = await opener.open(Stdio(stdout=f"file://{tmp_path}/log"), container_id=C1)
        write_and_close(streams, stdout=b"out ", stderr=b"err")
    assert (tmp_path / "log").read_bytes() == b"out err"
