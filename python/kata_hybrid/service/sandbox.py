"""The sandbox service of containerd 2.x (``containerd.runtime.sandbox.v1.Sandbox``).

With it a pod's sandbox is made before its containers, and needs no pause container (containerd's
runtime key ``sandboxer = "shim"``). The containers come by the task service. Nothing is decided
here.
"""

import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import DecodeError, Message

from kata_hybrid.errors import InvalidArgumentError, UnimplementedError
from kata_hybrid.observability.context import log_context
from kata_hybrid.protos import cri_pb2, sandbox_pb2
from kata_hybrid.runtimes.base import Sandbox, SandboxRequest
from kata_hybrid.service import convert
from kata_hybrid.ttrpc.server import Method

SERVICE_NAME: Final = "containerd.runtime.sandbox.v1.Sandbox"
_POD_CONFIG: Final = "runtime.v1.PodSandboxConfig"
_READY: Final = {True: "SANDBOX_READY", False: "SANDBOX_NOTREADY"}
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}


class SandboxService:
    """One sandbox's service."""

    def __init__(self, sandbox: Sandbox, *, on_shutdown: Callable[[], None]) -> None:
        """Serve ``sandbox``; ``on_shutdown`` is called when the shim may end."""
        self._sandbox = sandbox
        self._on_shutdown = on_shutdown

    def methods(self) -> Mapping[str, Method]:
        """Return the table to register under :data:`SERVICE_NAME`."""
        # A sandbox whose starter is gone is found by its status, and shut down.
        handlers: dict[str, tuple[type[Message], Callable[[Any], Any]]] = {
            "CreateSandbox": (sandbox_pb2.CreateSandboxRequest, self.create),
            "StartSandbox": (sandbox_pb2.StartSandboxRequest, self.start),
            "Platform": (sandbox_pb2.PlatformRequest, self.platform),
            "StopSandbox": (sandbox_pb2.StopSandboxRequest, self.stop),
            "WaitSandbox": (sandbox_pb2.WaitSandboxRequest, self.wait),
            "SandboxStatus": (sandbox_pb2.SandboxStatusRequest, self.status),
            "PingSandbox": (sandbox_pb2.PingRequest, self.ping),
            "ShutdownSandbox": (sandbox_pb2.ShutdownSandboxRequest, self.shutdown),
            "SandboxMetrics": (sandbox_pb2.SandboxMetricsRequest, self.metrics),
        }
        return {
            name: Method(
                request_type=kind, handler=_checked(handler), ends_with_client=name == "WaitSandbox"
            )
            for name, (kind, handler) in handlers.items()
        }

    async def create(
        self, request: sandbox_pb2.CreateSandboxRequest
    ) -> sandbox_pb2.CreateSandboxResponse:
        """Take a description."""
        await self._sandbox.create(_described(request))
        return sandbox_pb2.CreateSandboxResponse()

    async def start(
        self, _request: sandbox_pb2.StartSandboxRequest
    ) -> sandbox_pb2.StartSandboxResponse:
        """Boot the machine."""
        status = await self._sandbox.start()
        return sandbox_pb2.StartSandboxResponse(
            pid=status.pid, created_at=convert.timestamp(status.created_at_ns)
        )

    async def platform(self, _request: sandbox_pb2.PlatformRequest) -> sandbox_pb2.PlatformResponse:
        """Say what containers are to be made for."""
        machine = platform.machine()
        architecture = _ARCHITECTURES.get(machine, machine)
        return sandbox_pb2.PlatformResponse(
            platform=sandbox_pb2.Platform(os="linux", architecture=architecture)
        )

    async def stop(
        self, _request: sandbox_pb2.StopSandboxRequest
    ) -> sandbox_pb2.StopSandboxResponse:
        """End the machine."""
        await self._sandbox.stop()
        return sandbox_pb2.StopSandboxResponse()

    async def wait(
        self, _request: sandbox_pb2.WaitSandboxRequest
    ) -> sandbox_pb2.WaitSandboxResponse:
        """Wait for the machine's end."""
        ended = await self._sandbox.wait()
        return sandbox_pb2.WaitSandboxResponse(
            exit_status=ended.status, exited_at=convert.timestamp(ended.exited_at_ns)
        )

    async def status(
        self, request: sandbox_pb2.SandboxStatusRequest
    ) -> sandbox_pb2.SandboxStatusResponse:
        """Describe it."""
        status = self._sandbox.status()
        return sandbox_pb2.SandboxStatusResponse(
            sandbox_id=request.sandbox_id,
            pid=status.pid,
            state=_READY[status.is_ready],
            created_at=convert.timestamp(status.created_at_ns),
            exited_at=convert.timestamp(status.exit.exited_at_ns) if status.exit else None,
        )

    async def ping(self, _request: sandbox_pb2.PingRequest) -> sandbox_pb2.PingResponse:
        """Answer, if there is one."""
        self._sandbox.status()
        return sandbox_pb2.PingResponse()

    async def shutdown(
        self, _request: sandbox_pb2.ShutdownSandboxRequest
    ) -> sandbox_pb2.ShutdownSandboxResponse:
        """End the machine and the shim."""
        await self._sandbox.shutdown()
        self._on_shutdown()
        return sandbox_pb2.ShutdownSandboxResponse()

    async def metrics(self, _request: sandbox_pb2.SandboxMetricsRequest) -> Message:
        """Say that there are none."""
        message = "numbers of a whole sandbox are not implemented"
        raise UnimplementedError(message)


def _checked(handler: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Check a request's id, and have what the handler logs say which sandbox it is about."""

    async def handle(request: Any) -> Any:
        convert.container_id(request.sandbox_id)
        with log_context(container=request.sandbox_id, exec_id=""):
            return await handler(request)

    return handle


def _described(request: sandbox_pb2.CreateSandboxRequest) -> SandboxRequest:
    bundle = Path(request.bundle_path)
    if not bundle.is_absolute() or "\0" in request.bundle_path:
        message = f"bundle_path must be an absolute path, is {request.bundle_path!r}"
        raise InvalidArgumentError(message)
    pod = cri_pb2.PodSandboxConfig()
    if request.options.type_url.rpartition("/")[2] == _POD_CONFIG:
        try:
            pod.ParseFromString(request.options.value)
        except DecodeError as exc:
            message = f"options are no {_POD_CONFIG}"
            raise InvalidArgumentError(message) from exc
    limits = pod.linux.resources
    return SandboxRequest(
        bundle=bundle,
        hostname=pod.hostname,
        resolver=_resolver(pod.dns_config),
        network=request.netns_path,
        annotations={**pod.annotations, **request.annotations},
        sysctls=dict(pod.linux.sysctls),
        cgroup_parent=pod.linux.cgroup_parent,
        cpu_quota_us=limits.cpu_quota,
        cpu_period_us=limits.cpu_period,
        memory_bytes=limits.memory_limit_in_bytes,
    )


def _resolver(dns: cri_pb2.DnsConfig) -> tuple[str, ...]:
    """Write the lines of resolv.conf(5)."""
    lines = [f"nameserver {server}" for server in dns.servers]
    for word, values in (("search", dns.searches), ("options", dns.options)):
        if values:
            lines.append(f"{word} {' '.join(values)}")
    return tuple(lines)
