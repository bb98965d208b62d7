"""The native agent client and its copies, driven as the shim drives them.

The agent is an asyncio ttRPC server on the other end of a socket pair, with the real messages. No
byte of the streams passes through the loop on the client's side.
"""

import asyncio
import contextlib
import hashlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from harness.loop import on_loop
from kata_hybrid._native.events import Event, EventPort
from kata_hybrid._native.vsock import AgentClient, IoThread
from kata_hybrid.protos import agent_pb2, ttrpc_pb2

TYPE_RESPONSE = 2
PATIENCE_S = 30
CLOSED = 1
HEADER = struct.Struct(">IIBB")
SERVICE = "grpc.AgentService"

Handler = Callable[[bytes], Awaitable[bytes]]


class AgentError(Exception):
    """A status for the client."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Agent:
    """Handlers by method, and the connection they serve."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self.handlers: dict[str, Handler] = {}

    async def serve(self) -> None:
        """Serve requests, each in its own task, until the client closes."""
        reader, writer = await asyncio.open_connection(sock=self.stream)
        try:
            async with asyncio.TaskGroup() as tasks:
                with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                    while True:
                        length, stream_id, _, _ = HEADER.unpack(await reader.readexactly(10))
                        body = await reader.readexactly(length)
                        request = ttrpc_pb2.Request.FromString(body)
                        tasks.create_task(self._answer(stream_id, request, writer))
        finally:
            writer.close()

    async def _answer(
        self, stream_id: int, request: ttrpc_pb2.Request, writer: asyncio.StreamWriter
    ) -> None:
        response = ttrpc_pb2.Response()
        try:
            response.payload = await self.handlers[request.method](request.payload)
        except AgentError as error:
            response.status.code = error.code
            response.status.message = str(error)
        body = response.SerializeToString()
        writer.write(HEADER.pack(len(body), stream_id, TYPE_RESPONSE, 0) + body)
        with contextlib.suppress(ConnectionError):
            await writer.drain()


class Events:
    """Events by token."""

    def __init__(self, port: EventPort) -> None:
        self.port = port
        self.futures: dict[int, asyncio.Future[Event]] = {}
        asyncio.get_running_loop().add_reader(port.fileno(), self._drain)

    def _drain(self) -> None:
        for event in self.port.drain():
            self._future(event.token).set_result(event)

    def _future(self, token: int) -> asyncio.Future[Event]:
        return self.futures.setdefault(token, asyncio.get_running_loop().create_future())

    async def wait(self, token: int) -> Event:
        async with asyncio.timeout(PATIENCE_S):
            return await self._future(token)


class Fixture:
    """A client, its events, and the agent it talks to."""

    def __init__(self) -> None:
        port = EventPort()
        self.events = Events(port)
        self.io = IoThread(port)
        ours, theirs = socket.socketpair()
        self.client = AgentClient(self.io, ours.detach(), closed_token=CLOSED)
        self.agent = Agent(theirs)


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[Fixture]:
    fixture = Fixture()
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fixture.agent.serve())
            yield fixture
            fixture.client.close()
    finally:
        fixture.io.close()
        asyncio.get_running_loop().remove_reader(fixture.events.port.fileno())


async def echo(payload: bytes) -> bytes:
    return payload


@on_loop
async def test_a_call_brings_its_reply() -> None:
    async with connected() as it:
        it.agent.handlers["Echo"] = echo
        it.client.call(10, SERVICE, "Echo", b"abc", timeout_ms=20_000)
        event = await it.events.wait(10)
        assert (event.code, event.value, event.message) == (0, b"abc", "")


@on_loop
async def test_a_waiting_call_does_not_hold_up_others() -> None:
    async with connected() as it:
        may_return = asyncio.Event()

        async def wait_process(_: bytes) -> bytes:
            await may_return.wait()
            return agent_pb2.WaitProcessResponse(status=3).SerializeToString()

        it.agent.handlers |= {"WaitProcess": wait_process, "Echo": echo}
        it.client.call(10, SERVICE, "WaitProcess", b"", timeout_ms=0)
        for token in range(11, 111):
            it.client.call(token, SERVICE, "Echo", str(token).encode(), timeout_ms=20_000)
        for token in range(11, 111):
            assert (await it.events.wait(token)).value == str(token).encode()
        may_return.set()
        reply = (await it.events.wait(10)).value
        assert isinstance(reply, bytes)
        assert agent_pb2.WaitProcessResponse.FromString(reply).status == 3


@on_loop
async def test_a_status_becomes_the_event_s_code_and_message() -> None:
    async with connected() as it:

        async def missing(_: bytes) -> bytes:
            raise AgentError(5, "no such container")

        it.agent.handlers["StatsContainer"] = missing
        it.client.call(10, SERVICE, "StatsContainer", b"", timeout_ms=20_000)
        event = await it.events.wait(10)
        assert (event.code, event.message, event.value) == (5, "no such container", None)


@on_loop
async def test_a_deadline_is_enforced_without_the_agent() -> None:
    async with connected() as it:
        may_return = asyncio.Event()

        async def stuck(_: bytes) -> bytes:
            await may_return.wait()
            return b""

        it.agent.handlers["Stuck"] = stuck
        it.client.call(10, SERVICE, "Stuck", b"", timeout_ms=20)
        assert (await it.events.wait(10)).code == 4
        may_return.set()


