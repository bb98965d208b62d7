"""The 17 calls of containerd, over a real ttRPC server and client, against a fake guest."""

import asyncio
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from harness.loop import on_loop
from kata_hybrid import __version__
from kata_hybrid.agent.streams import HostStreams
from kata_hybrid.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    KataError,
    NotFoundError,
    UnavailableError,
    UnimplementedError,
)
from kata_hybrid.persist.store import SandboxStore
from kata_hybrid.protos import cgroups_v1_pb2, cgroups_v2_pb2, runc_options_pb2, task_pb2
from kata_hybrid.protos import containerd_types_pb2 as types_pb2
from kata_hybrid.runtimes.base import CreateRequest
from kata_hybrid.runtimes.oci.spec import Spec
from kata_hybrid.runtimes.virt.sandbox import VirtSandbox
from kata_hybrid.service.convert import OCI_PROCESS_URL, OCI_RESOURCES_URL
from kata_hybrid.service.metrics import is_cgroup_v2_host
from kata_hybrid.service.task import SERVICE_NAMES, PublishingSink, TaskService
from kata_hybrid.testing.fake_agent import FakeAgent
from kata_hybrid.testing.fake_guest import FakeGuest, FakeHooks, FakeStreams, prepare_nothing
from kata_hybrid.ttrpc.client import Client
from kata_hybrid.ttrpc.server import Server
from kata_hybrid.types import ContainerId, ExecId, SandboxId, Stdio

