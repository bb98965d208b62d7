"""The sandbox against a fake agent, with requests, answers, exits and losses in any order.

Hypothesis draws the commands and, whenever the agent has requests held back, which of them goes on
next. Whatever the order: nothing hangs, nothing but our errors comes out, and containerd sees each
container's story in the right order, with exactly one exit per process that ran.
"""

import asyncio
import json
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kata_hybrid.errors import KataError
from kata_hybrid.persist.store import SandboxStore
from kata_hybrid.runtimes.base import (
    CreateRequest,
    ExecAdded,
    ExecStarted,
    TaskCreated,
    TaskDeleted,
    TaskEvent,
    TaskExited,
    TaskPaused,
    TaskResumed,
    TaskStarted,
)
from kata_hybrid.runtimes.oci.spec import Spec
from kata_hybrid.runtimes.virt.sandbox import VirtSandbox
from kata_hybrid.testing.fake_agent import FakeAgent
from kata_hybrid.testing.fake_guest import FakeGuest, FakeHooks, FakeStreams, prepare_nothing
from kata_hybrid.types import ContainerId, ExecId, JsonObject, SandboxId, Stdio, TaskStatus

CONTAINERS = (ContainerId("sandbox"), ContainerId("second"))
EXECS = (ExecId("e1"), ExecId("e2"))
PROCESS: JsonObject = {"args": ["/bin/true"], "cwd": "/"}
SPEC = {"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "process": PROCESS}

containers = st.sampled_from(CONTAINERS)
execs = st.sampled_from(EXECS)
targets = st.tuples(containers, st.none() | execs)
commands = st.one_of(
    st.tuples(st.just("create"), containers),
    st.tuples(st.just("start"), targets),
    st.tuples(st.just("exec"), st.tuples(containers, execs)),
    st.tuples(st.just("kill"), targets),
    st.tuples(st.just("term"), targets),
    st.tuples(st.just("exit"), targets),
    st.tuples(st.just("pause"), containers),
    st.tuples(st.just("resume"), containers),
    st.tuples(st.just("delete"), targets),
    st.tuples(st.just("wait"), targets),
    st.tuples(st.just("fail"), st.sampled_from(["create_container", "start_container"])),
    st.just(("release", None)),
    st.just(("release", None)),
    st.just(("lose", None)),
)


@dataclass
class EventLog:
    """Collects what the sandbox reports."""

    events: list[TaskEvent] = field(default_factory=list)

    def emit(self, event: TaskEvent) -> None:
        self.events.append(event)


class World:
    """A sandbox, its fake guest, and the requests held back at the agent's gate."""

    def __init__(self, folder: Path, *, features: frozenset[str]) -> None:
        self.agent = FakeAgent(features=features)
        self.agent.gate = self._gate
        self.guest = FakeGuest(self.agent, folder=folder)
        self.log = EventLog()
        self.held: list[asyncio.Future[None]] = []
        self.is_open = False
        self.requests: list[asyncio.Task[object]] = []
        bundle = folder / "bundle"
        bundle.mkdir()
        (bundle / "config.json").write_text(json.dumps(SPEC))
        self.bundle = bundle
        self.sandbox = VirtSandbox(
            guest_factory=self._make_guest,
            streams=FakeStreams(),
            store=SandboxStore(folder, sandbox_id=SandboxId("sandbox"), namespace="test"),
            events=self.log,
            hooks=FakeHooks(),
            preparer=prepare_nothing,
        )

    async def _make_guest(self, _request: CreateRequest, _spec: Spec) -> FakeGuest:
        return self.guest

    async def _gate(self, _method: str) -> None:
        if not self.is_open:
            future = asyncio.get_running_loop().create_future()
            self.held.append(future)
            await future

    def release(self, index: int) -> None:
        if self.held:
            future = self.held.pop(index % len(self.held))
            if not future.done():
                future.set_result(None)

    def request(self, work: Coroutine[object, object, object]) -> None:
        self.requests.append(asyncio.get_running_loop().create_task(work))

    def run(self, name: str, target: Any) -> None:  # noqa: C901 - one case for each command
        sandbox = self.sandbox
        match name, target:
            case "create", str(container):
                request = CreateRequest(
                    container_id=ContainerId(container),
                    bundle=self.bundle,
                    rootfs=(),
                    stdio=Stdio(),
                    config_path=None,
                )
                self.request(sandbox.create(request))
            case "start", (container, exec_id):
                self.request(sandbox.start(container, exec_id))
            case "exec", (container, exec_id):
                self.request(sandbox.exec(container, exec_id, process=PROCESS, stdio=Stdio()))
            case "kill", (container, exec_id):
                self.request(sandbox.kill(container, exec_id, signal=9, is_all=False))
            case "term", (container, exec_id):
                self.request(sandbox.kill(container, exec_id, signal=15, is_all=False))
            case "exit", (container, exec_id):
                self.agent.exit(container, exec_id, 7)
            case "pause", str(container):
                self.request(sandbox.pause(ContainerId(container)))
            case "resume", str(container):
                self.request(sandbox.resume(ContainerId(container)))
            case "delete", (container, exec_id):
                self.request(sandbox.delete(container, exec_id))
            case "wait", (container, exec_id):
                self.request(sandbox.wait(container, exec_id))
            case "fail", str(method):
                self.agent.failures[method] = KataError("drawn failure")
            case "lose", _:
                self.guest.lose("drawn loss")

    def open_gate(self) -> None:
        self.is_open = True
        while self.held:
            self.release(0)


def check_story(events: list[TaskEvent]) -> None:
    """Check one container's events, in order of arrival, between its create and its delete."""
    state = "none"
    running: set[ExecId] = set()
    for event in events:
        match event:
            case TaskCreated():
                assert state == "none", "created twice"
                state = "created"
            case TaskStarted():
                assert state == "created", f"started when {state}"
                state = "running"
            case TaskPaused() | TaskResumed():
                assert state == "running", f"paused or resumed when {state}"
            case ExecAdded():
                assert state in {"created", "running"}, f"exec added when {state}"
            case ExecStarted():
                assert state in {"created", "running"}, f"exec started when {state}"
                assert event.exec_id not in running
                running.add(event.exec_id)
            case TaskExited(exec_id=None):
                assert state in {"created", "running"}, f"exit when {state}"
                assert not running, "an exec's exit must come before its container's"
                state = "stopped"
            case TaskExited():
                assert event.exec_id in running, "exit of an exec that does not run"
                running.discard(event.exec_id)
            case TaskDeleted():
                assert state in {"created", "stopped"}, f"deleted when {state}"
                assert not running
                state = "none"


async def play(
    folder: Path, script: list[tuple[str, object]], order: list[int], features: frozenset[str]
) -> World:
    world = World(folder, features=features)
    releases = iter(order)
    for name, target in script:
        if name == "release":
            world.release(next(releases, 0))
        else:
            world.run(name, target)
        for _ in range(8):
            await asyncio.sleep(0)
    world.open_gate()
    # Whoever still waits does so for a process that runs: end them all.
    async with asyncio.timeout(10):
        rounds = 0
        while any(not request.done() for request in world.requests):
            for container in CONTAINERS:
                for exec_id in (*EXECS, None):
                    world.agent.exit(container, exec_id, 7)
            pending = [request for request in world.requests if not request.done()]
            await asyncio.wait(pending, timeout=0.001)
            rounds += 1
            if rounds > 20:
                # A wait on a process that was never started ends with its sandbox.
                await world.sandbox.close()
        await world.sandbox.close()
        await asyncio.gather(*world.requests, return_exceptions=True)
    return world


@settings(max_examples=300, deadline=None)
@given(
    script=st.lists(commands, max_size=30),
    order=st.lists(st.integers(0, 7), max_size=30),
    features=st.sampled_from([frozenset[str](), frozenset({"wait-keeps-output"})]),
)
def test_any_interleaving_tells_an_ordered_story(
    script: list[tuple[str, object]], order: list[int], features: frozenset[str]
) -> None:
    begin: list[tuple[str, object]] = [("create", CONTAINERS[0]), *[("release", None)] * 4]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        world = asyncio.run(play(Path(folder), begin + script, order, features))
    for request in world.requests:
        error = request.exception()
        assert error is None or isinstance(error, KataError), repr(error)
    for container in CONTAINERS:
        check_story([event for event in world.log.events if event.container_id == container])
    started = {
        (event.container_id, getattr(event, "exec_id", None))
        for event in world.log.events
        if isinstance(event, TaskStarted | ExecStarted)
    }
    exited = {
        (event.container_id, event.exec_id)
        for event in world.log.events
        if isinstance(event, TaskExited)
    }
    assert started <= exited, "a process that ran has no exit"
    assert TaskStatus.RUNNING not in {
        process.status
        for container in world.sandbox._containers.all
        for process in (container.process, *container.execs.values())
    }
