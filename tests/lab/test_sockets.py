"""Streams between host and guest over vsock: many at once, checked byte by byte, half-closed."""

import asyncio
from collections.abc import Iterator

import pytest

from lab_guest.machine import GuestError, Machine
from lab_guest.streams import GuestStreams, HostStream, StreamError, random_bytes

pytestmark = pytest.mark.timeout(180)

STREAMS = 1000
STREAM_BYTES = 8192
ECHO_PORT = 5000
DIALLED_PORT = 5001
NOBODYS_PORT = 5999
# What is dialled at the same time: a listener in the guest has room for 1024.
DIALS_AT_ONCE = 100


@pytest.fixture
def echo(guest: Machine) -> Iterator[Machine]:
    """The guest, with an echo on its port."""
    running = guest.begin(f'"$GUEST_PROGRAM" echo {ECHO_PORT} >/run/echo & echo $! >/run/echo.pid')
    running.wait(timeout_s=20)
    guest.run("until grep -q echo /run/echo; do sleep 0.1; done")
    yield guest
    guest.run(
        "kill $(cat /run/echo.pid); while kill -0 $(cat /run/echo.pid); do sleep 0.1; done 2>&-"
    )


def test_a_thousand_streams_from_the_host(echo: Machine) -> None:
    before = echo.counters("vsock")

    async def main() -> int:
        room = asyncio.Semaphore(DIALS_AT_ONCE)

        async def dial() -> HostStream:
            async with room:
                return await HostStream.dial(echo.socket, ECHO_PORT)

        streams = await asyncio.gather(*(dial() for _ in range(STREAMS)))
        open_now = echo.counters("vsock")["connections_now"]
        await asyncio.gather(
            *(
                stream.exchange(random_bytes(STREAM_BYTES, seed=number))
                for number, stream in enumerate(streams)
            )
        )
        return open_now

    assert asyncio.run(main()) >= STREAMS
    after = echo.counters("vsock")
    assert after["host_connections"] - before["host_connections"] >= STREAMS
    assert after["bytes_to_guest"] - before["bytes_to_guest"] >= STREAMS * STREAM_BYTES
    assert after["invalid_packets"] == before["invalid_packets"]
    assert after["malformed_chains"] == before["malformed_chains"]
    assert after["connection_timeouts"] == before["connection_timeouts"]


def test_a_thousand_streams_from_the_guest(guest: Machine) -> None:
    async def main() -> GuestStreams:
        async with GuestStreams(guest.socket, DIALLED_PORT) as host:
            command = f'"$GUEST_PROGRAM" dial {DIALLED_PORT} {STREAMS} {STREAM_BYTES}'
            said = await asyncio.to_thread(guest.run, command, timeout_s=120)
            assert said == f"streams {STREAMS} good {STREAMS}"
        return host

    host = asyncio.run(main())
    assert host.served == STREAMS
    # They are dialled at once: most of them are open together.
    assert host.most_open > STREAMS // 2


@pytest.mark.parametrize("size", [0, 1, 8 << 20])
def test_one_stream_of(echo: Machine, size: int) -> None:
    async def main() -> None:
        stream = await HostStream.dial(echo.socket, ECHO_PORT)
        await stream.exchange(random_bytes(size, seed=size))

    asyncio.run(main())


def test_a_port_where_nobody_listens_refuses(guest: Machine) -> None:
    async def main() -> None:
        await HostStream.dial(guest.socket, NOBODYS_PORT)

    with pytest.raises(StreamError, match="5999"):
        asyncio.run(main())
    with pytest.raises(GuestError, match="Connection reset by peer"):
        guest.run(f'"$GUEST_PROGRAM" hold {NOBODYS_PORT}')


def test_a_guest_that_reads_nothing_holds_up_nobody_else(echo: Machine) -> None:
    """Credit: what one stream may have on its way is bounded, and others have their own."""
    data = random_bytes(4 << 20, seed=1)

    async def main() -> None:
        stuck = await HostStream.dial(echo.socket, ECHO_PORT)
        echo.run("kill -STOP $(cat /run/echo.pid)")
        async with asyncio.TaskGroup() as tasks:
            sending = tasks.create_task(stuck.send(data))
            done, _ = await asyncio.wait([sending], timeout=2)
            assert not done, "4 MiB went into a stream that nobody reads"
            assert await asyncio.to_thread(echo.run, "echo others") == "others"
            await asyncio.to_thread(echo.run, "kill -CONT $(cat /run/echo.pid)")
            assert await stuck.receive(len(data)) == data
        stuck.close()

    asyncio.run(main())
