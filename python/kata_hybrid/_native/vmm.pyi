"""Machines in this process, and what this host can run.

    port = EventPort()
    config = VmConfig(kernel="vmlinux", command_line="console=ttyS0", memory_mib=256)
    vm = Vm(config, port, exited_token=1, console_fd=os.dup(1))
    vm.add_disk(id="root", path="root.img")
    vm.start()

A machine is one thread for each vCPU and one (``vmm-io``) for its devices; none runs Python.
Calls that make, change or wait for a machine block the calling thread and no other: other Python
threads go on. Any thread may call.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Literal, final

from kata_hybrid._native.events import EventPort

__all__ = [
    "Balloon",
    "DeviceMetrics",
    "KvmProbe",
    "Limit",
    "Vm",
    "VmConfig",
    "VmExit",
    "VmmError",
    "probe_kvm",
]

class VmmError(RuntimeError):
    """A machine failed, or cannot do what was asked of it; the text has every cause."""

@final
class VmConfig:
    """What a machine is made of, besides its devices. Frozen."""

    def __new__(
        cls,
        *,
        kernel: str | PathLike[str],
        initrd: str | PathLike[str] | None = None,
        command_line: str,
        vcpu_count: int = 1,
        memory_mib: int,
        memory: Literal["anonymous", "shared", "hugepages"] = "anonymous",
    ) -> VmConfig:
        """Describe a machine; nothing is opened.

        Args:
            kernel: a Linux kernel, bzImage or ELF (by its PVH or 64-bit entry).
            initrd: its initial RAM disk.
            command_line: its command line, up to 2047 bytes.
            vcpu_count: virtual processors, 1 to 32.
            memory_mib: memory, 64 to 1048576 MiB.
            memory: where it comes from: memory of this process as it is touched, a shared memfd,
                or 2 MiB pages of the host's pool, taken at the start.

        Raises:
            ValueError: a number is out of range, ``memory`` is another word.
        """
    @property
    def kernel(self) -> Path:
        """A Linux kernel."""
    @property
    def initrd(self) -> Path | None:
        """Its initial RAM disk."""
    @property
    def command_line(self) -> str:
        """Its command line."""
    @property
    def vcpu_count(self) -> int:
        """Virtual processors."""
    @property
    def memory_mib(self) -> int:
        """Memory."""
    @property
    def memory(self) -> Literal["anonymous", "shared", "hugepages"]:
        """Where it comes from."""

@final
class VmExit:
    """Why a machine is no longer running. Frozen."""

    @property
    def reason(
        self,
    ) -> Literal[
        "guest-shutdown", "guest-reset", "guest-panic", "guest-triple-fault", "killed", "failed"
    ]:
        """The reason in one word.

        ``guest-shutdown``: it switched itself off; ``guest-reset``: it restarted itself, which
        machines here do not; ``guest-panic``: its kernel panicked, then restarted;
        ``guest-triple-fault``: a processor could not go on; ``killed``: :meth:`Vm.stop`;
        ``failed``: KVM or a thread of the machine did.
        """
    @property
    def detail(self) -> str:
        """The rest, for people: the panic's line, a processor's registers, an error."""

@final
class Limit:
    """How much may pass in a time: a token bucket. Frozen."""

    def __new__(cls, *, size: int, refill_time_ms: int, one_time_burst: int = 0) -> Limit:
        """Let ``size`` bytes or requests pass in each ``refill_time_ms``.

        ``one_time_burst`` are on top, once. 0 of either of the others is refused by what uses it.
        """
    @property
    def size(self) -> int:
        """Bytes or requests."""
    @property
    def refill_time_ms(self) -> int:
        """How long an empty bucket takes to fill."""
    @property
    def one_time_burst(self) -> int:
        """What may pass on top, once."""

@final
class Balloon:
    """A machine's memory balloon, as the host controls it."""

    def set_target(self, pages: int) -> None:
        """Ask the guest to give up ``pages`` of 4 KiB in all. It does so in its own time."""
    @property
    def target_pages(self) -> int:
        """Pages the guest is to give up."""
    @property
    def actual_pages(self) -> int:
        """Pages the guest says it gave up. It may lie."""

@final
class DeviceMetrics:
    """Counters of one device at one moment. Frozen."""

    @property
    def kind(self) -> Literal["net", "block", "rng", "balloon", "vsock", "fs"]:
        """What it is."""
    @property
    def name(self) -> str:
        """Which of its kind: a disk's id, a folder's tag."""
    @property
    def counters(self) -> dict[str, int]:
        """Names and values. They only grow, unless the name says otherwise."""

