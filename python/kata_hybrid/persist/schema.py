"""What a sandbox writes down so that anyone can clean up after it.

Version 1, JSON, one object:

    version        1
    sandbox_id     text
    namespace      containerd namespace
    containers     ids of the containers that exist
    shim           {name, pid, start_ticks} of the serving process
    processes      the same for each process to be killed
    mounts         paths to unmount in the host's mount namespace
    cgroups        absolute cgroup folders to remove
    links          {namespace, identity, links} of a pod whose links are redirected, or null

The serving shim writes it (``store.py``); ``recovery.py`` reads it without this module, because
``delete`` may run years later and must not import more than it needs.
"""

import json
from dataclasses import asdict, dataclass

from kata_hybrid.types import ContainerId, LinkHooks, ProcessIdentity, SandboxId

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxRecord:
    """Everything needed to find and release what a sandbox holds on the host."""

    sandbox_id: SandboxId
    namespace: str
    shim: ProcessIdentity
    containers: tuple[ContainerId, ...] = ()
    processes: tuple[ProcessIdentity, ...] = ()
    mounts: tuple[str, ...] = ()
    cgroups: tuple[str, ...] = ()
    links: LinkHooks | None = None

    def to_json(self) -> bytes:
        """Encode as UTF-8 JSON."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1).encode()
