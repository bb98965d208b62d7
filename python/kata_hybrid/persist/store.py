"""The sandbox's record on disk: ``state.json`` in its run directory.

Owned by the sandbox, which calls :meth:`SandboxStore.update` before it acquires what would
outlive it and after it releases it. Written synchronously: a few hundred bytes on a tmpfs.
"""

import dataclasses
import errno
import os
from pathlib import Path

from kata_hybrid.aio.process import identify
from kata_hybrid.errors import InternalError, ResourceExhaustedError
from kata_hybrid.persist import atomic
from kata_hybrid.persist.schema import SandboxRecord
from kata_hybrid.types import ContainerId, LinkHooks, ProcessIdentity, SandboxId

FILE_NAME = "state.json"


class SandboxStore:
    """Keeps ``state.json`` equal to what the sandbox holds."""

    def __init__(self, run_dir: Path, *, sandbox_id: SandboxId, namespace: str) -> None:
        """Take over the record in ``run_dir``; nothing is written yet."""
        self._path = run_dir / FILE_NAME
        self._record = SandboxRecord(
            sandbox_id=sandbox_id, namespace=namespace, shim=identify("shim", os.getpid())
        )

    @property
    def record(self) -> SandboxRecord:
        """What was last written."""
        return self._record

    def update(
        self,
        *,
        containers: tuple[ContainerId, ...] | None = None,
        processes: tuple[ProcessIdentity, ...] | None = None,
        cgroups: tuple[str, ...] | None = None,
        links: LinkHooks | None = None,
    ) -> None:
        """Write the record with some parts replaced.

        Raises:
            ResourceExhaustedError: the file system is full; the old record stands.
            InternalError: it could not be written for another reason.
        """
        record = self._record
        if containers is not None:
            record = dataclasses.replace(record, containers=containers)
        if processes is not None:
            record = dataclasses.replace(record, processes=processes)
        if cgroups is not None:
            record = dataclasses.replace(record, cgroups=cgroups)
        if links is not None:
            record = dataclasses.replace(record, links=links)
        try:
            atomic.replace(self._path, record.to_json())
        except OSError as exc:
            message = f"save sandbox state {self._path}: {exc.strerror}"
            if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
                hint = "; free space on that file system and try again"
                raise ResourceExhaustedError(message + hint) from exc
            raise InternalError(message) from exc
        self._record = record