@final
class Vm:
    """A virtual machine.

    created ──start──▶ running ◀──pause, resume──▶ paused
       │ ──restore────────────────────────────────▶ ▲
       └──────── stop, or its own end, from any ───▶ stopped

    Dropping it stops it, and waits for that.
    """

    def __new__(
        cls,
        config: VmConfig,
        port: EventPort,
        *,
        exited_token: int,
        log_token: int | None = None,
        console_fd: int | None = None,
    ) -> Vm:
        """Describe a machine; nothing of KVM exists yet.

        Args:
            config: what it is made of.
            port: where it reports.
            exited_token: gets exactly one event when the machine has ended; its code is 0 if it
                ran (:attr:`exit` has the reason), CANCELLED if it never did.
            log_token: gets an event for each line about something odd that was handled; at most 256
                wait, and what found no room is one event of code RESOURCE_EXHAUSTED, its value
                their number.
            console_fd: a pipe or socket that gets what the guest prints, taken over and made
                non-blocking: a slow reader misses some. Closed when the machine is over.

        Raises:
            OSError: ``console_fd`` is not open.
            ValueError: the command line is too long.
        """
    def add_disk(
        self,
        *,
        id: str,  # noqa: A002 - virtio-blk's own word
        path: str | PathLike[str],
        is_read_only: bool = False,
        is_direct: bool = False,
        engine: Literal["auto", "io_uring", "sync"] = "auto",
        bandwidth: Limit | None = None,
        operations: Limit | None = None,
    ) -> str:
        """Add a disk (virtio-blk). Before the start.

        Args:
            id: its name; the first 20 bytes are the serial that the guest sees.
            path: a raw image or a block device.
            is_read_only: refuse writes.
            is_direct: go past the host's page cache.
            engine: who does the I/O. ``auto`` is io_uring where this process may use it, else
                system calls on the machine's I/O thread.
            bandwidth: limit of bytes, read and written together.
            operations: limit of requests.

        Returns:
            The node it has in a Linux guest: ``/dev/vda``, ``/dev/vdb``, ...

        Raises:
            OSError: the file cannot be used; ``filename`` is its path.
            ValueError: it is no raw image or block device, a limit is 0, ``engine`` another word.
            VmmError: too late, or too many devices.
        """
    def add_disk_slot(self, *, name: str) -> str:
        """Add a device that disks come into while the guest runs. Before the start.

        The guest does not know of it before the first comes: its kernel needs ACPI with containers
        and generic events. It then stays, empty or not.

        Args:
            name: the slot's, in errors and metrics.

        Returns:
            The node of its disks in a Linux guest, if slots get their first ones in order.

        Raises:
            VmmError: too late, or too many devices.
        """
    def plug_disk(
        self,
        *,
        slot: str,
        id: str,  # noqa: A002 - as add_disk's
        path: str | PathLike[str],
        is_read_only: bool = False,
        is_direct: bool = False,
        engine: Literal["auto", "io_uring", "sync"] = "auto",
        bandwidth: Limit | None = None,
        operations: Limit | None = None,
    ) -> None:
        """Put a disk into a slot. While the machine runs.

        Returns when the guest has looked at it, or after a second. A disk that may not be written
        refuses it; the guest learns that from its first try. Arguments are those of
        :meth:`add_disk`.

        Raises:
            OSError: the file cannot be used; ``filename`` is its path.
            ValueError: it is no raw image or block device, a limit is 0, ``engine`` another word.
            VmmError: there is no such slot, it is occupied, or the machine does not run.
        """
    def unplug_disk(self, *, slot: str) -> None:
        """Take the disk out of a slot, after what is under way. While the machine runs.

        What the guest asks of it afterwards fails. Idempotent.

        Raises:
            VmmError: there is no such slot, the disk does not answer, or the machine does not run.
        """
    def add_folder(
        self,
        *,
        tag: str,
        folder: str | PathLike[str],
        cache: Literal["never", "auto", "always"] = "auto",
        is_read_only: bool = False,
    ) -> None:
        """Share a folder (virtio-fs), which the guest mounts by ``tag``. Before the start.

        What is mounted below it later is seen, in the mount namespace of the starting thread.
        ``cache`` is what the guest may keep: nothing, names and attributes for a second, or
        everything (for a folder that nobody else writes).

        Raises:
            OSError: it is not there, or no folder; ``filename`` is its path.
            ValueError: the tag has not 1 to 36 bytes, ``cache`` is another word.
            VmmError: too late, or too many devices.
        """
    def add_vsock(self, *, socket_path: str | PathLike[str], guest_cid: int = 3) -> None:
        """Let host and guest connect to each other (virtio-vsock). Before the start.

        Serves the hybrid Unix socket protocol on ``socket_path`` (created, mode 0600, removed with
        the machine): ``CONNECT port`` reaches a port of the guest. Connections of the guest to
        port P of the host go to ``socket_path`` + ``_P``.

        Raises:
            OSError: the path cannot be bound; it is ``filename``.
            ValueError: the context id is reserved.
            VmmError: too late, or too many devices.
        """
    def add_net(
        self,
        *,
        id: str,  # noqa: A002 - as a disk's
        tap: str | Sequence[int],
        mac: bytes,
        mtu: int = 1500,
        queue_pairs: int = 1,
        rx_bandwidth: Limit | None = None,
        rx_frames: Limit | None = None,
        tx_bandwidth: Limit | None = None,
        tx_frames: Limit | None = None,
    ) -> None:
        """Add a network card (virtio-net). Before the start.

        Args:
            id: its name in errors, warnings and metrics.
            tap: a tap of this network namespace by its name, or the descriptors of one, taken over:
                one open queue (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR) for each pair.
            mac: the guest's address, 6 bytes.
            mtu: the largest packet that the link takes, 68 or more.
            queue_pairs: pairs of queues, 1 to 8.
            rx_bandwidth: limit of bytes that the guest receives.
            rx_frames: limit of frames that it receives.
            tx_bandwidth: limit of bytes that it sends.
            tx_frames: limit of frames that it sends.

        Raises:
            OSError: the tap is missing, busy or not ours; ``filename`` is its name.
            ValueError: a number is out of range, or it is no tap.
            VmmError: too late, or too many devices.
        """
    def add_rng(self, *, bandwidth: Limit | None = None, operations: Limit | None = None) -> None:
        """Give the guest random bytes of the host's (virtio-rng). Before the start.

        Raises:
            ValueError: a limit is 0.
            VmmError: too late, or too many devices.
        """
    def add_balloon(
        self,
        *,
        target_pages: int = 0,
        deflates_on_oom: bool = True,
        reports_free_pages: bool = False,
    ) -> Balloon:
        """Let the guest give memory back (virtio-balloon). Before the start.

        Args:
            target_pages: pages of 4 KiB it is to give up from the start.
            deflates_on_oom: it may take them back before it kills a process for want of memory.
            reports_free_pages: it reports what is free, and the host takes that until it is used.

        Raises:
            VmmError: too late, or too many devices.
        """
    def start(self) -> None:
        """Make the machine and let the guest run. Returns when its processors run.

        If it fails nothing of the machine is left.

        Raises:
            OSError: the system refused; ``filename`` is ``/dev/kvm`` or a file where it is about
                one, ``errno`` ENOMEM where memory is short.
            VmmError: kernel or initrd cannot be booted, KVM failed, or it was started before.
        """
    def restore(self, folder: str | PathLike[str]) -> None:
        """Make the machine as a snapshot in ``folder`` says, and leave it paused.

        The devices must have been added as they were to the machine of the snapshot, in the same
        order. The memory is read as it is touched: the folder must stay as it is.

        Raises:
            OSError: as for :meth:`start`, or the snapshot cannot be read.
            VmmError: it is damaged or of another machine.
        """
    def pause(self) -> None:
        """Stop the guest's time. Returns when no processor runs and no device works. Idempotent.

        Raises:
            TimeoutError: it did not come to rest in time.
            VmmError: it does not run.
        """
    def resume(self) -> None:
        """Let the guest's time go on. Idempotent.

        Raises:
            TimeoutError: no answer in time.
            VmmError: it is not paused.
        """
    def snapshot(self, folder: str | PathLike[str]) -> None:
        """Write the whole machine, which has to be paused, into ``folder``.

        Raises:
            OSError: a file cannot be written.
            TimeoutError: it takes longer than ten minutes.
            VmmError: it is not paused, or a device cannot be kept as it is.
        """
    def stop(self) -> None:
        """End the machine now and wait until all of it is released. Idempotent, in every state."""
    @property
    def state(self) -> Literal["created", "booting", "running", "paused", "stopped"]:
        """Where it is in its life."""
    @property
    def exit(self) -> VmExit | None:
        """How it ended; None before that, and for a machine that never ran."""
    def console_tail(self) -> bytes:
        """The last of what the guest printed, at most 64 KiB."""
    def thread_ids(self) -> dict[str, int]:
        """The kernel's ids of its threads (``vcpu-0``, ..., ``vmm-io``), for cgroups and affinity.

        Empty before the start and after :meth:`stop`. Waits for a start that is under way.
        """
    def metrics(self) -> list[DeviceMetrics]:
        """Counters of each device. Empty before the start and after :meth:`stop`."""

@final
class KvmProbe:
    """What the probe found. Frozen."""

    @property
    def is_usable(self) -> bool:
        """A guest that meets the instructions a Linux kernel needs ran to its end."""
    @property
    def reason(self) -> str:
        """Why not, in one line, or what was seen to work."""
    @property
    def api_version(self) -> int | None:
        """KVM_GET_API_VERSION, if ``/dev/kvm`` could be opened."""

def probe_kvm() -> KvmProbe:
    """Open ``/dev/kvm`` and run a tiny long-mode guest. Takes milliseconds; never raises."""