V2 = SERVICE_NAMES[0]
TIMEOUT_S = 10.0
PROCESS = {"args": ["/bin/true"], "cwd": "/"}
SPEC = {"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "process": PROCESS}
C1 = ContainerId("c1")
E1 = ExecId("e1")

REPLIES: dict[str, type[Message]] = {
    "State": task_pb2.StateResponse,
    "Create": task_pb2.CreateTaskResponse,
    "Start": task_pb2.StartResponse,
    "Delete": task_pb2.DeleteResponse,
    "Pids": task_pb2.PidsResponse,
    "Pause": Empty,
    "Resume": Empty,
    "Checkpoint": Empty,
    "Kill": Empty,
    "Exec": Empty,
    "ResizePty": Empty,
    "CloseIO": Empty,
    "Update": Empty,
    "Wait": task_pb2.WaitResponse,
    "Stats": task_pb2.StatsResponse,
    "Connect": task_pb2.ConnectResponse,
    "Shutdown": Empty,
}


class Log:
    """Keeps what is published."""

    def __init__(self) -> None:
        self.topics: list[str] = []
        self.messages: list[Message] = []

    def publish(self, topic: str, message: Message) -> None:
        self.topics.append(topic)
        self.messages.append(message)


class AskedStreams(FakeStreams):
    """Remembers what it was asked to open."""

    def __init__(self) -> None:
        self.opened: list[Stdio] = []

    async def open(self, stdio: Stdio, *, container_id: ContainerId) -> HostStreams:
        self.opened.append(stdio)
        return await super().open(stdio, container_id=container_id)


class World:
    """A task service on a socket, its client, and the fake guest behind it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.agent = FakeAgent()
        self.guest = FakeGuest(self.agent, folder=folder)
        self.log = Log()
        self.streams = AskedStreams()
        self.requests: list[CreateRequest] = []
        self.bundle = folder / "bundle"
        self.bundle.mkdir()
        self.write_spec(json.dumps(SPEC))
        self.sandbox = VirtSandbox(
            guest_factory=self._make_guest,
            streams=self.streams,
            store=SandboxStore(folder, sandbox_id=SandboxId("sandbox"), namespace="test"),
            events=PublishingSink(self.log),
            hooks=FakeHooks(),
            preparer=prepare_nothing,
        )
        self.shutdowns = 0
        service = TaskService(self.sandbox, on_shutdown=self._shut_down)
        self.server = Server(dict.fromkeys(SERVICE_NAMES, service.methods()))

    async def _make_guest(self, request: CreateRequest, _spec: Spec) -> FakeGuest:
        self.requests.append(request)
        return self.guest

    def _shut_down(self) -> None:
        self.shutdowns += 1

    def write_spec(self, text: str) -> None:
        (self.bundle / "config.json").write_text(text)

    async def __aenter__(self) -> Self:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.fspath(self.folder / "shim.sock"))
        listener.listen()
        await self.server.start(listener)
        self.client = await Client.connect(self.folder / "shim.sock", timeout_s=TIMEOUT_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.client.close()
        await self.client.closed()
        await self.server.close(timeout_s=TIMEOUT_S)
        await self.sandbox.close()

    async def call(
        self,
        method: str,
        request: Message,
        *,
        service: str = V2,
        timeout_s: float = TIMEOUT_S,
    ) -> Any:
        return await self.client.call(
            service,
            method=method,
            request=request,
            reply_type=REPLIES[method],
            timeout_s=timeout_s,
        )

    async def create(self, container_id: str = C1, **changes: Any) -> Any:
        fields = {"id": container_id, "bundle": os.fspath(self.bundle), **changes}
        return await self.call("Create", task_pb2.CreateTaskRequest(**fields))

    async def run(self, container_id: str = C1, **changes: Any) -> Any:
        await self.create(container_id, **changes)
        return await self.call("Start", task_pb2.StartRequest(id=container_id))

    async def exec(self, exec_id: str = E1, **changes: Any) -> Any:
        fields = {"id": C1, "exec_id": exec_id, "spec": process_any(), **changes}
        return await self.call("Exec", task_pb2.ExecProcessRequest(**fields))

    async def state(self, exec_id: str = "") -> Any:
        return await self.call("State", task_pb2.StateRequest(id=C1, exec_id=exec_id))

    async def end(self, status: int, exec_id: ExecId | None = None) -> Any:
        """End a process and wait until that is known."""
        self.agent.exit(C1, exec_id, status)
        return await self.call("Wait", task_pb2.WaitRequest(id=C1, exec_id=exec_id or ""))


def process_any(text: str = json.dumps(PROCESS), *, url: str = OCI_PROCESS_URL) -> AnyMessage:
    return AnyMessage(type_url=url, value=text.encode())


# --- the calls, as containerd makes them --------------------------------------------------------


@pytest.mark.parametrize("service", SERVICE_NAMES)
@on_loop
async def test_both_versions_of_the_service_answer(service: str, tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        request = task_pb2.ConnectRequest(id=C1)
        reply = await world.call("Connect", request, service=service)
        assert (reply.shim_pid, reply.version) == (os.getpid(), __version__)


def test_every_method_of_the_service_is_there(tmp_path: Path) -> None:
    async def names() -> set[str]:
        world = World(tmp_path)
        return set(world.server._services[V2])

    assert asyncio.run(names()) == set(REPLIES)


@on_loop
async def test_create_passes_everything_on(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        reply = await world.create(
            rootfs=[types_pb2.Mount(type="bind", source="/s", target="/t", options=["ro"])],
            stdin="/0",
            stdout="/1",
            stderr="/2",
            terminal=True,
        )
        assert reply.pid == os.getpid()
        (request,) = world.requests
        assert request.container_id == C1
        assert request.bundle == world.bundle
        assert (request.rootfs[0].source, request.rootfs[0].options) == ("/s", ("ro",))
        assert request.stdio == Stdio(stdin="/0", stdout="/1", stderr="/2", terminal=True)
        assert request.config_path is None
        assert world.log.topics == ["/tasks/create"]


@on_loop
async def test_a_container_lives_from_create_to_delete(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        reply = await world.run()
        assert reply.pid == os.getpid()
        waited = await world.end(3)
        assert waited.exit_status == 3
        deleted = await world.call("Delete", task_pb2.DeleteRequest(id=C1))
        assert (deleted.pid, deleted.exit_status) == (os.getpid(), 3)
        assert deleted.exited_at == waited.exited_at
        assert world.log.topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]


@on_loop
async def test_state_tells_what_was_asked_for_and_how_it_is(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.create(stdin="/0", stdout="/1", stderr="/2", terminal=True)
        state = await world.state()
        assert (state.id, state.bundle, state.pid) == (C1, os.fspath(world.bundle), os.getpid())
        assert (state.stdin, state.stdout, state.stderr) == ("/0", "/1", "/2")
        assert (state.terminal, state.exec_id) == (True, "")
        assert state.status == task_pb2.CREATED
        assert not state.HasField("exited_at")


@on_loop
async def test_state_follows_the_process(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.run()
        seen = [(await world.state()).status]
        await world.call("Pause", task_pb2.PauseRequest(id=C1))
        seen.append((await world.state()).status)
        await world.call("Resume", task_pb2.ResumeRequest(id=C1))
        seen.append((await world.state()).status)
        await world.end(7)
        state = await world.state()
        assert [*seen, state.status] == [
            task_pb2.RUNNING,
            task_pb2.PAUSED,
            task_pb2.RUNNING,
            task_pb2.STOPPED,
        ]
        assert state.exit_status == 7
        assert state.exited_at.seconds > 0
        assert world.log.topics[2:4] == ["/tasks/paused", "/tasks/resumed"]


@on_loop
async def test_an_exec_lives_from_exec_to_delete(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.run()
        await world.exec(stdout="/out")
        state = await world.state(E1)
        assert (state.exec_id, state.stdout, state.status) == (E1, "/out", task_pb2.CREATED)
        await world.call("Start", task_pb2.StartRequest(id=C1, exec_id=E1))
        assert (await world.state(E1)).status == task_pb2.RUNNING
        assert (await world.end(4, E1)).exit_status == 4
        deleted = await world.call("Delete", task_pb2.DeleteRequest(id=C1, exec_id=E1))
        assert (deleted.pid, deleted.exit_status) == (os.getpid(), 4)
        assert world.log.topics[2:] == ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"]
        with pytest.raises(NotFoundError):
            await world.state(E1)


@on_loop
async def test_pids_name_execs(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.run()
        await world.exec()
        own, other = (await world.call("Pids", task_pb2.PidsRequest(id=C1))).processes
        assert (own.pid, own.HasField("info")) == (os.getpid(), False)
        assert other.info.type_url == "containerd.runc.v1.ProcessDetails"
        details = runc_options_pb2.ProcessDetails.FromString(other.info.value)
        assert (other.pid, details.exec_id) == (os.getpid(), E1)


@on_loop
async def test_kill_ends_a_process(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.run()
        await world.call("Kill", task_pb2.KillRequest(id=C1, signal=15))
        assert (await world.call("Wait", task_pb2.WaitRequest(id=C1))).exit_status == 143


@on_loop
async def test_kill_of_all_goes_to_the_container(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.run()
        await world.exec()
        await world.call("Start", task_pb2.StartRequest(id=C1, exec_id=E1))
        await world.call("Kill", task_pb2.KillRequest(id=C1, signal=9, all=True))
        own = await world.call("Wait", task_pb2.WaitRequest(id=C1))
        other = await world.call("Wait", task_pb2.WaitRequest(id=C1, exec_id=E1))
        assert (own.exit_status, other.exit_status) == (137, 137)


@on_loop
async def test_wait_does_not_hold_back_other_calls(tmp_path: Path) -> None:
    async with World(tmp_path) as world, asyncio.TaskGroup() as group:
        await world.run()
        waiting = group.create_task(world.call("Wait", task_pb2.WaitRequest(id=C1)))
        await world.call("Kill", task_pb2.KillRequest(id=C1, signal=9))
        assert (await waiting).exit_status == 137


@on_loop
async def test_a_wait_has_the_callers_deadline(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.run()
        with pytest.raises(DeadlineExceededError):
            await world.call("Wait", task_pb2.WaitRequest(id=C1), timeout_s=0.01)
        assert (await world.state()).status == task_pb2.RUNNING


@on_loop
async def test_resize_and_close_io_are_taken(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        asked = record_calls(world.agent)
        await world.run(terminal=True)
        await world.call("ResizePty", task_pb2.ResizePtyRequest(id=C1, height=30, width=120))
        await world.call("CloseIO", task_pb2.CloseIORequest(id=C1, stdin=True))
        assert asked[-1] == "resize_terminal"
        assert world.sandbox._containers.find(C1).process.is_stdin_closed
        assert world.sandbox._containers.find(C1).process.window == (30, 120)


@on_loop
async def test_close_io_of_nothing_closes_nothing(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.run()
        await world.call("CloseIO", task_pb2.CloseIORequest(id=C1, stdin=False))
        assert not world.sandbox._containers.find(C1).process.is_stdin_closed


@on_loop
async def test_update_reaches_the_agent(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        asked = record_calls(world.agent)
        await world.run()
        resources = AnyMessage(type_url=OCI_RESOURCES_URL, value=b'{"memory": {"limit": 1}}')
        await world.call("Update", task_pb2.UpdateTaskRequest(id=C1, resources=resources))
        assert asked[-1] == "update_container"


@on_loop
async def test_stats_are_the_hosts_kind_of_metrics(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.run()
        stats = (await world.call("Stats", task_pb2.StatsRequest(id=C1))).stats
        kind = cgroups_v2_pb2.Metrics if is_cgroup_v2_host() else cgroups_v1_pb2.Metrics
        version = "v2" if is_cgroup_v2_host() else "v1"
        assert stats.type_url == f"io.containerd.cgroups.{version}.Metrics"
        assert kind.FromString(stats.value).pids.current == 1


@on_loop
async def test_connect_knows_the_pid_of_a_container(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.create()
        reply = await world.call("Connect", task_pb2.ConnectRequest(id=C1))
        assert (reply.shim_pid, reply.task_pid) == (os.getpid(), os.getpid())


@on_loop
async def test_connect_for_an_unknown_container_has_no_pid(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        reply = await world.call("Connect", task_pb2.ConnectRequest(id="unknown"))
        assert (reply.shim_pid, reply.task_pid) == (os.getpid(), 0)


@on_loop
async def test_an_oom_in_the_guest_is_published(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.run()
        world.agent.out_of_memory(C1)
        await world.end(137)
        assert "/tasks/oom" in world.log.topics


# --- shutdown -----------------------------------------------------------------------------------


@on_loop
async def test_shutdown_without_containers_is_at_once(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.call("Shutdown", task_pb2.ShutdownRequest(id=C1))
        assert world.shutdowns == 1


@on_loop
async def test_shutdown_is_remembered_until_the_last_delete(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.create("c1")
        await world.create("c2")
        await world.call("Shutdown", task_pb2.ShutdownRequest(id="c1"))
        await world.call("Delete", task_pb2.DeleteRequest(id="c1"))
        assert world.shutdowns == 0
        await world.call("Delete", task_pb2.DeleteRequest(id="c2"))
        assert world.shutdowns == 1


@on_loop
async def test_deleting_the_last_container_alone_does_not_end_the_shim(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.create()
        await world.call("Delete", task_pb2.DeleteRequest(id=C1))
        assert world.shutdowns == 0
        await world.call("Shutdown", task_pb2.ShutdownRequest(id=C1))
        assert world.shutdowns == 1


@on_loop
async def test_shutdown_while_a_container_is_created_waits_for_it(tmp_path: Path) -> None:
    async with World(tmp_path) as world, asyncio.TaskGroup() as group:
        reached, go = hold(world.agent, "create_container")
        creating = group.create_task(world.create())
        await reached.wait()
        await world.call("Shutdown", task_pb2.ShutdownRequest(id=C1))
        assert world.shutdowns == 0
        go.set()
        await creating
        assert world.shutdowns == 0


# --- what is refused ----------------------------------------------------------------------------

BY_ID: list[tuple[str, Callable[..., Message]]] = [
    ("State", task_pb2.StateRequest),
    ("Start", task_pb2.StartRequest),
    ("Delete", task_pb2.DeleteRequest),
    ("Pids", task_pb2.PidsRequest),
    ("Pause", task_pb2.PauseRequest),
    ("Resume", task_pb2.ResumeRequest),
    ("Kill", task_pb2.KillRequest),
    ("ResizePty", task_pb2.ResizePtyRequest),
    ("Wait", task_pb2.WaitRequest),
    ("Stats", task_pb2.StatsRequest),
    ("CloseIO", lambda **ids: task_pb2.CloseIORequest(stdin=True, **ids)),
    (
        "Exec",
        lambda **ids: task_pb2.ExecProcessRequest(**{"exec_id": E1, "spec": process_any(), **ids}),
    ),
    (
        "Update",
        lambda **ids: task_pb2.UpdateTaskRequest(
            resources=AnyMessage(type_url=OCI_RESOURCES_URL, value=b"{}"), **ids
        ),
    ),
]
OF_EXECS = [
    (method, make)
    for method, make in BY_ID
    if method in {"State", "Start", "Delete", "Kill", "ResizePty", "Wait", "CloseIO"}
]
BAD_IDS = ["../c1", "a/b", "/", ".", "a b", "x" * 300, "ä"]


@pytest.mark.parametrize(("method", "make"), BY_ID)
@on_loop
async def test_an_unknown_container_is_not_found(
    method: str, make: Callable[..., Message], tmp_path: Path
) -> None:
    async with World(tmp_path) as world:
        await world.run()
        with pytest.raises(NotFoundError, match="container other not found"):
            await world.call(method, make(id="other"))


@pytest.mark.parametrize(("method", "make"), OF_EXECS)
@on_loop
async def test_an_unknown_exec_is_not_found(
    method: str, make: Callable[..., Message], tmp_path: Path
) -> None:
    async with World(tmp_path) as world:
        await world.run()
        with pytest.raises(NotFoundError, match="exec other of container c1 not found"):
            await world.call(method, make(id=C1, exec_id="other"))


@on_loop
async def test_bad_ids_are_refused_by_every_call(tmp_path: Path) -> None:
    create = ("Create", lambda **ids: task_pb2.CreateTaskRequest(bundle="/b", **ids))
    connect = ("Connect", task_pb2.ConnectRequest)
    async with World(tmp_path) as world:
        await world.run()
        for method, make in [*BY_ID, create, connect]:
            for bad in ["", *BAD_IDS]:
                with pytest.raises(InvalidArgumentError, match="container id"):
                    await world.call(method, make(id=bad))


@on_loop
async def test_bad_exec_ids_are_refused_by_every_call(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.run()
        for method, make in [*OF_EXECS, BY_ID[11]]:
            for bad in BAD_IDS:
                with pytest.raises(InvalidArgumentError, match="exec id"):
                    await world.call(method, make(id=C1, exec_id=bad))


@on_loop
async def test_an_exec_needs_an_id(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.run()
        with pytest.raises(InvalidArgumentError, match="exec id is empty"):
            await world.exec("")


@on_loop
async def test_checkpoints_are_not_implemented(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.run()
        with pytest.raises(UnimplementedError):
            await world.call("Checkpoint", task_pb2.CheckpointTaskRequest(id=C1, path="/p"))
        with pytest.raises(UnimplementedError, match="restoring a checkpoint"):
            await world.create("c2", checkpoint="/p")


@on_loop
async def test_a_create_that_asks_for_what_is_missing_is_not_asked_again(tmp_path: Path) -> None:
    # containerd takes UNIMPLEMENTED for a method that is missing, and tries an older protocol.
    async with World(tmp_path) as world:
        world.agent.failures["create_container"] = UnimplementedError("guest hooks")
        with pytest.raises(FailedPreconditionError, match="guest hooks"):
            await world.create()


@pytest.mark.parametrize("bundle", ["", "relative", "/a\0b"])
@on_loop
async def test_a_bundle_that_is_no_absolute_path_is_refused(bundle: str, tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        with pytest.raises(InvalidArgumentError):
            await world.create(bundle=bundle)


@on_loop
async def test_a_bundle_that_is_not_there_is_named(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        with pytest.raises(InvalidArgumentError, match=r"/nowhere/config\.json: No such file"):
            await world.create(bundle="/nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "OCI spec is not valid JSON"),
        (json.dumps({**SPEC, "hostname": 1}), "hostname must be a string, is int"),
        (
            json.dumps({**SPEC, "linux": {"resources": {"pids": {"limit": "1"}}}}),
            "linux.resources.pids.limit must be an integer, is str",
        ),
    ],
)
@on_loop
async def test_a_bad_spec_is_told_before_a_machine_is_made(
    text: str, message: str, tmp_path: Path
) -> None:
    async with World(tmp_path) as world:
        world.write_spec(text)
        with pytest.raises(InvalidArgumentError, match=message):
            await world.create()
        assert world.requests == []
        assert world.log.topics == []


@on_loop
async def test_broken_options_are_refused(tmp_path: Path) -> None:
    options = AnyMessage(type_url="runtimeoptions.v1.Options", value=b"\xff\xff")
    async with World(tmp_path) as world:
        with pytest.raises(InvalidArgumentError, match="cannot be decoded"):
            await world.create(options=options)


@on_loop
async def test_the_same_container_twice_is_refused(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.create()
        with pytest.raises(AlreadyExistsError, match="container c1 already exists"):
            await world.create()


@on_loop
async def test_the_same_exec_twice_is_refused(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.run()
        await world.exec()
        with pytest.raises(AlreadyExistsError, match="exec e1 of container c1 already exists"):
            await world.exec()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (process_any(url="google.protobuf.Any"), "expected types.containerd.io/.*Process, got"),
        (AnyMessage(), "got nothing"),
        (process_any("{"), "is not valid JSON"),
        (process_any("[]"), "must be a JSON object, is list"),
        (process_any("{}"), "process.args must not be empty"),
        (process_any('{"args": ["a"], "cwd": "b"}'), "process.cwd must be an absolute path"),
        (process_any('{"args": ["a"], "cwd": "/", "user": []}'), "process.user must be an object"),
    ],
)
@on_loop
async def test_a_bad_process_is_refused(spec: AnyMessage, message: str, tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.run()
        with pytest.raises(InvalidArgumentError, match=message):
            await world.exec(spec=spec)
        assert "/tasks/exec-added" not in world.log.topics


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (AnyMessage(type_url=OCI_PROCESS_URL, value=b"{}"), "expected .*LinuxResources"),
        (AnyMessage(type_url=OCI_RESOURCES_URL, value=b"nope"), "is not valid JSON"),
        (AnyMessage(type_url=OCI_RESOURCES_URL, value=b'{"cpu": 1}'), "cpu must be an object"),
    ],
)
@on_loop
async def test_bad_resources_are_refused(
    resources: AnyMessage, message: str, tmp_path: Path
) -> None:
    async with World(tmp_path) as world:
        await world.run()
        with pytest.raises(InvalidArgumentError, match=message):
            await world.call("Update", task_pb2.UpdateTaskRequest(id=C1, resources=resources))


@on_loop
async def test_a_signal_that_is_none_is_refused(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.run()
        with pytest.raises(InvalidArgumentError, match="signal 65 is not a Linux signal"):
            await world.call("Kill", task_pb2.KillRequest(id=C1, signal=65))


@pytest.mark.parametrize(
    ("method", "request_type", "message"),
    [
        ("Start", task_pb2.StartRequest, "cannot start container c1 in state RUNNING"),
        ("Resume", task_pb2.ResumeRequest, "cannot resume container c1 in state RUNNING"),
        ("Delete", task_pb2.DeleteRequest, "cannot delete container c1 in state RUNNING"),
    ],
)
@on_loop
async def test_what_does_not_fit_a_running_container_is_refused(
    method: str, request_type: Callable[..., Message], message: str, tmp_path: Path
) -> None:
    async with World(tmp_path) as world:
        await world.run()
        with pytest.raises(FailedPreconditionError, match=message):
            await world.call(method, request_type(id=C1))


@on_loop
async def test_killing_what_has_ended_is_not_found(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.run()
        await world.end(0)
        with pytest.raises(NotFoundError, match="container c1 not found: it has already finished"):
            await world.call("Kill", task_pb2.KillRequest(id=C1, signal=9))


@on_loop
async def test_what_the_agent_refuses_is_passed_on(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        world.agent.failures["create_container"] = InvalidArgumentError("no such program /x")
        with pytest.raises(InvalidArgumentError, match=r"^no such program /x$"):
            await world.create()
        assert world.log.topics == []


@on_loop
async def test_a_lost_guest_is_unavailable_and_its_containers_end(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.run()
        world.guest.lose("crashed")
        assert (await world.call("Wait", task_pb2.WaitRequest(id=C1))).exit_status == 255
        with pytest.raises(KataError) as caught:
            await world.create("c2")
        assert isinstance(caught.value, FailedPreconditionError | UnavailableError)
        assert (await world.call("Delete", task_pb2.DeleteRequest(id=C1))).exit_status == 255


@on_loop
async def test_bad_calls_leave_the_service_working(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        for bad in BAD_IDS:
            with pytest.raises(InvalidArgumentError):
                await world.create(bad)
        await world.run()
        assert (await world.state()).status == task_pb2.RUNNING


def record_calls(agent: FakeAgent) -> list[str]:
    """Return a list that grows by the name of each request to the agent."""
    asked: list[str] = []

    async def gate(method: str) -> None:
        asked.append(method)

    agent.gate = gate
    return asked


def hold(agent: FakeAgent, method: str) -> tuple[asyncio.Event, asyncio.Event]:
    """Hold a method's requests; return when one is reached and what lets it go on."""
    reached, go = asyncio.Event(), asyncio.Event()

    async def gate(name: str) -> None:
        if name == method:
            reached.set()
            await go.wait()

    agent.gate = gate
    return reached, go
