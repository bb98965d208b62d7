"""Runtimes by name (``runtime.name`` of the configuration): for now ``virt_container`` alone."""

from dataclasses import dataclass
from pathlib import Path

from kata_hybrid.agent.logger import StreamOpener
from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.persist.store import SandboxStore
from kata_hybrid.runtimes.base import EventSink, Runtime, Sandbox
from kata_hybrid.runtimes.oci.hooks import HookRunner
from kata_hybrid.runtimes.virt.factory import VirtGuestFactory
from kata_hybrid.runtimes.virt.pod import PodSandbox
from kata_hybrid.runtimes.virt.sandbox import VirtSandbox
from kata_hybrid.types import SandboxId


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A sandbox from both of its sides."""

    runtime: Runtime
    sandbox: Sandbox


def build_runtime(
    *,
    sandbox_id: SandboxId,
    namespace: str,
    run_dir: Path,
    config_path: Path | None,
    sink: EventSink,
) -> Built:
    """Make the runtime of one sandbox, on the running loop; nothing is started.

    Args:
        sandbox_id: the sandbox's.
        namespace: containerd's.
        run_dir: the sandbox's own folder.
        config_path: configuration file that ``start`` was given, if any.
        sink: where its events go.
    """
    reaper = ProcessReaper()
    runtime = VirtSandbox(
        guest_factory=VirtGuestFactory(
            sandbox_id, namespace=namespace, run_dir=run_dir, config_path=config_path, reaper=reaper
        ),
        streams=StreamOpener(reaper, namespace=namespace),
        store=SandboxStore(run_dir, sandbox_id=sandbox_id, namespace=namespace),
        events=sink,
        hooks=HookRunner(reaper),
    )
    return Built(runtime=runtime, sandbox=PodSandbox(sandbox_id, runtime))
