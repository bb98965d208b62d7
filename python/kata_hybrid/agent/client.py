"""The guest agent over ttRPC: implements :class:`kata_hybrid.agent.base.Agent`.

Requests become messages here and bytes at once; framing, waiting and deadlines are the native
client's (``_native.vsock``), on its own thread. One connection for the life of the sandbox.
"""

import asyncio
import contextlib
import logging
import math
import os
import socket
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from kata_hybrid._native import vsock
from kata_hybrid.agent import convert
from kata_hybrid.agent.forward import PortForward
from kata_hybrid.agent.log import forward
from kata_hybrid.agent.network import interface_message, neighbor_message, route_message
from kata_hybrid.agent.stdio import ProcessCopies
from kata_hybrid.agent.streams import HostStreams
from kata_hybrid.aio.events import NativeEvents
from kata_hybrid.errors import (
    AgentProtocolError,
    AgentTimeoutError,
    AgentUnavailableError,
    DeadlineExceededError,
    GuestBootTimeoutError,
    KataError,
    ResourceExhaustedError,
    UnavailableError,
)
from kata_hybrid.protos import agent_pb2, health_pb2
from kata_hybrid.types import (
    ContainerId,
    ContainerStats,
    ExecId,
    GuestDetails,
    GuestDevice,
    GuestNetwork,
    GuestStorage,
    JsonObject,
    SandboxId,
)

_AGENT: Final = "grpc.AgentService"
_HEALTH: Final = "grpc.Health"
_NO_DEADLINE: Final = 0.0
_MAX_MESSAGE_BYTES: Final = 4 << 20
_LOG_DIAL_MS: Final = 5000

_log = logging.getLogger(__name__)

_Reply = TypeVar("_Reply", bound=Message)


