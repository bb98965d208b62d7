"""What every agent must do: the fake in memory, and the real client across a real wire.

The second is the shim's ``AgentClient`` with its native thread, connected to a server whose answers
come from the same fake. A fake that drifts from the protocol's mapping fails here.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

import pytest

from harness.agent_server import AgentServer
from harness.loop import on_loop
from kata_hybrid._native import events as native_events
from kata_hybrid._native import vsock
from kata_hybrid.agent.base import Agent
from kata_hybrid.agent.client import AgentClient
from kata_hybrid.agent.streams import HostStreams
from kata_hybrid.aio.events import NativeEvents
from kata_hybrid.errors import (
    AbortedError,
    AgentUnavailableError,
    AlreadyExistsError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    KataError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnavailableError,
    UnimplementedError,
)
from kata_hybrid.testing.fake_agent import FakeAgent
from kata_hybrid.types import ContainerId, ExecId, SandboxId

C1, C2 = ContainerId("c1"), ContainerId("c2")
E1, E2 = ExecId("e1"), ExecId("e2")
TIMEOUT_S = 10.0


class World:
    """An agent under test and the guest behind it."""

    def __init__(self, agent: Agent, guest: FakeAgent, server: AgentServer | None) -> None:
        self.agent = agent
        self.guest = guest
        self._server = server

    async def vanish(self) -> None:
        """End the guest."""
        self.guest.disconnect()
        if self._server is not None:
            await self._server.close()

    async def create(self, container_id: ContainerId = C1) -> None:
        await self.agent.create_container(
            container_id, spec={}, storages=(), has_sandbox_pidns=False
        )

    async def run(self, container_id: ContainerId = C1) -> None:
        await self.create(container_id)
        await self.agent.start_container(container_id)


class MakeWorld(Protocol):
    """Opens a connected agent."""

    def __call__(self, folder: Path) -> contextlib.AbstractAsyncContextManager[World]:
        """Return it, to be closed by the caller."""


@contextlib.asynccontextmanager
async def fake_world(folder: Path) -> AsyncIterator[World]:
    del folder
    agent = FakeAgent(features=frozenset({"wait-keeps-output"}))
    async with asyncio.timeout(2 * TIMEOUT_S):
        await agent.connect(address="fake", port=1024, timeout_s=TIMEOUT_S)
        yield World(agent, agent, None)
        await agent.close()


@contextlib.asynccontextmanager
async def wire_world(folder: Path) -> AsyncIterator[World]:
    guest = FakeAgent(features=frozenset({"wait-keeps-output"}))
    server = AgentServer(guest, path=folder / "agent.sock")
    native = NativeEvents(native_events.EventPort())
    io = vsock.IoThread(native.port)
    agent = AgentClient(io, native, timeout_s=TIMEOUT_S)
    try:
        async with asyncio.timeout(2 * TIMEOUT_S):
            await server.start()
            await agent.connect(
                address=f"unix://{folder}/agent.sock", port=1024, timeout_s=TIMEOUT_S
            )
            yield World(agent, guest, server)
    finally:
        await agent.close()
        await server.close()
        io.close()
        native.close()


both = pytest.mark.parametrize("make", [fake_world, wire_world], ids=["fake", "wire"])


@both
@on_loop
async def test_a_connected_agent_is_healthy(make: MakeWorld, tmp_path: Path) -> None:
    async with make(tmp_path) as world:
        await world.agent.check(timeout_s=TIMEOUT_S)


@both
@on_loop
async def test_a_sandbox_is_created(make: MakeWorld, tmp_path: Path) -> None:
    async with make(tmp_path) as world:
        await world.agent.create_sandbox(SandboxId("s"), hostname="box", dns=(), storages=())


@both
@on_loop
async def test_guest_details_are_told(make: MakeWorld, tmp_path: Path) -> None:
    async with make(tmp_path) as world:
        details = await world.agent.guest_details()
        assert (details.agent_version, details.supports_seccomp) == ("fake", True)
        assert details.extra_features == frozenset({"wait-keeps-output"})


@both
@on_loop
async def test_a_container_runs_until_it_ends(make: MakeWorld, tmp_path: Path) -> None:
    async with make(tmp_path) as world, asyncio.TaskGroup() as group:
        await world.run()
        waiting = group.create_task(world.agent.wait_process(C1, None))
        await world.agent.check(timeout_s=TIMEOUT_S)
        assert not waiting.done()
        world.guest.exit(C1, None, 42)
        assert await waiting == 42


@both
@on_loop
async def test_an_exit_of_a_container_can_be_asked_for_again(
    make: MakeWorld, tmp_path: Path
) -> None:
    async with make(tmp_path) as world:
        await world.run()
        world.guest.exit(C1, None, 1)
        assert await world.agent.wait_process(C1, None) == 1
        assert await world.agent.wait_process(C1, None) == 1


@both
@on_loop
async def test_an_exec_runs_until_it_ends_and_is_forgotten(make: MakeWorld, tmp_path: Path) -> None:
    async with make(tmp_path) as world:
        await world.run()
        await world.agent.exec_process(C1, E1, process={})
        world.guest.exit(C1, E1, 5)
        assert await world.agent.wait_process(C1, E1) == 5
        with pytest.raises(NotFoundError):
            await world.agent.wait_process(C1, E1)


@both
@on_loop
async def test_a_container_exists_once(make: MakeWorld, tmp_path: Path) -> None:
    async with make(tmp_path) as world:
        await world.create()
        with pytest.raises(AlreadyExistsError):
            await world.create()


@both
@on_loop
async def test_an_exec_exists_once(make: MakeWorld, tmp_path: Path) -> None:
    async with make(tmp_path) as world:
        await world.run()
        await world.agent.exec_process(C1, E1, process={})
        with pytest.raises(AlreadyExistsError):
            await world.agent.exec_process(C1, E1, process={})


@both
@on_loop
async def test_an_exec_in_a_container_that_ended_is_refused(
    make: MakeWorld, tmp_path: Path
) -> None:
    async with make(tmp_path) as world:
        await world.run()
        world.guest.exit(C1, None, 0)
        with pytest.raises(InternalError):
            await world.agent.exec_process(C1, E1, process={})


@both
@on_loop
async def test_an_unknown_container_is_an_invalid_argument(make: MakeWorld, tmp_path: Path) -> None:
    async with make(tmp_path) as world:
        agent = world.agent
        for request in (
            agent.start_container(C1),
            agent.remove_container(C1, timeout_s=1),
            agent.exec_process(C1, E1, process={}),
            agent.signal_process(C1, None, 9),
            agent.wait_process(C1, None),
            agent.resize_terminal(C1, None, rows=1, columns=1),
            agent.update_container(C1, resources={}),
            agent.stats_container(C1),
            agent.pause_container(C1),
            agent.resume_container(C1),
        ):
            with pytest.raises(InvalidArgumentError, match="container c1 unknown"):
                await request


@both
@on_loop
async def test_an_unknown_exec_is_not_found(make: MakeWorld, tmp_path: Path) -> None:
    async with make(tmp_path) as world:
        await world.run()
        agent = world.agent
        for request in (
            agent.signal_process(C1, E1, 9),
            agent.wait_process(C1, E1),
            agent.resize_terminal(C1, E1, rows=1, columns=1),
        ):
            with pytest.raises(NotFoundError, match="exec e1 unknown"):
                await request


@pytest.mark.parametrize(("signal", "status"), [(9, 137), (15, 143)])
@both
@on_loop
async def test_a_signal_ends_a_process(
    make: MakeWorld, signal: int, status: int, tmp_path: Path
) -> None:
    async with make(tmp_path) as world:
        await world.run()
        await world.agent.signal_process(C1, None, signal)
        assert await world.agent.wait_process(C1, None) == status


@both
@on_loop
async def test_a_signal_to_what_has_ended_is_not_found(make: MakeWorld, tmp_path: Path) -> None:
    async with make(tmp_path) as world:
        await world.run()
        world.guest.exit(C1, None, 0)
        with pytest.raises(NotFoundError):
            await world.agent.signal_process(C1, None, 9)


@both
@on_loop
async def test_a_container_takes_its_execs_along(make: MakeWorld, tmp_path: Path) -> None:
    async with make(tmp_path) as world:
        await world.run()
        await world.agent.exec_process(C1, E1, process={})
        await world.agent.signal_process(C1, None, 9)
        assert await world.agent.wait_process(C1, E1) == 137


@both
@on_loop
async def test_a_removed_container_is_unknown_and_may_come_again(
    make: MakeWorld, tmp_path: Path
) -> None:
    async with make(tmp_path) as world:
        await world.run()
        await world.agent.remove_container(C1, timeout_s=1)
        with pytest.raises(InvalidArgumentError):
            await world.agent.start_container(C1)
        await world.run()


@both
@on_loop
async def test_a_container_is_resized_updated_paused_and_read(
    make: MakeWorld, tmp_path: Path
) -> None:
    async with make(tmp_path) as world:
        await world.run()
        await world.agent.resize_terminal(C1, None, rows=24, columns=80)
        await world.agent.update_container(C1, resources={"memory": {"limit": 1}})
        await world.agent.pause_container(C1)
        assert world.guest.paused == {C1}
        await world.agent.resume_container(C1)
        assert world.guest.paused == set()
        assert (await world.agent.stats_container(C1)).pids_current == 1


@both
@on_loop
async def test_memory_kills_are_told_in_order(make: MakeWorld, tmp_path: Path) -> None:
    async with make(tmp_path) as world, asyncio.TaskGroup() as group:
        first = group.create_task(world.agent.oom_event())
        await world.agent.check(timeout_s=TIMEOUT_S)
        assert not first.done()
        world.guest.out_of_memory(C2)
        world.guest.out_of_memory(C1)
        assert await first == C2
        assert await world.agent.oom_event() == C1


@pytest.mark.parametrize(
    "kind",
    [
        AbortedError,
        AlreadyExistsError,
        DeadlineExceededError,
        FailedPreconditionError,
        InternalError,
        InvalidArgumentError,
        NotFoundError,
        PermissionDeniedError,
        ResourceExhaustedError,
        UnavailableError,
        UnimplementedError,
    ],
)
@both
@on_loop
async def test_what_the_guest_answers_keeps_its_kind(
    make: MakeWorld, kind: type[KataError], tmp_path: Path
) -> None:
    async with make(tmp_path) as world:
        world.guest.failures["pause_container"] = kind("reason of the guest")
        with pytest.raises(kind) as caught:
            await world.agent.pause_container(C1)
        assert caught.value.code == kind.code
        causes = [str(caught.value), str(caught.value.__cause__)]
        assert any("reason of the guest" in text for text in causes)


@both
@on_loop
async def test_a_failed_request_does_not_harm_the_next(make: MakeWorld, tmp_path: Path) -> None:
    async with make(tmp_path) as world:
        world.guest.failures["create_container"] = InternalError("once")
        with pytest.raises(InternalError, match="once"):
            await world.create()
        await world.create()


@both
@on_loop
async def test_answers_arrive_in_any_order(make: MakeWorld, tmp_path: Path) -> None:
    names = [ContainerId(f"c{number}") for number in range(50)]
    async with make(tmp_path) as world, asyncio.TaskGroup() as group:
        for name in names:
            await world.run(name)
        waits = [group.create_task(world.agent.wait_process(name, None)) for name in names]
        await world.agent.check(timeout_s=TIMEOUT_S)
        for number, name in reversed(list(enumerate(names))):
            world.guest.exit(name, None, number)
        assert [await wait for wait in waits] == list(range(50))


@both
@on_loop
async def test_a_wait_given_up_does_not_harm_the_process(make: MakeWorld, tmp_path: Path) -> None:
    async with make(tmp_path) as world:
        await world.run()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await world.agent.wait_process(C1, None)
        world.guest.exit(C1, None, 6)
        assert await world.agent.wait_process(C1, None) == 6


@both
@on_loop
async def test_a_guest_that_vanishes_fails_what_is_under_way(
    make: MakeWorld, tmp_path: Path
) -> None:
    async with make(tmp_path) as world, asyncio.TaskGroup() as group:
        await world.run()
        waits = [
            group.create_task(outcome(world.agent.wait_process(C1, None))),
            group.create_task(outcome(world.agent.oom_event())),
        ]
        await world.agent.check(timeout_s=TIMEOUT_S)
        await world.vanish()
        assert [type(await wait) for wait in waits] == [AgentUnavailableError] * 2
        await world.agent.closed()
        with pytest.raises(AgentUnavailableError):
            await world.agent.check(timeout_s=TIMEOUT_S)


@both
@on_loop
async def test_a_closed_agent_answers_nothing(make: MakeWorld, tmp_path: Path) -> None:
    async with make(tmp_path) as world, asyncio.TaskGroup() as group:
        await world.run()
        waiting = group.create_task(outcome(world.agent.wait_process(C1, None)))
        await world.agent.check(timeout_s=TIMEOUT_S)
        await world.agent.close()
        await world.agent.close()
        await world.agent.closed()
        assert isinstance(await waiting, AgentUnavailableError)
        with pytest.raises(AgentUnavailableError):
            await world.agent.start_container(C1)


@both
@on_loop
async def test_copies_are_drained_when_the_process_has_ended(
    make: MakeWorld, tmp_path: Path
) -> None:
    async with make(tmp_path) as world, asyncio.TaskGroup() as group:
        await world.run()
        copies = world.agent.copy_streams(C1, None, streams=nowhere())
        drained = group.create_task(copies.drained())
        await world.agent.check(timeout_s=TIMEOUT_S)
        assert not drained.done()
        world.guest.exit(C1, None, 0)
        await drained
        await copies.drained()
        copies.stop()


@both
@on_loop
async def test_stopped_copies_are_drained_and_release_their_descriptors(
    make: MakeWorld, tmp_path: Path
) -> None:
    async with make(tmp_path) as world:
        await world.run()
        reader, writer = os.pipe()
        streams = nowhere()
        os.close(streams.stdout)
        streams.stdout = writer
        copies = world.agent.copy_streams(C1, None, streams=streams)
        copies.stop()
        copies.stop()
        await copies.drained()
        assert os.read(reader, 1) == b""
        os.close(reader)


@both
@on_loop
async def test_stdin_is_closed_any_number_of_times(make: MakeWorld, tmp_path: Path) -> None:
    async with make(tmp_path) as world:
        await world.run()
        copies = world.agent.copy_streams(C1, None, streams=nowhere())
        copies.close_stdin()
        copies.close_stdin()
        copies.stop()
        copies.close_stdin()


@both
@on_loop
async def test_copies_end_with_the_guest(make: MakeWorld, tmp_path: Path) -> None:
    async with make(tmp_path) as world:
        await world.run()
        copies = world.agent.copy_streams(C1, None, streams=nowhere())
        world.guest.exit(C1, None, 0)
        await world.vanish()
        await copies.drained()
        copies.stop()


async def outcome(work: object) -> object:
    """Return what an awaitable raises, or its value."""
    try:
        return await work  # type: ignore[misc]
    except KataError as exc:
        return exc


def nowhere() -> HostStreams:
    return HostStreams(
        stdout=os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC),
        stderr=os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC),
    )
