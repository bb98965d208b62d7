"""Make the guest of a sandbox from the configuration and what the host can do.

The one place that knows which class stands behind each contract of a guest: configuration file,
hypervisor, shared folder, agent client, native I/O thread.
"""

import contextlib
import logging
import os
from pathlib import Path
from typing import Final

from kata_hybrid._native import events as native_events
from kata_hybrid._native import vsock
from kata_hybrid.agent.client import AgentClient
from kata_hybrid.aio.events import NativeEvents
from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.config.annotations import annotated
from kata_hybrid.config.load import load_config
from kata_hybrid.config.model import Config, EmptyDirMode
from kata_hybrid.errors import UnimplementedError
from kata_hybrid.hypervisor.probe import HostReport, probe_host
from kata_hybrid.hypervisor.selection import (
    BuiltinChoice,
    QemuChoice,
    Selection,
    needs_virtiofsd,
    new_hypervisor,
    select_hypervisor,
)
from kata_hybrid.hypervisor.vsock_backend import NativeVsockBackendFactory
from kata_hybrid.resource.cgroup import SandboxCgroup, sandbox_path
from kata_hybrid.resource.network.own import OwnNamespace
from kata_hybrid.resource.network.pod import PodNetwork
from kata_hybrid.resource.share_fs.base import SharedFolder, ShareFs
from kata_hybrid.resource.share_fs.inprocess import InProcessShare
from kata_hybrid.resource.share_fs.virtiofsd import VirtiofsdShare, virtiofsd_settings
from kata_hybrid.runtimes.base import CreateRequest
from kata_hybrid.runtimes.oci.spec import Spec
from kata_hybrid.runtimes.virt.guest import VirtGuest
from kata_hybrid.runtimes.virt.sizing import bounded, sandbox_limits, sized
from kata_hybrid.types import SandboxId

_log = logging.getLogger(__name__)

RUNTIME_NAME: Final = "virt_container"
SHARED_FOLDER: Final = "shared"
_DOCKER: Final = "moby"
"""The namespace of containerd's that dockerd uses: it moves links in between create and start."""
_LINK_HOOK: Final = "libnetwork-setkey"


class VirtGuestFactory:
    """Makes the guest of one sandbox when its first container is created."""

    def __init__(
        self,
        sandbox_id: SandboxId,
        *,
        namespace: str,
        run_dir: Path,
        config_path: Path | None,
        reaper: ProcessReaper,
    ) -> None:
        """Remember what the shim was started with; ``config_path`` may be given by Create too.

        ``namespace`` is containerd's.
        """
        self._sandbox_id = sandbox_id
        self._is_dockers = namespace == _DOCKER
        self._run_dir = run_dir
        self._config_path = config_path
        self._reaper = reaper
        self._own: OwnNamespace | None = None

    async def __call__(self, request: CreateRequest, spec: Spec) -> VirtGuest:
        """Make the guest; nothing of it runs yet.

        Raises:
            InvalidConfigError: the configuration is wrong.
            InvalidSpecError: an annotation or a limit of the sandbox's is wrong or not allowed.
            FailedPreconditionError: the host lacks something; the text says what and how to get it.
        """
        limits = sandbox_limits(spec)
        config = load_config(
            environment=os.environ, option_path=request.config_path or self._config_path
        )
        # What a pod asks for in words comes before what its limits make of it.
        config = bounded(annotated(sized(config, limits), spec.annotations))
        if config.runtime.name != RUNTIME_NAME:
            message = f"runtime.name {config.runtime.name!r}: only {RUNTIME_NAME!r} is implemented"
            raise UnimplementedError(message)
        if not logging.getLogger().isEnabledFor(logging.DEBUG):
            # containerd's -debug wins over the file.
            logging.getLogger().setLevel(config.runtime.logging_level)
        if config.notices:
            _log.warning("not implemented, ignored", extra={"configuration": list(config.notices)})
        # The cache of findings lies in the run root, two folders above a sandbox's own.
        report = await probe_host(
            config.qemu,
            reaper=self._reaper,
            run_root=self._run_dir.parent.parent,
            needs_virtiofsd=lambda kvm: needs_virtiofsd(config, kvm),
        )
        return self._assemble(config, report, spec)

    def _assemble(self, config: Config, report: HostReport, spec: Spec) -> VirtGuest:
        selection = select_hypervisor(config, report)
        cgroup = SandboxCgroup(
            sandbox_path(spec.cgroups_path, self._sandbox_id)
            if config.runtime.sandbox_cgroup_only
            else ""
        )
        namespace = spec.namespaces.get("network")
        if namespace is None:
            # It asks for the host's network, which a machine cannot have.
            _log.warning("no network namespace: the guest has its loopback only")
        is_own = namespace == ""
        if is_own:
            namespace = str(self._own_namespace().path)
        _log.info("hypervisor", extra={"hypervisor": selection.name, "reason": selection.reason})
        shared = self._run_dir / SHARED_FOLDER
        shared.mkdir(mode=0o700, exist_ok=True)
        resources = contextlib.ExitStack()
        events = NativeEvents(native_events.EventPort())
        resources.callback(events.close)
        io = vsock.IoThread(events.port)
        resources.callback(io.close)
        return VirtGuest(
            self._sandbox_id,
            hypervisor=new_hypervisor(
                config,
                selection,
                name=self._sandbox_id,
                run_dir=self._run_dir,
                reaper=self._reaper,
                events=events,
                vsock_backend=NativeVsockBackendFactory(io, events),
            ),
            cgroup=cgroup,
            share_fs=self._share(config, selection, SharedFolder(host_path=shared)),
            network=PodNetwork(
                Path(namespace) if namespace else None,
                model=config.runtime.network_model,
                reaper=self._reaper,
                is_own=is_own,
            ),
            empty_dir_maker=(
                self._reaper if config.runtime.empty_dir_mode is EmptyDirMode.BLOCK else None
            ),
            task_pid=os.getpid() if is_own else None,
            # Older ones make the links by a hook.
            awaits_links=is_own and self._is_dockers and not _has_link_hook(spec),
            agent=AgentClient(io, events, timeout_s=config.agent.request_timeout_s),
            config=config.agent,
            is_seccomp_disabled=config.runtime.disable_guest_seccomp,
            resources=resources,
        )

    def _own_namespace(self) -> OwnNamespace:
        """Return the one of this process, which outlives a guest that could not be made."""
        if self._own is None:
            self._own = OwnNamespace()
            self._reaper.spawn_from(self._own.outside)
        return self._own

    def _share(self, config: Config, selection: Selection, folder: SharedFolder) -> ShareFs:
        match selection.choice:
            case BuiltinChoice():
                return InProcessShare(folder, cache=config.builtin.virtio_fs_cache)
            case QemuChoice(virtiofsd=found):
                return VirtiofsdShare(
                    folder,
                    run_dir=self._run_dir,
                    settings=virtiofsd_settings(config.qemu, found),
                    reaper=self._reaper,
                )


def _has_link_hook(spec: Spec) -> bool:
    """Docker makes the links by a hook of the creation, until version 26."""
    return any(_LINK_HOOK in hook.args for hook in spec.hooks.get("prestart", ()))
