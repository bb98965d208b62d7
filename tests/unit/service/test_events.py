import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from harness.loop import on_loop
from kata_hybrid.errors import InvalidArgumentError
from kata_hybrid.protos import containerd_events_pb2, events_forward_pb2
from kata_hybrid.service.convert import timestamp
from kata_hybrid.service.events import METHOD, SERVICE, EventPublisher
from kata_hybrid.ttrpc.server import Method, Server

TIMEOUT_S = 10.0


class Containerd:
    """The receiving side, real but for what it does with the events."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.received: list[events_forward_pb2.Envelope] = []
        self.refuse: set[str] = set()
        self.calls = 0

    async def forward(self, request: events_forward_pb2.ForwardRequest) -> Message:
        self.calls += 1
        if request.envelope.topic in self.refuse:
            raise InvalidArgumentError("no such topic")
        self.received.append(request.envelope)
        return Empty()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        method = Method(request_type=events_forward_pb2.ForwardRequest, handler=self.forward)
        server = Server({SERVICE: {METHOD: method}})
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        await server.start(listener)
        try:
            yield
        finally:
            await server.close(timeout_s=TIMEOUT_S)
            self.path.unlink()

    def topics(self) -> list[str]:
        return [envelope.topic for envelope in self.received]


def exit_event(number: int) -> Message:
    return containerd_events_pb2.TaskExit(
        container_id="c1", id="c1", pid=number, exited_at=timestamp(1_500_000_001)
    )


@on_loop
async def test_an_event_arrives_as_containerd_reads_it(tmp_path: Path) -> None:
    containerd = Containerd(tmp_path / "s")
    async with containerd.serving():
        publisher = EventPublisher(str(containerd.path), namespace="k8s.io")
        publisher.publish("/tasks/exit", exit_event(42))
        assert await publisher.flush(TIMEOUT_S)
        await publisher.close()
    (envelope,) = containerd.received
    assert (envelope.namespace, envelope.topic) == ("k8s.io", "/tasks/exit")
    assert envelope.event.type_url == "containerd.events.TaskExit"
    event = containerd_events_pb2.TaskExit.FromString(envelope.event.value)
    assert (event.pid, event.exited_at.seconds, event.exited_at.nanos) == (42, 1, 500_000_001)
    assert envelope.timestamp.seconds > 1_600_000_000


@on_loop
async def test_order_is_that_of_publishing(tmp_path: Path) -> None:
    containerd = Containerd(tmp_path / "s")
    async with containerd.serving():
        publisher = EventPublisher(str(containerd.path), namespace="default")
        for number in range(200):
            publisher.publish(f"/t/{number}", exit_event(number))
        assert await publisher.flush(TIMEOUT_S)
        await publisher.close()
    assert containerd.topics() == [f"/t/{number}" for number in range(200)]


@on_loop
async def test_events_wait_for_containerd_to_come_back(tmp_path: Path) -> None:
    containerd = Containerd(tmp_path / "s")
    publisher = EventPublisher(str(containerd.path), namespace="default")
    async with containerd.serving():
        publisher.publish("/t/before", exit_event(1))
        assert await publisher.flush(TIMEOUT_S)
    publisher.publish("/t/during", exit_event(2))
    publisher.publish("/t/later", exit_event(3))
    assert not await publisher.flush(0.1)
    async with containerd.serving():
        assert await publisher.flush(TIMEOUT_S)
        await publisher.close()
    assert containerd.topics() == ["/t/before", "/t/during", "/t/later"]


@on_loop
async def test_a_refused_event_does_not_hold_up_the_next(tmp_path: Path) -> None:
    containerd = Containerd(tmp_path / "s")
    containerd.refuse = {"/t/bad"}
    async with containerd.serving():
        publisher = EventPublisher(str(containerd.path), namespace="default")
        publisher.publish("/t/bad", exit_event(1))
        publisher.publish("/t/good", exit_event(2))
        assert await publisher.flush(TIMEOUT_S)
        await publisher.close()
    assert containerd.topics() == ["/t/good"]
    assert containerd.calls == 6


@on_loop
async def test_a_full_queue_keeps_the_older_events(tmp_path: Path) -> None:
    publisher = EventPublisher(str(tmp_path / "absent"), namespace="default")
    for number in range(3000):
        publisher.publish(f"/t/{number}", exit_event(number))
    assert publisher.queued == 2048
    assert publisher._queue[-1].topic == "/t/2047"
    await publisher.close()


@on_loop
async def test_without_an_address_nothing_is_queued() -> None:
    publisher = EventPublisher("", namespace="default")
    publisher.publish("/tasks/exit", exit_event(1))
    assert publisher.queued == 0
    assert await publisher.flush(TIMEOUT_S)
    await publisher.close()
