import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Self

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from kata_hybrid.errors import (
    ContainerNotFoundError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    InvalidStateError,
    KataError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
    UnimplementedError,
)
from kata_hybrid.protos import task_pb2, ttrpc_pb2
from kata_hybrid.ttrpc.client import Client
from kata_hybrid.ttrpc.frame import (
    HEADER,
    MAX_PAYLOAD_BYTES,
    Frame,
    FrameDecoder,
    FrameType,
    encode_frame,
)
from kata_hybrid.ttrpc.server import MAX_UNREAD_BYTES, Method, Server

V2 = "containerd.task.v2.Task"
V3 = "containerd.task.v3.Task"
TIMEOUT_S = 10.0


class Handlers:
    """A small service whose calls can be held and observed."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.entered = asyncio.Event()
        self.finished: list[str] = []
        self.cancelled: list[str] = []
        self.changed = asyncio.Event()

    async def connect(self, request: task_pb2.ConnectRequest) -> Message:
        return task_pb2.ConnectResponse(shim_pid=100, task_pid=200, version=request.id)

    async def hold(self, request: Message) -> Message:
        name = type(request).DESCRIPTOR.name
        self.entered.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.append(name)
            self.changed.set()
            raise
        self.finished.append(name)
        self.changed.set()
        return Empty()

    async def state(self, request: task_pb2.StateRequest) -> Message:
        raise ContainerNotFoundError(f"container {request.id} not found")

    async def start(self, request: task_pb2.StartRequest) -> Message:
        raise InvalidStateError(request.id, state="running", request="start")

    async def pids(self, _request: task_pb2.PidsRequest) -> Message:
        raise ZeroDivisionError("secret detail")

    async def delete(self, _request: task_pb2.DeleteRequest) -> Message:
        return None  # type: ignore[return-value]

    async def stats(self, _request: task_pb2.StatsRequest) -> Message:
        return task_pb2.StateResponse(bundle="x" * (MAX_PAYLOAD_BYTES + 1))

    async def update(self, _request: task_pb2.UpdateTaskRequest) -> Message:
        return task_pb2.StateResponse(bundle="x" * (1 << 20))

    def methods(self) -> dict[str, Method]:
        return {
            "Connect": Method(request_type=task_pb2.ConnectRequest, handler=self.connect),
            "Wait": Method(
                request_type=task_pb2.WaitRequest, handler=self.hold, ends_with_client=True
            ),
            "Create": Method(request_type=task_pb2.CreateTaskRequest, handler=self.hold),
            "State": Method(request_type=task_pb2.StateRequest, handler=self.state),
            "Start": Method(request_type=task_pb2.StartRequest, handler=self.start),
            "Pids": Method(request_type=task_pb2.PidsRequest, handler=self.pids),
            "Delete": Method(request_type=task_pb2.DeleteRequest, handler=self.delete),
            "Stats": Method(request_type=task_pb2.StatsRequest, handler=self.stats),
            "Update": Method(request_type=task_pb2.UpdateTaskRequest, handler=self.update),
        }


class Raw:
    """A client that may break every rule."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.decoder = FrameDecoder()
        self.frames: list[Frame] = []

    def send(self, stream_id: int, payload: bytes, *, flags: int = 0) -> None:
        self.writer.write(
            encode_frame(stream_id, frame_type=FrameType.REQUEST, payload=payload, flags=flags)
        )

    async def response(self) -> tuple[int, ttrpc_pb2.Response]:
        async with asyncio.timeout(TIMEOUT_S):
            while not self.frames:
                data = await self.reader.read(1 << 16)
                assert data, "the server closed the connection"
                self.frames += self.decoder.feed(data)
        frame = self.frames.pop(0)
        assert frame.type == FrameType.RESPONSE
        return frame.stream_id, ttrpc_pb2.Response.FromString(frame.payload)

    async def code(self) -> int:
        return (await self.response())[1].status.code


def request(method: str, message: Message, *, service: str = V2) -> bytes:
    return ttrpc_pb2.Request(
        service=service, method=method, payload=message.SerializeToString()
    ).SerializeToString()


PING = request("Connect", task_pb2.ConnectRequest(id="c1"))