@on_loop
async def test_an_agent_that_leaves_ends_calls_and_the_connection() -> None:
    fixture = Fixture()
    fixture.client.call(10, SERVICE, "Echo", b"", timeout_ms=0)
    fixture.agent.stream.close()
    assert (await fixture.events.wait(10)).code == 14
    assert (await fixture.events.wait(CLOSED)).code == 14
    fixture.io.close()


@on_loop
async def test_output_of_64_mib_arrives_whole() -> None:
    block = os.urandom(1 << 20)
    rest = [block] * 64
    async with connected() as it:
        buffered = bytearray()

        async def read_stdout(payload: bytes) -> bytes:
            request = agent_pb2.ReadStreamRequest.FromString(payload)
            assert (request.container_id, request.exec_id) == ("c1", "e1")
            if not buffered and rest:
                buffered.extend(rest.pop())
            data = bytes(buffered[: request.len])
            del buffered[: request.len]
            return agent_pb2.ReadStreamResponse(data=data).SerializeToString()

        it.agent.handlers["ReadStdout"] = read_stdout
        reader, writer = os.pipe()
        it.client.copy_output(10, "c1", "e1", "stdout", writer)
        digest = await asyncio.to_thread(hash_until_end, reader)
        event = await it.events.wait(10)
        assert (event.code, event.value) == (0, 64 << 20)
        assert digest == hashlib.sha256(block * 64).digest()


def hash_until_end(descriptor: int) -> bytes:
    digest = hashlib.sha256()
    with open(descriptor, "rb", buffering=0) as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.digest()


@on_loop
async def test_input_arrives_and_closes_the_guest_end() -> None:
    async with connected() as it:
        taken: list[bytes] = []

        async def write_stdin(payload: bytes) -> bytes:
            request = agent_pb2.WriteStreamRequest.FromString(payload)
            taken.append(request.data)
            return agent_pb2.WriteStreamResponse(len=len(request.data)).SerializeToString()

        it.agent.handlers["WriteStdin"] = write_stdin
        reader, writer = os.pipe()
        it.client.copy_input(10, "c1", "", reader)
        os.write(writer, b"typed")
        os.close(writer)
        event = await it.events.wait(10)
        assert (event.code, event.value) == (0, 5)
        assert (b"".join(taken), taken[-1]) == (b"typed", b"")


@on_loop
async def test_a_stopped_copy_says_cancelled_and_closes_its_descriptor() -> None:
    async with connected() as it:
        may_return = asyncio.Event()

        async def silent(_: bytes) -> bytes:
            await may_return.wait()
            return b""

        it.agent.handlers["ReadStderr"] = silent
        reader, writer = os.pipe()
        copy = it.client.copy_output(10, "c1", "", "stderr", writer)
        copy.stop()
        copy.stop()
        event = await it.events.wait(10)
        assert (event.code, event.value) == (1, 0)
        assert os.read(reader, 1) == b""
        os.close(reader)
        may_return.set()


@on_loop
async def test_a_wrong_stream_is_refused_and_the_descriptor_left() -> None:
    async with connected() as it:
        reader, writer = os.pipe()
        with pytest.raises(ValueError, match="stdout, stderr"):
            it.client.copy_output(10, "c1", "", "stdin", writer)  # type: ignore[arg-type]
        os.close(writer)
        os.close(reader)


@on_loop
async def test_a_closed_descriptor_is_refused() -> None:
    async with connected() as it:
        reader, writer = os.pipe()
        os.close(reader)
        os.close(writer)
        with pytest.raises(OSError, match="descriptor") as caught:
            it.client.copy_input(10, "c1", "", reader)
        assert caught.value.errno == 9


@on_loop
async def test_dial_waits_for_a_guest_and_hands_over_the_connection(tmp_path: Path) -> None:
    port = EventPort()
    events = Events(port)
    io = IoThread(port)
    path = tmp_path / "agent.sock"
    io.dial(10, f"hvsock://{path}", 1024, timeout_ms=PATIENCE_S * 1000)
    asked: list[bytes] = []

    async def monitor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        if len(asked) > 1:
            writer.write(b"OK 1073741824\nhello")
        writer.close()

    server = await asyncio.start_unix_server(monitor, path)
    event = await events.wait(10)
    assert isinstance(event.value, int), event.message
    with socket.socket(fileno=event.value) as stream:
        stream.settimeout(PATIENCE_S)
        assert await asyncio.to_thread(stream.recv, 100) == b"hello"
    assert asked == [b"CONNECT 1024\n"] * 2
    server.close()
    io.close()


@pytest.mark.parametrize("address", ["vsock://x", "tcp://host", "unix://relative", "hvsock://"])
def test_dial_refuses_an_address_of_another_form(address: str) -> None:
    io = IoThread(EventPort())
    with pytest.raises(ValueError, match=r"address|context id|path"):
        io.dial(10, address, 1024, timeout_ms=1)
    io.close()


def test_a_closed_thread_cancels_at_once_and_closes_again(tmp_path: Path) -> None:
    port = EventPort()
    io = IoThread(port)
    io.close()
    io.close()
    io.dial(10, f"unix://{tmp_path}/none", 1, timeout_ms=1)
    assert [event.code for event in port.drain()] == [1]
