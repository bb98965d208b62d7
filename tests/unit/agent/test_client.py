"""What the wire adds to the agent contract: messages, deadlines, descriptors, broken answers."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from google.protobuf.message import Message

from harness.agent_server import AgentServer
from harness.loop import on_loop
from kata_hybrid._native import events as native_events
from kata_hybrid._native import vsock
from kata_hybrid.agent.client import AgentClient
from kata_hybrid.agent.streams import HostStreams, open_streams
from kata_hybrid.aio.events import NativeEvents
from kata_hybrid.errors import (
    AgentProtocolError,
    AgentTimeoutError,
    AgentUnavailableError,
    GuestBootTimeoutError,
    InvalidSpecError,
    ResourceExhaustedError,
)
from kata_hybrid.protos import agent_pb2, health_pb2, oci_pb2
from kata_hybrid.testing.fake_agent import FakeAgent
from kata_hybrid.types import ContainerId, ExecId, GuestStorage, SandboxId, Stdio

C1 = ContainerId("c1")
E1 = ExecId("e1")
TIMEOUT_S = 10.0
STORAGE = GuestStorage(driver="blk", source="02", fstype="ext4", mount_point="/m")
STORAGE_MESSAGE = agent_pb2.Storage(driver="blk", source="02", fstype="ext4", mount_point="/m")
SPEC: dict[str, object] = {"ociVersion": "1.0.2", "process": {"args": ["sh"], "cwd": "/"}}


class World:
    """A client and a scripted server."""

    def __init__(self, folder: Path, *, client: AgentClient) -> None:
        self.client = client
        self.guest = FakeAgent()
        self.path = folder / "agent.sock"
        self.address = f"unix://{self.path}"
        self.server = AgentServer(self.guest, path=self.path)

    async def connect(self) -> None:
        await self.server.start()
        await self.client.connect(address=self.address, port=1024, timeout_s=TIMEOUT_S)

    async def run(self) -> None:
        await self.client.create_container(C1, spec={}, storages=(), has_sandbox_pidns=False)
        await self.client.start_container(C1)

    def asked(self, method: str) -> Message:
        request: Message = self.server.requests[method]
        return request


@contextlib.asynccontextmanager
async def unconnected(folder: Path, *, timeout_s: float = TIMEOUT_S) -> AsyncIterator[World]:
    """Yield a client that has not dialled; at the end no descriptor is left open."""
    before = descriptors()
    native = NativeEvents(native_events.EventPort())
    io = vsock.IoThread(native.port)
    client = AgentClient(io, native, timeout_s=timeout_s)
    world = World(folder, client=client)
    try:
        async with asyncio.timeout(2 * TIMEOUT_S):
            yield world
    finally:
        await client.close()
        await world.server.close()
        io.close()
        native.close()
    assert descriptors() == before


@contextlib.asynccontextmanager
async def connected(folder: Path, *, timeout_s: float = TIMEOUT_S) -> AsyncIterator[World]:
    async with unconnected(folder, timeout_s=timeout_s) as world:
        await world.connect()
        yield world


# --- connecting ---------------------------------------------------------------------------------


@on_loop
async def test_connecting_checks_health(tmp_path: Path) -> None:
    async with connected(tmp_path) as world:
        assert world.asked("Check") == health_pb2.CheckRequest()


@on_loop
async def test_an_agent_that_does_not_serve_is_unavailable(tmp_path: Path) -> None:
    async with unconnected(tmp_path) as world:
        world.server.health = health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(AgentUnavailableError, match="is not serving"):
            await world.connect()


@on_loop
async def test_nobody_listening_is_a_boot_timeout_that_names_the_address(tmp_path: Path) -> None:
    async with unconnected(tmp_path) as world:
        with pytest.raises(GuestBootTimeoutError, match=r"agent\.sock port 1024 .* in 0\.05 s"):
            await world.client.connect(address=world.address, port=1024, timeout_s=0.05)


@on_loop
async def test_an_agent_that_takes_the_call_and_stays_silent_is_a_boot_timeout(
    tmp_path: Path,
) -> None:
    async with unconnected(tmp_path) as world:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(world.path))
            listener.listen()
            with pytest.raises(GuestBootTimeoutError, match=r"agent\.sock port 1024"):
                await world.client.connect(address=world.address, port=1024, timeout_s=0.05)


@on_loop
async def test_connecting_waits_for_the_agent_to_come_up(tmp_path: Path) -> None:
    async with unconnected(tmp_path) as world, asyncio.TaskGroup() as group:
        connecting = group.create_task(
            world.client.connect(address=world.address, port=1024, timeout_s=TIMEOUT_S)
        )
        await world.server.start()
        await connecting


@on_loop
async def test_connecting_can_be_given_up(tmp_path: Path) -> None:
    async with unconnected(tmp_path) as world:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await world.client.connect(address=world.address, port=1024, timeout_s=TIMEOUT_S)


@on_loop
async def test_nothing_can_be_asked_before_connecting(tmp_path: Path) -> None:
    async with unconnected(tmp_path) as world:
        with pytest.raises(AgentUnavailableError, match="not connected"):
            await world.client.check(timeout_s=TIMEOUT_S)
        with pytest.raises(AgentUnavailableError, match="not connected"):
            world.client.copy_streams(C1, None, streams=HostStreams())
        await world.client.closed()


@on_loop
async def test_an_agent_without_log_port_is_no_error(tmp_path: Path) -> None:
    async with connected(tmp_path) as world, asyncio.TaskGroup() as group:
        log = group.create_task(world.client.forward_log(address="unix:///nowhere", port=1025))
        await world.client.check(timeout_s=TIMEOUT_S)
        log.cancel()


# --- messages -----------------------------------------------------------------------------------


@on_loop
async def test_a_sandbox_is_described(tmp_path: Path) -> None:
    async with connected(tmp_path) as world:
        await world.client.create_sandbox(
            SandboxId("s"), hostname="box", dns=("nameserver 1",), storages=(STORAGE,)
        )
        assert world.asked("CreateSandbox") == agent_pb2.CreateSandboxRequest(
            hostname="box", dns=["nameserver 1"], sandbox_id="s", storages=[STORAGE_MESSAGE]
        )


@on_loop
async def test_a_container_is_described(tmp_path: Path) -> None:
    async with connected(tmp_path) as world:
        await world.client.create_container(
            C1, spec=SPEC, storages=(STORAGE,), has_sandbox_pidns=True
        )
        assert world.asked("CreateContainer") == agent_pb2.CreateContainerRequest(
            container_id="c1",
            storages=[STORAGE_MESSAGE],
            OCI=oci_pb2.Spec(Version="1.0.2", Process=oci_pb2.Process(Args=["sh"], Cwd="/")),
            sandbox_pidns=True,
        )


@on_loop
async def test_ids_and_values_are_where_the_agent_looks(tmp_path: Path) -> None:
    async with connected(tmp_path) as world:
        client = world.client
        await world.run()
        await client.exec_process(C1, E1, process={"args": ["ls"], "cwd": "/"})
        await client.resize_terminal(C1, E1, rows=24, columns=80)
        await client.update_container(C1, resources={"pids": {"limit": 9}})
        await client.pause_container(C1)
        await client.resume_container(C1)
        await client.stats_container(C1)
        await client.guest_details()
        await client.signal_process(C1, E1, 9)
        await client.wait_process(C1, E1)
        await client.remove_container(C1, timeout_s=7)
        expected: dict[str, Message] = {
            "StartContainer": agent_pb2.StartContainerRequest(container_id="c1"),
            "ExecProcess": agent_pb2.ExecProcessRequest(
                container_id="c1", exec_id="e1", process=oci_pb2.Process(Args=["ls"], Cwd="/")
            ),
            "TtyWinResize": agent_pb2.TtyWinResizeRequest(
                container_id="c1", exec_id="e1", row=24, column=80
            ),
            "UpdateContainer": agent_pb2.UpdateContainerRequest(
                container_id="c1",
                resources=oci_pb2.LinuxResources(Pids=oci_pb2.LinuxPids(Limit=9)),
            ),
            "PauseContainer": agent_pb2.PauseContainerRequest(container_id="c1"),
            "ResumeContainer": agent_pb2.ResumeContainerRequest(container_id="c1"),
            "StatsContainer": agent_pb2.StatsContainerRequest(container_id="c1"),
            "GetGuestDetails": agent_pb2.GuestDetailsRequest(
                mem_block_size=True, mem_hotplug_probe=True
            ),
            "SignalProcess": agent_pb2.SignalProcessRequest(
                container_id="c1", exec_id="e1", signal=9
            ),
            "WaitProcess": agent_pb2.WaitProcessRequest(container_id="c1", exec_id="e1"),
            "RemoveContainer": agent_pb2.RemoveContainerRequest(container_id="c1", timeout=7),
        }
        assert {name: world.asked(name) for name in expected} == expected


@on_loop
async def test_a_spec_that_does_not_fit_is_not_sent(tmp_path: Path) -> None:
    async with connected(tmp_path) as world:
        with pytest.raises(InvalidSpecError, match="hostname must be a string"):
            await world.client.create_container(
                C1, spec={"hostname": 1}, storages=(), has_sandbox_pidns=False
            )
        assert "CreateContainer" not in world.server.requests


# --- deadlines ----------------------------------------------------------------------------------


@on_loop
async def test_an_agent_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    async with connected(tmp_path, timeout_s=0.05) as world:
        world.guest.gate = never
        with pytest.raises(AgentTimeoutError, match=r"did not answer PauseContainer in 0\.05 s"):
            await world.client.pause_container(C1)


@on_loop
async def test_a_health_check_has_its_own_deadline(tmp_path: Path) -> None:
    async with connected(tmp_path) as world:
        world.guest.gate = never
        with pytest.raises(AgentTimeoutError, match=r"did not answer Check in 0\.01 s"):
            await world.client.check(timeout_s=0.01)


@on_loop
async def test_the_shortest_deadline_is_still_one(tmp_path: Path) -> None:
    async with connected(tmp_path) as world:
        world.guest.gate = never
        with pytest.raises(AgentTimeoutError):
            await world.client.check(timeout_s=0.000_1)


@on_loop
async def test_waiting_for_an_exit_has_no_deadline(tmp_path: Path) -> None:
    async with connected(tmp_path, timeout_s=0.05) as world, asyncio.TaskGroup() as group:
        await world.run()
        waiting = group.create_task(world.client.wait_process(C1, None))
        oom = group.create_task(world.client.oom_event())
        await world.client.check(timeout_s=TIMEOUT_S)
        world.guest.gate = never
        with pytest.raises(AgentTimeoutError):
            await world.client.pause_container(C1)
        assert not waiting.done()
        assert not oom.done()
        world.guest.exit(C1, None, 3)
        world.guest.out_of_memory(C1)
        assert (await waiting, await oom) == (3, C1)


@on_loop
async def test_a_late_answer_is_not_taken_for_another(tmp_path: Path) -> None:
    async with connected(tmp_path) as world:
        await world.run()
        gate = asyncio.Event()

        async def held(_method: str) -> None:
            await gate.wait()

        world.guest.gate = held
        with pytest.raises(AgentTimeoutError):
            await world.client.check(timeout_s=0.01)
        gate.set()
        assert (await world.client.stats_container(C1)).pids_current == 1


# --- broken and hostile answers -----------------------------------------------------------------


@on_loop
async def test_an_answer_of_another_kind_is_a_protocol_error(tmp_path: Path) -> None:
    async with connected(tmp_path) as world:
        world.server.replies["GetOOMEvent"] = agent_pb2.ReadStreamResponse(data=b"\xff\xfe")
        with pytest.raises(AgentProtocolError, match="reply to GetOOMEvent is no OOMEvent"):
            await world.client.oom_event()


@pytest.mark.parametrize(("raw", "status"), [(0, 0), (255, 255), (-1, 255), (256 + 7, 7)])
@on_loop
async def test_an_exit_status_is_a_byte(raw: int, status: int, tmp_path: Path) -> None:
    async with connected(tmp_path) as world:
        world.server.replies["WaitProcess"] = agent_pb2.WaitProcessResponse(status=raw)
        assert await world.client.wait_process(C1, None) == status


@on_loop
async def test_an_answer_longer_than_a_message_may_be_ends_only_itself(tmp_path: Path) -> None:
    async with connected(tmp_path) as world:
        world.server.replies["GetGuestDetails"] = agent_pb2.GuestDetailsResponse(
            agent_details=agent_pb2.AgentDetails(version="x" * (4 << 20))
        )
        with pytest.raises(ResourceExhaustedError):
            await world.client.guest_details()
        await world.client.check(timeout_s=TIMEOUT_S)


@on_loop
async def test_a_request_longer_than_a_message_may_be_is_not_sent(tmp_path: Path) -> None:
    async with connected(tmp_path) as world:
        with pytest.raises(ResourceExhaustedError, match=r"CreateContainer: request of \d+ bytes"):
            await world.client.create_container(
                C1, spec={"hostname": "x" * (4 << 20)}, storages=(), has_sandbox_pidns=False
            )
        await world.client.check(timeout_s=TIMEOUT_S)


# --- streams ------------------------------------------------------------------------------------


@on_loop
async def test_output_reaches_its_files(tmp_path: Path) -> None:
    async with connected(tmp_path) as world:
        await world.run()
        world.server.output["c1", "", "stdout"] += b"out" * 100_000
        world.server.output["c1", "", "stderr"] += b"err"
        (tmp_path / "out").touch()
        (tmp_path / "err").touch()
        streams = open_streams(Stdio(stdout=f"{tmp_path}/out", stderr=f"{tmp_path}/err"))
        copies = world.client.copy_streams(C1, None, streams=streams)
        world.guest.exit(C1, None, 0)
        await copies.drained()
        copies.stop()
    assert (tmp_path / "out").read_bytes() == b"out" * 100_000
    assert (tmp_path / "err").read_bytes() == b"err"


@on_loop
async def test_a_terminal_has_no_second_output(tmp_path: Path) -> None:
    async with connected(tmp_path) as world:
        await world.run()
        streams = open_streams(Stdio(stdout=f"file://{tmp_path}/out", terminal=True))
        copies = world.client.copy_streams(C1, None, streams=streams)
        world.guest.exit(C1, None, 0)
        await copies.drained()
        copies.stop()
        assert "ReadStdout" in world.server.requests
        assert "ReadStderr" not in world.server.requests


@on_loop
async def test_stdin_reaches_the_process_and_ends_when_it_is_closed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in")
    async with connected(tmp_path) as world:
        await world.run()
        streams = open_streams(Stdio(stdin=f"{tmp_path}/in"))
        copies = world.client.copy_streams(C1, None, streams=streams)
        writer = os.open(tmp_path / "in", os.O_WRONLY | os.O_NONBLOCK)
        os.write(writer, b"typed")
        os.close(writer)
        copies.close_stdin()
        await world.server.input_closed["c1", ""].wait()
        assert world.server.input["c1", ""] == b"typed"
        copies.stop()


@on_loop
async def test_without_stdin_the_process_sees_its_end_at_once(tmp_path: Path) -> None:
    async with connected(tmp_path) as world:
        await world.run()
        copies = world.client.copy_streams(C1, None, streams=open_streams(Stdio()))
        await world.server.input_closed["c1", ""].wait()
        assert world.server.input["c1", ""] == b""
        copies.stop()


@on_loop
async def test_an_exec_has_streams_of_its_own(tmp_path: Path) -> None:
    async with connected(tmp_path) as world:
        await world.run()
        await world.client.exec_process(C1, E1, process={})
        world.server.output["c1", "e1", "stdout"] += b"exec"
        streams = open_streams(Stdio(stdout=f"file://{tmp_path}/out"))
        copies = world.client.copy_streams(C1, E1, streams=streams)
        world.guest.exit(C1, E1, 0)
        await copies.drained()
        copies.stop()
    assert (tmp_path / "out").read_bytes() == b"exec"


@on_loop
async def test_output_that_cannot_be_written_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async with connected(tmp_path) as world:
        await world.run()
        world.server.output["c1", "", "stdout"] += bytes(100_000)
        streams = HostStreams(
            stdout=os.open("/dev/full", os.O_WRONLY), stderr=os.open(os.devnull, os.O_WRONLY)
        )
        copies = world.client.copy_streams(C1, None, streams=streams)
        world.guest.exit(C1, None, 0)
        await copies.drained()
        copies.stop()


def descriptors() -> list[str]:
    """Return what is open, but for eventfds: those live as long as the Python objects do."""
    kinds = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            kinds.append(os.fspath(path.readlink()))
    return sorted(kind for kind in kinds if kind != "anon_inode:[eventfd]")


async def never(_method: str) -> None:
    """Hold every request."""
    await asyncio.Event().wait()
