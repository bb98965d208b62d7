"""One container: its process and execs, and what it was given on the host.

Built by :func:`prepare` (host side, before or while the guest boots), created in the guest by
:meth:`Container.create`, given back by :meth:`Container.release`. State changes of processes are
the sandbox's business (``sandbox.py``); this holds what belongs together.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kata_hybrid.agent.base import Agent
from kata_hybrid.errors import (
    AgentTimeoutError,
    KataError,
    ProcessNotFoundError,
    UnavailableError,
)
from kata_hybrid.resource.rootfs.base import Rootfs
from kata_hybrid.resource.rootfs.block import BlockRootfs, is_block_rootfs
from kata_hybrid.resource.rootfs.shared import SharedRootfs
from kata_hybrid.runtimes.base import CreateRequest
from kata_hybrid.runtimes.oci.rewrite import guest_spec
from kata_hybrid.runtimes.oci.spec import Spec, SpecMount
from kata_hybrid.runtimes.virt.guest import Guest
from kata_hybrid.runtimes.virt.process import Process
from kata_hybrid.runtimes.virt.volumes import Volumes
from kata_hybrid.types import ContainerId, ExecId, JsonObject

_log = logging.getLogger(__name__)

_REMOVE_TIMEOUT_S = 10
_WRITE_BACK_TIMEOUT_S = 60
"""To unmount a disk is to write what the guest still has of it."""
_POD_FILE = ("rbind", "rw")


@dataclass(frozen=True, slots=True, kw_only=True)
class PodDefaults:
    """What each container of a pod has, unless its spec says otherwise."""

    files: Mapping[str, str] = field(default_factory=dict)
    """Sources in the guest, by the places that they are mounted at."""
    sysctls: Mapping[str, str] = field(default_factory=dict)


class Container:
    """A container of the sandbox."""

    def __init__(
        self, request: CreateRequest, spec: Spec, *, rootfs: Rootfs, volumes: Volumes
    ) -> None:
        """Hold what :func:`prepare` acquired."""
        self.id: ContainerId = request.container_id
        self.request = request
        self.process = Process(
            request.container_id, None, stdio=request.stdio, bundle=str(request.bundle)
        )
        self.execs: dict[ExecId, Process] = {}
        self.exec_specs: dict[ExecId, JsonObject] = {}
        self.spec = spec
        self._rootfs = rootfs
        self._volumes = volumes
        self._is_in_guest = False
        self._is_refused = False

    def find(self, exec_id: ExecId | None) -> Process:
        """Return the container's own process, or an exec.

        Raises:
            ProcessNotFoundError: no such exec.
        """
        if exec_id is None:
            return self.process
        try:
            return self.execs[exec_id]
        except KeyError:
            message = f"exec {exec_id} of container {self.id} not found"
            raise ProcessNotFoundError(message) from None

    async def create(
        self,
        agent: Agent,
        *,
        is_seccomp_disabled: bool,
        pod: PodDefaults,
    ) -> None:
        """Create it in the guest.

        Raises:
            KataError: whatever the agent answered.
        """
        mounts = [await self._volumes.add_mount(mount) for mount in self.spec.mounts]
        taken = {mount.destination for mount in mounts}
        mounts += [
            SpecMount(destination=place, type="bind", source=source, options=_POD_FILE)
            for place, source in pod.files.items()
            if place not in taken
        ]
        for node in self.spec.block_nodes:
            await self._volumes.add_device(node)
        spec = guest_spec(
            self.spec,
            root_path=self._rootfs.guest_path,
            mounts=tuple(mounts),
            bundle=str(self.request.bundle),
            is_seccomp_disabled=is_seccomp_disabled,
            sysctls=pod.sysctls,
        )
        self._is_in_guest = True
        try:
            await agent.create_container(
                self.id,
                spec=spec,
                storages=(*self._rootfs.storages, *self._volumes.storages),
                devices=tuple(self._volumes.devices),
                has_sandbox_pidns=bool(self.spec.namespaces.get("pid")),
            )
        except (AgentTimeoutError, UnavailableError):
            # It may be there, or come to be.
            raise
        except KataError:
            self._is_refused = True
            raise

    def state(self, status: str, *, pid: int) -> JsonObject:
        """Describe it as hooks are told."""
        return self.spec.state(
            container_id=self.id, bundle=self.request.bundle, status=status, pid=pid
        )

    async def remove(self, agent: Agent) -> None:
        """Remove it from the guest, if it got that far; a guest that is gone is no error.

        Its disks go after it. If the guest does not say that it is gone, they stay until the guest
        is: what it has not written would be lost.
        """
        if self._is_in_guest:
            self._is_in_guest = False
            disks = self._volumes.has_disks
            timeout_s = _WRITE_BACK_TIMEOUT_S if disks else _REMOVE_TIMEOUT_S
            try:
                await agent.remove_container(self.id, timeout_s=timeout_s)
            except KataError as error:
                if not self._is_refused:
                    _log.warning(
                        "the guest does not remove a container; its disks stay",
                        extra={"container": self.id, "error": str(error)},
                    )
                    return
        await self._volumes.detach()

    def release(self) -> None:
        """Give back what it holds on the host. Idempotent."""
        for process in (*self.execs.values(), self.process):
            process.release()
        self._volumes.release()
        self._rootfs.release()


class Preparer(Protocol):
    """Acquires what a container needs on the host; :func:`prepare` is the real one."""

    async def __call__(self, request: CreateRequest, spec: Spec, *, guest: Guest) -> Container:
        """Return the container, not yet in the guest."""


async def prepare(request: CreateRequest, spec: Spec, *, guest: Guest) -> Container:
    """Acquire a container's root file system on the host.

    Raises:
        KataError: it is not there or the kernel refused; nothing is left.
    """
    name = request.container_id
    volumes = Volumes(
        folder=guest.folder,
        disks=guest.disks,
        empty_dirs=guest.empty_dirs,
        bundle=request.bundle,
        name=name,
    )
    if is_block_rootfs(request.rootfs):
        (entry,) = request.rootfs
        disk = await volumes.attach(Path(entry.source), is_read_only="ro" in entry.options)
        rootfs: Rootfs = BlockRootfs(entry, name=name, disk=disk)
    else:
        root_path = Path(spec.root_path)
        if not root_path.is_absolute():
            root_path = request.bundle / root_path
        rootfs = SharedRootfs(guest.folder, name=name, mounts=request.rootfs, root_path=root_path)
    return Container(request, spec, rootfs=rootfs, volumes=volumes)
