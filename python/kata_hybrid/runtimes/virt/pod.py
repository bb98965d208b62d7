"""A pod's sandbox that is made before its containers. Implements ``runtimes.base.Sandbox``.

    described ──start──▶ ready ──stop, or lost──▶ ended ──shutdown──▶ gone

A virtual machine needs no pause container: this boots the guest of a :class:`VirtSandbox`, whose
containers are then created in it as a pod's others are, and keeps it when the last of them is gone.
"""

import asyncio
import time
from typing import Final

from kata_hybrid.errors import AlreadyExistsError, NotFoundError
from kata_hybrid.runtimes.base import CreateRequest, SandboxRequest, SandboxStatus
from kata_hybrid.runtimes.oci.kind import CRI_KIND, CRI_SANDBOX
from kata_hybrid.runtimes.oci.spec import Spec
from kata_hybrid.runtimes.virt.exits import LOST_STATUS
from kata_hybrid.runtimes.virt.sandbox import VirtSandbox
from kata_hybrid.types import ContainerId, ExitInfo, SandboxId, Stdio

_OCI_VERSION: Final = "1.1.0"


class PodSandbox:
    """The sandbox of one pod."""

    def __init__(self, sandbox_id: SandboxId, sandbox: VirtSandbox) -> None:
        """Boot the guest of ``sandbox`` when asked to."""
        self._id = sandbox_id
        self._sandbox = sandbox
        self._request: SandboxRequest | None = None
        self._created_at_ns = 0
        self._starting = asyncio.Lock()
        self._is_stopped = False
        self._has_come = asyncio.Event()
        """It is started, or will never be."""
        self._exit: ExitInfo | None = None
        self._pid = 0

    async def create(self, request: SandboxRequest) -> None:
        """Take a description."""
        if self._request is not None:
            message = f"sandbox {self._id} already exists"
            raise AlreadyExistsError(message)
        self._request = request
        self._created_at_ns = time.time_ns()

    async def start(self) -> SandboxStatus:
        """Boot."""
        request = self._known()
        async with self._starting:
            if not self._pid and not self._is_stopped:
                spec = pod_spec(request, sandbox_id=self._id)
                given = CreateRequest(
                    container_id=ContainerId(self._id),
                    bundle=request.bundle,
                    rootfs=(),
                    stdio=Stdio(),
                    config_path=None,
                )
                try:
                    self._pid = await self._sandbox.boot(
                        given, spec, resolver=request.resolver, sysctls=request.sysctls
                    )
                finally:
                    self._has_come.set()
        return self.status()

    async def stop(self) -> None:
        """End the guest."""
        self._known()
        await self._stop()

    async def _stop(self) -> None:
        self._is_stopped = True
        await self._sandbox.close()
        self._end(0)
        self._has_come.set()

    async def wait(self) -> ExitInfo:
        """Wait for the guest's end."""
        self._known()
        await self._has_come.wait()
        await self._sandbox.lost()
        return self._end(0 if self._is_stopped else LOST_STATUS)

    def status(self) -> SandboxStatus:
        """Describe it."""
        self._known()
        return SandboxStatus(
            is_ready=self._sandbox.is_ready,
            pid=self._pid,
            created_at_ns=self._created_at_ns,
            exit=self._exit,
        )

    async def shutdown(self) -> None:
        """Forget it."""
        await self._stop()
        self._sandbox.held_as = None

    def _end(self, status: int) -> ExitInfo:
        if self._exit is None:
            self._exit = ExitInfo(status=status, exited_at_ns=time.time_ns())
        return self._exit

    def _known(self) -> SandboxRequest:
        if self._request is None:
            message = f"sandbox {self._id} not found"
            raise NotFoundError(message)
        return self._request


def pod_spec(request: SandboxRequest, *, sandbox_id: SandboxId) -> Spec:
    """Describe the pod as its pause container's spec would."""
    sizes = {
        "cpu-quota": request.cpu_quota_us,
        "cpu-period": request.cpu_period_us,
        "memory": request.memory_bytes,
    }
    annotations = {
        **request.annotations,
        **{f"io.kubernetes.cri.sandbox-{name}": str(size) for name, size in sizes.items()},
        CRI_KIND: CRI_SANDBOX,
    }
    return Spec(
        raw={"ociVersion": _OCI_VERSION},
        root_path="",
        is_root_read_only=True,
        hostname=request.hostname,
        mounts=(),
        annotations=annotations,
        namespaces={"network": request.network} if request.network else {},
        cgroups_path=_cgroups_path(request.cgroup_parent, sandbox_id),
        hooks={},
        block_nodes=(),
    )


def _cgroups_path(parent: str, sandbox_id: SandboxId) -> str:
    """Name the sandbox's cgroup as containerd's CRI does (``getCgroupsPath``)."""
    if not parent:
        return ""
    name = parent.rstrip("/").rpartition("/")[2]
    if name.endswith(".slice"):
        return f"{name}:cri-containerd:{sandbox_id}"
    return f"{parent.rstrip('/')}/{sandbox_id}"
