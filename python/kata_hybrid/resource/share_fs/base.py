"""The shared folder's contract: where it is on both sides, and who serves it.

Lifecycle: new ──start──▶ serving ──(daemon dies)──▶ gone; ``stop`` from any state, repeatable.
Without a daemon the machine's monitor serves it, for as long as there is a machine.
What is mounted below ``host_path`` after ``start`` must be seen by the guest too.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Protocol

from kata_hybrid.types import FolderDevice, ProcessIdentity

TAG: Final = "kataShared"
GUEST_PATH: Final = PurePosixPath("/run/kata-containers/shared/containers")


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedFolder:
    """One folder, seen from both sides."""

    host_path: Path
    guest_path: PurePosixPath = GUEST_PATH


class ShareFs(Protocol):
    """Serves a :class:`SharedFolder` to one machine."""

    @property
    def folder(self) -> SharedFolder:
        """What is served."""

    @property
    def device(self) -> FolderDevice:
        """The device to give to the machine. Valid once started."""

    @property
    def processes(self) -> tuple[ProcessIdentity, ...]:
        """Host processes to be killed if this process dies."""

    async def start(self) -> None:
        """Serve the folder, which must exist.

        Raises:
            VmmError: the daemon did not come up; the text has its own last words.
        """

    async def died(self) -> str:
        """Wait for the daemon to be gone and say why. Without a daemon: for ``stop``."""

    async def stop(self) -> None:
        """End the daemon now and remove its socket. Idempotent."""
