"""The serving loop around a small service: when it leaves, and in which order."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from harness.loop import on_loop
from kata_hybrid.errors import InvalidConfigError, KataError, NotFoundError
from kata_hybrid.protos import containerd_events_pb2, events_forward_pb2, task_pb2
from kata_hybrid.service.events import METHOD, SERVICE, EventPublisher
from kata_hybrid.shim.run import TASK_SERVICES, BuildServices, Services, ShimContext, run
from kata_hybrid.ttrpc.client import Client
from kata_hybrid.ttrpc.server import Method, Server
from kata_hybrid.types import SandboxId

TIMEOUT_S = 10.0
TASK = "containerd.task.v2.Task"


class Service:
    """Connect and Shutdown, and a note of what happened."""

    def __init__(self, *, is_empty: bool = True) -> None:
        self.is_empty = is_empty
        self.is_over = False
        self.is_closed = False
        self.events: EventPublisher | None = None
        self.on_shutdown: Callable[[], None] = lambda: None

    def build(
        self, _: ShimContext, events: EventPublisher, on_shutdown: Callable[[], None]
    ) -> Services:
        self.events = events
        self.on_shutdown = on_shutdown
        methods = {
            "Connect": Method(request_type=task_pb2.ConnectRequest, handler=self.connect),
            "Shutdown": Method(request_type=task_pb2.ShutdownRequest, handler=self.shutdown),
        }
        return Services(
            methods=dict.fromkeys(TASK_SERVICES, methods),
            is_empty=lambda: self.is_empty,
            is_over=lambda: self.is_over,
            close=self.close,
        )

    async def connect(self, _: task_pb2.ConnectRequest) -> Message:
        return task_pb2.ConnectResponse(shim_pid=os.getpid())

    async def shutdown(self, _: task_pb2.ShutdownRequest) -> Message:
        assert self.events is not None
        self.events.publish("/tasks/delete", containerd_events_pb2.TaskDelete(container_id="c1"))
        self.on_shutdown()
        return Empty()

    async def close(self) -> None:
        self.is_closed = True


def context(folder: Path, *, ttrpc_address: str = "") -> ShimContext:
    return ShimContext(
        namespace="default",
        sandbox_id=SandboxId("c1"),
        container_id="c1",
        bundle=folder,
        run_dir=folder,
        socket_path=folder / "shim.sock",
        containerd_address="/c",
        containerd_binary="",
        ttrpc_address=ttrpc_address,
        options=None,
        protocol="ttrpc",
        is_debug=False,
    )


def listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


async def call(client: Client, method: str, request: Message) -> None:
    await client.call(TASK, method=method, request=request, reply_type=Empty, timeout_s=TIMEOUT_S)


async def serving(
    folder: Path, build: BuildServices, *, ttrpc_address: str = "", idle_limit_s: float = 600.0
) -> asyncio.Task[None]:
    listener = listen(folder / "shim.sock")
    work = run(
        context(folder, ttrpc_address=ttrpc_address),
        listener,
        build=build,
        idle_limit_s=idle_limit_s,
    )
    return asyncio.get_running_loop().create_task(work)


@on_loop
async def test_shutdown_is_answered_then_everything_released(folder: Path) -> None:
    service = Service()
    task = await serving(folder, service.build)
    async with await Client.connect(folder / "shim.sock", timeout_s=TIMEOUT_S) as client:
        await call(client, "Shutdown", task_pb2.ShutdownRequest())
        async with asyncio.timeout(TIMEOUT_S):
            await task
            await client.closed()
    assert service.is_closed
    assert not (folder / "shim.sock").exists()


@on_loop
async def test_events_are_flushed_before_it_leaves(folder: Path) -> None:
    received: list[str] = []

    async def forward(request: events_forward_pb2.ForwardRequest) -> Message:
        received.append(request.envelope.topic)
        return Empty()

    method = Method(request_type=events_forward_pb2.ForwardRequest, handler=forward)
    containerd = Server({SERVICE: {METHOD: method}})
    await containerd.start(listen(folder / "containerd"))
    service = Service()
    task = await serving(folder, service.build, ttrpc_address=str(folder / "containerd"))
    async with await Client.connect(folder / "shim.sock", timeout_s=TIMEOUT_S) as client:
        await call(client, "Shutdown", task_pb2.ShutdownRequest())
        async with asyncio.timeout(TIMEOUT_S):
            await task
    await containerd.close(timeout_s=TIMEOUT_S)
    assert received == ["/tasks/delete"]


@on_loop
async def test_it_leaves_when_nobody_ever_came(folder: Path) -> None:
    service = Service()
    task = await serving(folder, service.build, idle_limit_s=0.1)
    async with asyncio.timeout(TIMEOUT_S):
        await task
    assert service.is_closed


@on_loop
async def test_a_connection_alone_does_not_keep_it(folder: Path) -> None:
    service = Service()
    task = await serving(folder, service.build, idle_limit_s=0.1)
    async with await Client.connect(folder / "shim.sock", timeout_s=TIMEOUT_S):
        async with asyncio.timeout(TIMEOUT_S):
            await task
    assert service.is_closed


@on_loop
async def test_a_container_keeps_it(folder: Path) -> None:
    service = Service(is_empty=False)
    task = await serving(folder, service.build, idle_limit_s=0.1)
    done, _ = await asyncio.wait({task}, timeout=0.5)
    assert not done
    service.is_empty = True
    async with asyncio.timeout(TIMEOUT_S):
        await task


@on_loop
async def test_sigterm_ends_it_only_without_containers(folder: Path) -> None:
    service = Service(is_empty=False)
    task = await serving(folder, service.build)
    async with await Client.connect(folder / "shim.sock", timeout_s=TIMEOUT_S) as client:
        await call(client, "Connect", task_pb2.ConnectRequest())
        os.kill(os.getpid(), signal.SIGTERM)
        await call(client, "Connect", task_pb2.ConnectRequest())
        assert not task.done()
        service.is_empty = True
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(TIMEOUT_S):
            await task
    assert service.is_closed


def test_sigusr1_logs_what_everything_does(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        service = Service()
        task = await serving(folder, service.build)
        async with await Client.connect(folder / "shim.sock", timeout_s=TIMEOUT_S) as client:
            await call(client, "Connect", task_pb2.ConnectRequest())
            os.kill(os.getpid(), signal.SIGUSR1)
            await call(client, "Shutdown", task_pb2.ShutdownRequest())
        async with asyncio.timeout(TIMEOUT_S):
            await task

    with caplog.at_level(logging.INFO):
        asyncio.run(scenario())
    messages = [record.message for record in caplog.records]
    assert {"task", "thread"} <= set(messages)
    assert "unhandled error" not in messages


@on_loop
async def test_what_cannot_be_built_is_told_to_create(folder: Path) -> None:
    def build(*_: object) -> Services:
        raise InvalidConfigError("configuration.toml: unknown key hypervisor.qemo")

    task = await serving(folder, build)
    async with await Client.connect(folder / "shim.sock", timeout_s=TIMEOUT_S) as client:
        with pytest.raises(KataError, match="unknown key") as caught:
            await call(client, "Create", task_pb2.CreateTaskRequest(id="c1"))
        assert caught.value.code == 3
        with pytest.raises(NotFoundError):
            await call(client, "Delete", task_pb2.DeleteRequest(id="c1"))
        await call(client, "Shutdown", task_pb2.ShutdownRequest(id="c1"))
        async with asyncio.timeout(TIMEOUT_S):
            await task
