"""A guest agent on a Unix socket: the wire in front of a ``FakeAgent``.

Answers ``grpc.AgentService`` and ``grpc.Health`` over the real ttRPC server, so that the shim's
client (native thread, frames, deadlines, status codes) is tested against the same behaviour as the
fake. Runs on the test's event loop. What each method was last asked is kept.
"""

import asyncio
import os
import socket
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from kata_hybrid.errors import NotFoundError
from kata_hybrid.protos import agent_pb2, health_pb2
from kata_hybrid.testing.fake_agent import FakeAgent, FakeProcess
from kata_hybrid.ttrpc.server import Method, Server
from kata_hybrid.types import ContainerId, ExecId, SandboxId

_Key = tuple[str, str]


class AgentServer:
    """Serves a fake agent's behaviour on ``path``."""

    def __init__(self, agent: FakeAgent, *, path: Path) -> None:
        """Serve nothing before :meth:`start`."""
        self.agent = agent
        self.requests: dict[str, Any] = {}
        """The last request of each method."""
        self.replies: dict[str, Message] = {}
        """Method to what it answers instead, whatever it was asked."""
        self.output: dict[tuple[str, str, str], bytearray] = defaultdict(bytearray)
        """Container, exec and stream to what the process has written and nobody has read."""
        self.input: dict[_Key, bytearray] = defaultdict(bytearray)
        self.input_closed: dict[_Key, asyncio.Event] = defaultdict(asyncio.Event)
        self.health = health_pb2.HealthCheckResponse.SERVING
        self._path = path
        self._server = Server({"grpc.AgentService": self._methods(), "grpc.Health": self._health()})

    async def start(self) -> None:
        """Listen."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.fspath(self._path))
        listener.listen()
        await self._server.start(listener)

    async def close(self) -> None:
        """Drop every connection, as a guest that is gone."""
        self.agent.disconnect()
        await self._server.close(timeout_s=5.0)

    def _health(self) -> Mapping[str, Method]:
        async def check(_request: health_pb2.CheckRequest) -> Message:
            await self.agent.check(timeout_s=0)
            return health_pb2.HealthCheckResponse(status=self.health)

        return {"Check": self._method("Check", health_pb2.CheckRequest, check)}

    def _methods(self) -> Mapping[str, Method]:
        handlers: dict[str, tuple[type[Message], Callable[[Any], Awaitable[Message]]]] = {
            "CreateSandbox": (agent_pb2.CreateSandboxRequest, self._create_sandbox),
            "GetGuestDetails": (agent_pb2.GuestDetailsRequest, self._guest_details),
            "CreateContainer": (agent_pb2.CreateContainerRequest, self._create_container),
            "StartContainer": (agent_pb2.StartContainerRequest, self._start_container),
            "RemoveContainer": (agent_pb2.RemoveContainerRequest, self._remove_container),
            "ExecProcess": (agent_pb2.ExecProcessRequest, self._exec_process),
            "SignalProcess": (agent_pb2.SignalProcessRequest, self._signal_process),
            "WaitProcess": (agent_pb2.WaitProcessRequest, self._wait_process),
            "TtyWinResize": (agent_pb2.TtyWinResizeRequest, self._resize_terminal),
            "UpdateContainer": (agent_pb2.UpdateContainerRequest, self._update_container),
            "StatsContainer": (agent_pb2.StatsContainerRequest, self._stats_container),
            "PauseContainer": (agent_pb2.PauseContainerRequest, self._pause_container),
            "ResumeContainer": (agent_pb2.ResumeContainerRequest, self._resume_container),
            "GetOOMEvent": (agent_pb2.GetOOMEventRequest, self._oom_event),
            "ReadStdout": (agent_pb2.ReadStreamRequest, self._read_stdout),
            "ReadStderr": (agent_pb2.ReadStreamRequest, self._read_stderr),
            "WriteStdin": (agent_pb2.WriteStreamRequest, self._write_stdin),
        }
        return {name: self._method(name, *handler) for name, handler in handlers.items()}

    def _method(
        self, name: str, request_type: type[Message], handler: Callable[[Any], Awaitable[Message]]
    ) -> Method:
        async def recorded(request: Message) -> Message:
            self.requests[name] = request
            return self.replies[name] if name in self.replies else await handler(request)

        # A fake changes nothing that would have to be completed after its client is gone.
        return Method(request_type=request_type, handler=recorded, ends_with_client=True)

    async def _create_sandbox(self, request: agent_pb2.CreateSandboxRequest) -> Message:
        await self.agent.create_sandbox(
            SandboxId(request.sandbox_id),
            hostname=request.hostname,
            dns=tuple(request.dns),
            storages=(),
        )
        return Empty()

    async def _guest_details(self, _request: agent_pb2.GuestDetailsRequest) -> Message:
        details = await self.agent.guest_details()
        return agent_pb2.GuestDetailsResponse(
            mem_block_size_bytes=details.memory_block_bytes,
            agent_details=agent_pb2.AgentDetails(
                version=details.agent_version,
                storage_handlers=details.storage_handlers,
                extra_features=sorted(details.extra_features),
                supports_seccomp=details.supports_seccomp,
            ),
        )

    async def _create_container(self, request: agent_pb2.CreateContainerRequest) -> Message:
        await self.agent.create_container(
            ContainerId(request.container_id),
            spec={},
            storages=(),
            has_sandbox_pidns=request.sandbox_pidns,
        )
        return Empty()

    async def _start_container(self, request: agent_pb2.StartContainerRequest) -> Message:
        await self.agent.start_container(ContainerId(request.container_id))
        return Empty()

    async def _remove_container(self, request: agent_pb2.RemoveContainerRequest) -> Message:
        await self.agent.remove_container(
            ContainerId(request.container_id), timeout_s=request.timeout
        )
        return Empty()

    async def _exec_process(self, request: agent_pb2.ExecProcessRequest) -> Message:
        await self.agent.exec_process(
            ContainerId(request.container_id), ExecId(request.exec_id), process={}
        )
        return Empty()

    async def _signal_process(self, request: agent_pb2.SignalProcessRequest) -> Message:
        await self.agent.signal_process(*_ids(request), request.signal)
        return Empty()

    async def _wait_process(self, request: agent_pb2.WaitProcessRequest) -> Message:
        return agent_pb2.WaitProcessResponse(status=await self.agent.wait_process(*_ids(request)))

    async def _resize_terminal(self, request: agent_pb2.TtyWinResizeRequest) -> Message:
        await self.agent.resize_terminal(*_ids(request), rows=request.row, columns=request.column)
        return Empty()

    async def _update_container(self, request: agent_pb2.UpdateContainerRequest) -> Message:
        await self.agent.update_container(ContainerId(request.container_id), resources={})
        return Empty()

    async def _stats_container(self, request: agent_pb2.StatsContainerRequest) -> Message:
        stats = await self.agent.stats_container(ContainerId(request.container_id))
        pids = agent_pb2.PidsStats(current=stats.pids_current, limit=stats.pids_limit)
        return agent_pb2.StatsContainerResponse(cgroup_stats=agent_pb2.CgroupStats(pids_stats=pids))

    async def _pause_container(self, request: agent_pb2.PauseContainerRequest) -> Message:
        await self.agent.pause_container(ContainerId(request.container_id))
        return Empty()

    async def _resume_container(self, request: agent_pb2.ResumeContainerRequest) -> Message:
        await self.agent.resume_container(ContainerId(request.container_id))
        return Empty()

    async def _oom_event(self, _request: agent_pb2.GetOOMEventRequest) -> Message:
        return agent_pb2.OOMEvent(container_id=await self.agent.oom_event())

    async def _read_stdout(self, request: agent_pb2.ReadStreamRequest) -> Message:
        return await self._read(request, "stdout")

    async def _read_stderr(self, request: agent_pb2.ReadStreamRequest) -> Message:
        return await self._read(request, "stderr")

    async def _read(self, request: agent_pb2.ReadStreamRequest, stream: str) -> Message:
        process = self._process(request)
        waiting = self.output[request.container_id, request.exec_id, stream]
        if not waiting:
            await process.end_of_output.wait()
        data = bytes(waiting[: request.len])
        del waiting[: request.len]
        return agent_pb2.ReadStreamResponse(data=data)

    async def _write_stdin(self, request: agent_pb2.WriteStreamRequest) -> Message:
        self._process(request)
        if not request.data:
            # No data is the end of the stream, as it is for output.
            self.input_closed[request.container_id, request.exec_id].set()
        self.input[request.container_id, request.exec_id] += request.data
        return agent_pb2.WriteStreamResponse(len=len(request.data))

    def _process(self, request: Any) -> FakeProcess:
        process = self.agent.processes.get(_ids(request))
        if process is None:
            message = "process unknown"
            raise NotFoundError(message)
        return process


def _ids(request: Any) -> tuple[ContainerId, ExecId | None]:
    exec_id = ExecId(request.exec_id) if request.exec_id else None
    return ContainerId(request.container_id), exec_id
