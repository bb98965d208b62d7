"""The contract of every machine monitor, and the values it is given.

Lifecycle, in this order:

    new ──add_*──▶ new ──start──▶ running ──(guest or host ends it)──▶ exited
                                     │ stop ─────────────────────────▶ exited

``start`` returns when the monitor runs the guest, not when the guest is up. ``exited`` may be
awaited any number of times and from ``new`` on; ``stop`` and ``cleanup`` are safe to repeat and
in every state. Process-neutral: nothing here says whether the machine is a child process, a
service, or threads of ours.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from kata_hybrid.errors import InvalidArgumentError
from kata_hybrid.types import (
    BlockDevice,
    FolderDevice,
    GuestDisk,
    NetworkDevice,
    ProcessIdentity,
    VmExit,
)

_MAX_SERIAL_BYTES: Final = 20
"""VIRTIO_BLK_ID_BYTES, virtio 1.2 section 5.2.6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineConfig:
    """What a machine is made of; validated by the configuration loader."""

    name: str
    """Shown in process listings: the sandbox id."""
    kernel: Path
    initrd: Path | None
    kernel_params: tuple[str, ...]
    vcpu_count: int
    memory_mib: int
    run_dir: Path
    """The sandbox's own directory, mode 0700: every socket and file of the machine is here."""


class Hypervisor(Protocol):
    """One virtual machine."""

    @property
    def name(self) -> str:
        """The monitor and its accelerator, such as ``qemu (tcg)``."""

    @property
    def agent_address(self) -> str:
        """Where the guest's vsock ports are reached: ``vsock://CID`` or ``hvsock:///path``."""

    @property
    def processes(self) -> tuple[ProcessIdentity, ...]:
        """Host processes to be killed if this process dies; empty for one in our own."""

    @property
    def task_pid(self) -> int:
        """A live host pid that stands for the guest's processes."""

    def add_shared_folder(self, folder: FolderDevice) -> None:
        """Give the guest a virtio-fs device. Before ``start``.

        Raises:
            InvalidArgumentError: it is of a kind this monitor does not take.
            InvalidStateError: too late.
        """

    async def add_disk(self, disk: BlockDevice) -> GuestDisk:
        """Give the guest a virtio-blk device and say how the agent finds it. Until its end.

        While the machine runs the disk comes once its file is open; the guest may need a moment.

        Raises:
            InvalidArgumentError: its id does not fit a virtio-blk serial, or it is no disk.
            ResourceExhaustedError: the machine has room for no more.
            VmmError: it cannot be opened, or the machine does not take it.
            InvalidStateError: the machine is at its end.
        """

    async def remove_disk(self, disk_id: str) -> None:
        """Take a disk away that was given while the machine runs: afterwards it is not open here.

        One that was there from the start stays; one that is not there, and a machine that is gone,
        are no errors.

        Raises:
            VmmError: the guest or the host does not let it go.
        """

    def add_network(self, device: NetworkDevice) -> str:
        """Give the guest a virtio-net device. Before ``start``.

        Returns:
            Its PCI path, by which the agent waits for it; empty where there is no PCI.

        Raises:
            ResourceExhaustedError: the machine has room for no more.
            InvalidStateError: too late.
        """

    async def start(self) -> None:
        """Start the machine. If that fails, or is cancelled, nothing of it is left.

        Raises:
            VmmError: the monitor could not start it; the text has its own last words.
            KvmAccessError: it needs KVM, which is absent or forbidden.
            ResourceExhaustedError: the host has not the memory.
            InvalidArgumentError: it was described as nothing can be.
            InvalidStateError: it was started or stopped before.
        """

    async def stop(self) -> None:
        """End the machine now (no guest shutdown) and wait until it is gone. Idempotent.

        Raises:
            VmmError: it does not go away within seconds.
        """

    async def exited(self) -> VmExit:
        """Wait for the machine to be gone and say why."""

    def console_tail(self) -> str:
        """The last lines of the guest's console, for an error or a log."""

    async def cleanup(self) -> None:
        """Release sockets, files and descriptors. After ``stop``. Idempotent."""


def check_serial(disk_id: str) -> None:
    """Check that a disk id fits virtio-blk's serial.

    Raises:
        InvalidArgumentError: it does not.
    """
    if not disk_id or len(disk_id.encode()) > _MAX_SERIAL_BYTES or not disk_id.isascii():
        msg = f"disk id {disk_id!r} is not 1 to {_MAX_SERIAL_BYTES} ASCII characters"
        raise InvalidArgumentError(msg)