class World:
    """A server on a socket, a well-behaved client and one that is not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handlers = Handlers()
        methods = self.handlers.methods()
        self.server = Server({V2: methods, V3: methods})

    async def __aenter__(self) -> Self:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        await self.server.start(listener)
        self.client = await Client.connect(self.path, timeout_s=TIMEOUT_S)
        self.raw = Raw(*await asyncio.open_unix_connection(str(self.path)))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.client.close()
        await self.client.closed()
        self.raw.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self.raw.writer.wait_closed()
        self.handlers.release.set()
        await self.server.close(timeout_s=TIMEOUT_S)


def with_server(test: Callable[[World], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    """Run a test inside a world of its own."""

    async def run(path: Path) -> None:
        async with World(path) as world:
            await test(world)

    def sync(tmp_path: Path) -> None:
        asyncio.run(run(tmp_path / "s"))

    sync.__name__ = test.__name__
    return sync


async def connect(client: Client, *, service: str = V2) -> task_pb2.ConnectResponse:
    return await client.call(
        service,
        method="Connect",
        request=task_pb2.ConnectRequest(id="c1"),
        reply_type=task_pb2.ConnectResponse,
        timeout_s=TIMEOUT_S,
    )


async def fail(client: Client, method: str, message: Message) -> KataError:
    with pytest.raises(KataError) as caught:
        await client.call(V2, method=method, request=message, reply_type=Empty, timeout_s=TIMEOUT_S)
    return caught.value


@with_server
async def test_both_service_names_answer(world: World) -> None:
    assert (await connect(world.client, service=V2)).task_pid == 200
    assert (await connect(world.client, service=V3)).version == "c1"


@with_server
async def test_a_waiting_call_does_not_hold_up_another(world: World) -> None:
    waiting = asyncio.gather(
        world.client.call(
            V2, method="Wait", request=task_pb2.WaitRequest(), reply_type=Empty, timeout_s=None
        )
    )
    await world.handlers.entered.wait()
    assert (await connect(world.client)).shim_pid == 100
    world.handlers.release.set()
    await waiting


@with_server
async def test_our_errors_keep_code_and_text(world: World) -> None:
    error = await fail(world.client, "State", task_pb2.StateRequest(id="x"))
    assert isinstance(error, NotFoundError)
    assert str(error) == "container x not found"


@with_server
async def test_a_state_error_is_a_failed_precondition(world: World) -> None:
    error = await fail(world.client, "Start", task_pb2.StartRequest(id="x"))
    assert error.code == 9
    assert str(error) == "cannot start x in state running"


@with_server
async def test_a_bug_is_internal_and_logged(world: World) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign,assignment]
    logging.getLogger().addHandler(handler)
    try:
        error = await fail(world.client, "Pids", task_pb2.PidsRequest())
    finally:
        logging.getLogger().removeHandler(handler)
    assert isinstance(error, InternalError)
    assert records[0].exc_info is not None


@with_server
async def test_no_reply_is_internal(world: World) -> None:
    assert isinstance(await fail(world.client, "Delete", task_pb2.DeleteRequest()), InternalError)


@with_server
async def test_a_reply_too_long_is_resource_exhausted(world: World) -> None:
    error = await fail(world.client, "Stats", task_pb2.StatsRequest())
    assert isinstance(error, ResourceExhaustedError)
    assert (await connect(world.client)).shim_pid == 100


@with_server
async def test_unknown_method_is_unimplemented(world: World) -> None:
    error = await fail(world.client, "Fly", Empty())
    assert isinstance(error, UnimplementedError)
    assert str(error) == "method Fly"


@with_server
async def test_unknown_service_is_unimplemented(world: World) -> None:
    world.raw.send(1, request("Connect", Empty(), service="containerd.task.v9.Task"))
    _, response = await world.raw.response()
    assert response.status.code == 12
    assert response.status.message == "service containerd.task.v9.Task"


@with_server
async def test_a_stream_call_is_unimplemented(world: World) -> None:
    world.raw.send(1, PING, flags=2)
    assert await world.raw.code() == 12


@with_server
async def test_undecodable_payload_is_invalid(world: World) -> None:
    payload = ttrpc_pb2.Request(
        service=V2, method="Connect", payload=b"\x0a\xff"
    ).SerializeToString()
    world.raw.send(1, payload)
    assert await world.raw.code() == 3


@with_server
async def test_undecodable_request_is_invalid_and_the_connection_lives(world: World) -> None:
    world.raw.send(1, b"\xff\xff\xff")
    assert await world.raw.code() == 3
    world.raw.send(3, PING)
    assert await world.raw.code() == 0


@with_server
async def test_even_stream_id_is_invalid(world: World) -> None:
    world.raw.send(2, PING)
    assert await world.raw.code() == 3


@with_server
async def test_reused_stream_id_is_invalid(world: World) -> None:
    world.raw.send(5, PING)
    assert await world.raw.code() == 0
    world.raw.send(5, PING)
    world.raw.send(3, PING)
    assert [await world.raw.code(), await world.raw.code()] == [3, 3]


@with_server
async def test_oversized_request_is_refused_and_the_next_served(world: World) -> None:
    world.raw.writer.write(HEADER.pack(MAX_PAYLOAD_BYTES + 10, 1, FrameType.REQUEST, 0))
    world.raw.writer.write(bytes(MAX_PAYLOAD_BYTES + 10))
    world.raw.send(3, PING)
    assert (await world.raw.response())[1].status.code == ResourceExhaustedError.code
    stream_id, response = await world.raw.response()
    assert (stream_id, response.status.code) == (3, 0)


@with_server
async def test_unknown_frame_types_are_ignored(world: World) -> None:
    world.raw.writer.write(struct.pack(">IIBB", 3, 1, 9, 0) + b"abc")
    world.raw.writer.write(struct.pack(">IIBB", 0, 1, FrameType.DATA, 1))
    world.raw.send(1, PING)
    assert await world.raw.code() == 0


@with_server
async def test_a_truncated_frame_and_a_disconnect_leave_the_server_serving(world: World) -> None:
    world.raw.writer.write(encode_frame(1, frame_type=FrameType.REQUEST, payload=PING)[:20])
    world.raw.writer.close()
    await world.raw.writer.wait_closed()
    async with await Client.connect(world.path, timeout_s=TIMEOUT_S) as client:
        assert (await connect(client)).shim_pid == 100
    assert world.server.request_count == 0


@with_server
async def test_random_bytes_leave_the_server_serving(world: World) -> None:
    world.raw.writer.write(os.urandom(1 << 16))
    await world.raw.writer.drain()
    assert (await connect(world.client)).shim_pid == 100


@with_server
async def test_thousands_of_pings_at_once_are_all_answered(world: World) -> None:
    count = 5000
    for number in range(count):
        world.raw.send(2 * number + 1, PING)
    answered = {(await world.raw.response())[0] for _ in range(count)}
    assert len(answered) == count


@with_server
async def test_many_connections_are_served(world: World) -> None:
    clients = [await Client.connect(world.path, timeout_s=TIMEOUT_S) for _ in range(64)]
    replies = await asyncio.gather(*(connect(client) for client in clients))
    assert len(replies) == 64
    assert world.server.connection_count == 66
    for client in clients:
        client.close()
        await client.closed()


@with_server
async def test_a_deadline_ends_the_handler(world: World) -> None:
    with pytest.raises(DeadlineExceededError):
        await world.client.call(
            V2,
            method="Create",
            request=task_pb2.CreateTaskRequest(),
            reply_type=Empty,
            timeout_s=0.05,
        )
    async with asyncio.timeout(TIMEOUT_S):
        await world.handlers.changed.wait()
    assert world.handlers.cancelled == ["CreateTaskRequest"]


@with_server
async def test_a_deadline_is_answered_with_its_code(world: World) -> None:
    payload = ttrpc_pb2.Request(service=V2, method="Wait", timeout_nano=1_000_000)
    world.raw.send(1, payload.SerializeToString())
    assert await world.raw.code() == 4


@with_server
async def test_a_disconnect_cancels_only_calls_that_wait(world: World) -> None:
    world.raw.send(1, request("Wait", task_pb2.WaitRequest()))
    world.raw.send(3, request("Create", task_pb2.CreateTaskRequest()))
    world.raw.send(5, PING)
    assert await world.raw.code() == 0
    world.raw.writer.transport.abort()
    async with asyncio.timeout(TIMEOUT_S):
        await world.handlers.changed.wait()
    assert world.handlers.cancelled == ["WaitRequest"]
    world.handlers.changed.clear()
    world.handlers.release.set()
    async with asyncio.timeout(TIMEOUT_S):
        await world.handlers.changed.wait()
    assert world.handlers.finished == ["CreateTaskRequest"]
    assert world.server.connection_count == 1


@with_server
async def test_a_client_that_does_not_read_is_dropped_not_buffered(world: World) -> None:
    world.raw.writer.transport.set_write_buffer_limits(high=1 << 30)
    payload = request("Update", task_pb2.UpdateTaskRequest())
    count = 4 * MAX_UNREAD_BYTES // (1 << 20)
    world.raw.reader._transport.pause_reading()  # type: ignore[attr-defined]
    for number in range(count):
        world.raw.send(2 * number + 1, payload)
    async with asyncio.timeout(TIMEOUT_S):
        while world.server.connection_count > 1:  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.01)
    assert (await connect(world.client)).shim_pid == 100


@with_server
async def test_closing_lets_mutations_finish_and_cancels_waits(world: World) -> None:
    def call(method: str, message: Message) -> asyncio.Future[Empty]:
        return asyncio.ensure_future(  # noqa: TID251 - gathered below
            world.client.call(
                V2, method=method, request=message, reply_type=Empty, timeout_s=TIMEOUT_S
            )
        )

    wait = call("Wait", task_pb2.WaitRequest())
    create = call("Create", task_pb2.CreateTaskRequest())
    await world.handlers.entered.wait()
    await connect(world.client)
    closing = asyncio.ensure_future(world.server.close(timeout_s=TIMEOUT_S))  # noqa: TID251
    async with asyncio.timeout(TIMEOUT_S):
        await world.handlers.changed.wait()
    world.handlers.release.set()
    assert await create == Empty()
    with pytest.raises(KataError):
        await wait
    await closing
    assert world.handlers.finished == ["CreateTaskRequest"]
    with pytest.raises(UnavailableError):
        await connect(world.client)


@with_server
async def test_nobody_listens_is_unavailable(world: World) -> None:
    with pytest.raises(UnavailableError):
        await Client.connect(world.path.with_name("absent"), timeout_s=TIMEOUT_S)


@with_server
async def test_a_request_too_long_is_not_sent(world: World) -> None:
    message = task_pb2.ConnectRequest(id="x" * (MAX_PAYLOAD_BYTES + 1))
    assert isinstance(await fail(world.client, "Connect", message), InvalidArgumentError)
