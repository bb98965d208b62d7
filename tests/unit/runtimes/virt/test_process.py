import asyncio
import itertools

import pytest

from harness.loop import on_loop
from kata_hybrid.agent.streams import HostStreams
from kata_hybrid.errors import InvalidStateError
from kata_hybrid.runtimes.virt.process import Process
from kata_hybrid.testing.fake_agent import FakeCopies, FakeProcess
from kata_hybrid.types import ContainerId, ExecId, Stdio, TaskStatus

ALLOWED = {
    "start": {TaskStatus.CREATED},
    "exec": {TaskStatus.CREATED, TaskStatus.RUNNING},
    "pause": {TaskStatus.RUNNING},
    "resume": {TaskStatus.PAUSED},
    "update": {TaskStatus.CREATED, TaskStatus.RUNNING, TaskStatus.PAUSED},
    "delete": {TaskStatus.CREATED, TaskStatus.STOPPED},
}
WAYS = {
    TaskStatus.CREATED: (),
    TaskStatus.RUNNING: (TaskStatus.RUNNING,),
    TaskStatus.PAUSING: (TaskStatus.RUNNING, TaskStatus.PAUSING),
    TaskStatus.PAUSED: (TaskStatus.RUNNING, TaskStatus.PAUSING, TaskStatus.PAUSED),
}
ARROWS = {
    (TaskStatus.CREATED, TaskStatus.RUNNING),
    (TaskStatus.RUNNING, TaskStatus.PAUSING),
    (TaskStatus.PAUSING, TaskStatus.PAUSED),
    (TaskStatus.PAUSING, TaskStatus.RUNNING),
    (TaskStatus.PAUSED, TaskStatus.RUNNING),
}


def make(exec_id: str | None = None) -> Process:
    return Process(
        ContainerId("c1"), ExecId(exec_id) if exec_id else None, stdio=Stdio(), bundle="/b"
    )


def process_in(status: TaskStatus) -> Process:
    process = make()
    if status is TaskStatus.STOPPED:
        process.end(0)
    else:
        for step in WAYS[status]:
            process.move(step)
    return process


@pytest.mark.parametrize(
    ("request_name", "status"), list(itertools.product(ALLOWED, [*WAYS, TaskStatus.STOPPED]))
)
def test_a_request_is_allowed_in_the_states_of_the_drawing(
    request_name: str, status: TaskStatus
) -> None:
    process = process_in(status)
    if status in ALLOWED[request_name]:
        process.request(request_name)
    else:
        text = f"cannot {request_name} container c1 in state {status.name}"
        with pytest.raises(InvalidStateError, match=text):
            process.request(request_name)


@pytest.mark.parametrize(
    ("old", "new"), list(itertools.product([*WAYS, TaskStatus.STOPPED], TaskStatus))
)
def test_only_arrows_of_the_drawing_can_be_followed(old: TaskStatus, new: TaskStatus) -> None:
    process = process_in(old)
    if (old, new) in ARROWS:
        process.move(new)
        assert process.status is new
    else:
        with pytest.raises(InvalidStateError):
            process.move(new)
        assert process.status is old


@pytest.mark.parametrize("status", WAYS)
def test_an_exit_is_recorded_once_from_any_state(status: TaskStatus) -> None:
    process = process_in(status)
    first = process.end(3)
    assert first is not None
    assert first.status == 3
    assert process.end(4) is None
    assert process.exit == first
    assert process.is_stopped


@on_loop
async def test_everyone_who_waits_gets_the_exit() -> None:
    process = make()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        waits = [group.create_task(process.wait()) for _ in range(3)]
        ended = process.end(5)
    assert [wait.result() for wait in waits] == [ended] * 3
    assert await process.wait() == ended


def test_a_process_is_named_as_users_know_it() -> None:
    assert str(make()) == "container c1"
    assert str(make("e1")) == "exec e1 of container c1"


def test_a_description_holds_everything() -> None:
    process = make("e1")
    ended = process.end(1)
    state = process.describe(pid=7)
    assert (state.container_id, state.exec_id, state.bundle, state.pid) == ("c1", "e1", "/b", 7)
    assert (state.status, state.exit) == (TaskStatus.STOPPED, ended)


@on_loop
async def test_stdin_closed_early_is_remembered() -> None:
    process = make()
    process.close_stdin()
    assert process.is_stdin_closed
    process.copies = copies = FakeCopies(FakeProcess(), HostStreams())
    process.close_stdin()
    assert copies.is_stdin_closed


@on_loop
async def test_release_stops_the_copies_and_repeats() -> None:
    process = make()
    process.release()
    process.copies = copies = FakeCopies(FakeProcess(), HostStreams())
    process.streams = HostStreams()
    process.release()
    process.release()
    async with asyncio.timeout(10):
        await copies.drained()
