"""The guest agent as the rest of the shim sees it: a Protocol in our own values.

One connection for the life of a sandbox. ``client.py`` implements it over the native ttRPC
client; ``testing`` has a fake that passes the same contract suite. Every call has a deadline
except those that wait for the guest to act (``wait_process``, ``oom_event``).
"""

import socket
from typing import Protocol

from kata_hybrid.agent.streams import HostStreams
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


class StreamCopies(Protocol):
    """The running copies between a guest process's streams and the host's descriptors."""

    async def drained(self) -> None:
        """Return when the last byte of every output stream is written (or could not be)."""

    def close_stdin(self) -> None:
        """Let stdin end once what the client wrote has been copied. Idempotent."""

    def stop(self) -> None:
        """End every copy now and close the host descriptors. Idempotent."""


class Agent(Protocol):
    """The agent in the guest (Kata agent protocol, service ``grpc.AgentService``).

    Raises, from every method: AgentUnavailableError, AgentTimeoutError, AgentProtocolError, or
    the KataError subclass that matches the status code the guest answered.
    """

    async def connect(self, *, address: str, port: int, timeout_s: float) -> None:
        """Dial and check health.

        Raises:
            GuestBootTimeoutError: nothing answered in time.
        """

    async def close(self) -> None:
        """Close the connection. Idempotent."""

    async def closed(self) -> None:
        """Return when the connection is gone."""

    async def forward_log(self, *, address: str, port: int) -> None:
        """Copy the agent's own log into ours until it ends. An agent without one is no error."""

    async def forward_ports(self, listener: socket.socket, *, address: str, port: int) -> None:
        """Connect the guest's loopback to a listening socket, each connection to the port it asks.

        Until cancelled. Only of an agent that has the feature (``forward.py``).
        """

    async def check(self, *, timeout_s: float) -> None:
        """Health check."""

    async def create_sandbox(
        self,
        sandbox_id: SandboxId,
        *,
        hostname: str,
        dns: tuple[str, ...],
        storages: tuple[GuestStorage, ...],
    ) -> None:
        """Prepare the guest for its pod."""

    async def update_network(self, network: GuestNetwork) -> None:
        """Set the guest's interfaces, neighbours and routes up. Before its sandbox is created."""

    async def guest_details(self) -> GuestDetails:
        """Ask what the agent can do."""

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

    async def start_container(self, container_id: ContainerId) -> None:
        """Let the container's process run."""

    async def remove_container(self, container_id: ContainerId, *, timeout_s: int) -> None:
        """Kill what is left and forget the container."""

    async def exec_process(
        self, container_id: ContainerId, exec_id: ExecId, *, process: JsonObject
    ) -> None:
        """Start another process in a container."""

    async def signal_process(
        self, container_id: ContainerId, exec_id: ExecId | None, signal: int
    ) -> None:
        """Signal one process; SIGKILL with no exec id goes to the whole container."""

    async def wait_process(self, container_id: ContainerId, exec_id: ExecId | None) -> int:
        """Wait for a process to end and return its exit status. No deadline."""

    async def resize_terminal(
        self, container_id: ContainerId, exec_id: ExecId | None, *, rows: int, columns: int
    ) -> None:
        """Set the window size of a process's terminal."""

    def copy_streams(
        self, container_id: ContainerId, exec_id: ExecId | None, *, streams: HostStreams
    ) -> StreamCopies:
        """Start copying between a guest process and host descriptors, which are taken over."""

    async def update_container(self, container_id: ContainerId, *, resources: JsonObject) -> None:
        """Apply OCI LinuxResources."""

    async def stats_container(self, container_id: ContainerId) -> ContainerStats:
        """Read the container's cgroup."""

    async def pause_container(self, container_id: ContainerId) -> None:
        """Freeze the container."""

    async def resume_container(self, container_id: ContainerId) -> None:
        """Thaw the container."""

    async def oom_event(self) -> ContainerId:
        """Wait for the next container in which the kernel killed for memory. No deadline."""