class AgentClient:
    """One sandbox's agent."""

    def __init__(self, io: vsock.IoThread, events: NativeEvents, *, timeout_s: float) -> None:
        """Talk through ``io``; requests without a deadline of their own get ``timeout_s``."""
        self._io = io
        self._events = events
        self._timeout_s = timeout_s
        self._native: vsock.AgentClient | None = None
        self._closed: asyncio.Future[object] | None = None

    async def connect(self, *, address: str, port: int, timeout_s: float) -> None:
        """Dial until the agent answers a health check.

        Raises:
            GuestBootTimeoutError: nothing answered in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        silence = f"guest agent at {address} port {port} did not answer in {timeout_s:g} s"
        try:
            fd = await self._events.call(
                lambda token: self._io.dial(
                    token, address, port, timeout_ms=_milliseconds(timeout_s)
                ),
                on_abandoned=_close_descriptor,
            )
        except (DeadlineExceededError, UnavailableError) as exc:
            raise GuestBootTimeoutError(silence) from exc
        if not isinstance(fd, int):
            message = f"dial returned {type(fd).__name__}, not a descriptor"
            raise AgentProtocolError(message)
        closed_token, self._closed = self._events.expect()
        self._native = vsock.AgentClient(self._io, fd, closed_token=closed_token)
        try:
            await self.check(timeout_s=max(deadline - loop.time(), 1.0))
        except AgentTimeoutError as exc:
            raise GuestBootTimeoutError(silence) from exc

    async def close(self) -> None:
        """Close the connection. Idempotent."""
        native, self._native = self._native, None
        if native is not None:
            native.close()
            await self.closed()

    async def closed(self) -> None:
        """Return when the connection is gone, at once if there never was one."""
        if self._closed is not None:
            with contextlib.suppress(Exception):
                await asyncio.shield(self._closed)

    async def forward_log(self, *, address: str, port: int) -> None:
        """Copy the agent's own log into ours until it ends. An agent without one is no error."""
        try:
            fd = await self._events.call(
                lambda token: self._io.dial(token, address, port, timeout_ms=_LOG_DIAL_MS),
                on_abandoned=_close_descriptor,
            )
        except KataError as exc:
            _log.debug("no agent log", extra={"error": str(exc)})
            return
        if isinstance(fd, int):
            await forward(socket.socket(fileno=fd))

    async def forward_ports(self, listener: socket.socket, *, address: str, port: int) -> None:
        """Connect the guest's loopback to a listening socket, until cancelled."""
        await PortForward(self._io, self._events, address=address, port=port).serve(listener)

    def copy_streams(
        self, container_id: ContainerId, exec_id: ExecId | None, *, streams: HostStreams
    ) -> ProcessCopies:
        """Start copying between a guest process and host descriptors, which are taken over.

        Raises:
            AgentUnavailableError: not connected.
        """
        return ProcessCopies(
            self._connection(),
            self._events,
            container_id=container_id,
            exec_id=exec_id or "",
            streams=streams,
        )

    async def check(self, *, timeout_s: float) -> None:
        """Health check.

        Raises:
            AgentUnavailableError: the agent says it is not serving.
        """
        reply = await self._call(
            "Check",
            health_pb2.CheckRequest(),
            health_pb2.HealthCheckResponse,
            service=_HEALTH,
            timeout_s=timeout_s,
        )
        if reply.status != health_pb2.HealthCheckResponse.SERVING:
            message = f"guest agent is not serving (status {reply.status})"
            raise AgentUnavailableError(message)

    async def create_sandbox(
        self,
        sandbox_id: SandboxId,
        *,
        hostname: str,
        dns: tuple[str, ...],
        storages: tuple[GuestStorage, ...],
    ) -> None:
        """Prepare the guest for its pod."""
        request = agent_pb2.CreateSandboxRequest(
            hostname=hostname,
            dns=dns,
            storages=convert.storage_messages(storages),
            sandbox_id=sandbox_id,
        )
        await self._request("CreateSandbox", request)

    async def update_network(self, network: GuestNetwork) -> None:
        """Set the guest's interfaces, neighbours and routes up."""
        for interface in network.interfaces:
            message = interface_message(interface)
            await self._request(
                "UpdateInterface", agent_pb2.UpdateInterfaceRequest(interface=message)
            )
        if network.neighbors:
            neighbors = agent_pb2.ARPNeighbors(
                ARPNeighbors=map(neighbor_message, network.neighbors)
            )
            await self._request(
                "AddARPNeighbors", agent_pb2.AddARPNeighborsRequest(neighbors=neighbors)
            )
        if network.routes:
            routes = agent_pb2.Routes(Routes=map(route_message, network.routes))
            await self._request("UpdateRoutes", agent_pb2.UpdateRoutesRequest(routes=routes))

    async def guest_details(self) -> GuestDetails:
        """Ask what the agent can do."""
        reply = await self._call(
            "GetGuestDetails",
            agent_pb2.GuestDetailsRequest(mem_block_size=True, mem_hotplug_probe=True),
            agent_pb2.GuestDetailsResponse,
        )
        return convert.guest_details(reply)

    async def create_container(
        self,
        container_id: ContainerId,
        *,
        spec: JsonObject,
        storages: tuple[GuestStorage, ...],
        devices: tuple[GuestDevice, ...] = (),
        has_sandbox_pidns: bool,
    ) -> None:
        """Create a container whose process waits for :meth:`start_container`."""
        request = agent_pb2.CreateContainerRequest(
            container_id=container_id,
            storages=convert.storage_messages(storages),
            devices=convert.device_messages(devices),
            OCI=convert.spec_message(spec),
            sandbox_pidns=has_sandbox_pidns,
        )
        await self._request("CreateContainer", request)

    async def start_container(self, container_id: ContainerId) -> None:
        """Let the container's process run."""
        await self._request(
            "StartContainer", agent_pb2.StartContainerRequest(container_id=container_id)
        )

    async def remove_container(self, container_id: ContainerId, *, timeout_s: int) -> None:
        """Kill what is left and forget the container."""
        await self._request(
            "RemoveContainer",
            agent_pb2.RemoveContainerRequest(container_id=container_id, timeout=timeout_s),
            timeout_s=timeout_s + 5.0,
        )

    async def exec_process(
        self, container_id: ContainerId, exec_id: ExecId, *, process: JsonObject
    ) -> None:
        """Start another process in a container."""
        request = agent_pb2.ExecProcessRequest(
            container_id=container_id, exec_id=exec_id, process=convert.process_message(process)
        )
        await self._request("ExecProcess", request)

    async def signal_process(
        self, container_id: ContainerId, exec_id: ExecId | None, signal: int
    ) -> None:
        """Signal one process; SIGKILL with no exec id goes to the whole container."""
        request = agent_pb2.SignalProcessRequest(
            container_id=container_id, exec_id=exec_id or "", signal=signal
        )
        await self._request("SignalProcess", request)

    async def wait_process(self, container_id: ContainerId, exec_id: ExecId | None) -> int:
        """Wait for a process to end and return its exit status, 0-255. No deadline."""
        reply = await self._call(
            "WaitProcess",
            agent_pb2.WaitProcessRequest(container_id=container_id, exec_id=exec_id or ""),
            agent_pb2.WaitProcessResponse,
            timeout_s=_NO_DEADLINE,
        )
        return reply.status & 0xFF

    async def resize_terminal(
        self, container_id: ContainerId, exec_id: ExecId | None, *, rows: int, columns: int
    ) -> None:
        """Set the window size of a process's terminal."""
        request = agent_pb2.TtyWinResizeRequest(
            container_id=container_id, exec_id=exec_id or "", row=rows, column=columns
        )
        await self._request("TtyWinResize", request)

    async def update_container(self, container_id: ContainerId, *, resources: JsonObject) -> None:
        """Apply OCI LinuxResources."""
        request = agent_pb2.UpdateContainerRequest(
            container_id=container_id, resources=convert.resources_message(resources)
        )
        await self._request("UpdateContainer", request)

    async def stats_container(self, container_id: ContainerId) -> ContainerStats:
        """Read the container's cgroup."""
        reply = await self._call(
            "StatsContainer",
            agent_pb2.StatsContainerRequest(container_id=container_id),
            agent_pb2.StatsContainerResponse,
        )
        return convert.container_stats(reply)

    async def pause_container(self, container_id: ContainerId) -> None:
        """Freeze the container."""
        await self._request(
            "PauseContainer", agent_pb2.PauseContainerRequest(container_id=container_id)
        )

    async def resume_container(self, container_id: ContainerId) -> None:
        """Thaw the container."""
        await self._request(
            "ResumeContainer", agent_pb2.ResumeContainerRequest(container_id=container_id)
        )

    async def oom_event(self) -> ContainerId:
        """Wait for the next container in which the kernel killed for memory. No deadline."""
        reply = await self._call(
            "GetOOMEvent",
            agent_pb2.GetOOMEventRequest(),
            agent_pb2.OOMEvent,
            timeout_s=_NO_DEADLINE,
        )
        return ContainerId(reply.container_id)

    async def _request(
        self, method: str, request: Message, *, timeout_s: float | None = None
    ) -> None:
        """Send a request whose reply is empty."""
        await self._exchange(_AGENT, method, request, timeout_s=timeout_s)

    async def _call(
        self,
        method: str,
        request: Message,
        reply_type: type[_Reply],
        *,
        service: str = _AGENT,
        timeout_s: float | None = None,
    ) -> _Reply:
        payload = await self._exchange(service, method, request, timeout_s=timeout_s)
        try:
            return reply_type.FromString(payload)
        except DecodeError as exc:
            message = f"guest agent's reply to {method} is no {reply_type.__name__}"
            raise AgentProtocolError(message) from exc

    async def _exchange(
        self, service: str, method: str, request: Message, *, timeout_s: float | None
    ) -> bytes:
        native = self._connection()
        payload = request.SerializeToString()
        if len(payload) > _MAX_MESSAGE_BYTES - 256:
            message = f"{method}: request of {len(payload)} bytes is more than ttRPC's 4 MiB"
            raise ResourceExhaustedError(message)
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            value = await self._events.call(
                lambda token: native.call(
                    token, service, method, payload, timeout_ms=_milliseconds(limit_s)
                )
            )
        except DeadlineExceededError as exc:
            message = f"guest agent did not answer {method} in {limit_s:g} s"
            raise AgentTimeoutError(message) from exc
        except UnavailableError as exc:
            message = f"connection to the guest agent lost during {method}"
            raise AgentUnavailableError(message) from exc
        return value if isinstance(value, bytes) else b""

    def _connection(self) -> vsock.AgentClient:
        if self._native is None:
            message = "not connected to the guest agent"
            raise AgentUnavailableError(message)
        return self._native


def _close_descriptor(value: object) -> None:
    """Close what a dial yields after nobody waits for it any more."""
    if isinstance(value, int):
        os.close(value)


def _milliseconds(seconds: float) -> int:
    # Rounded up: 0 would be no deadline at all.
    return math.ceil(seconds * 1000)
