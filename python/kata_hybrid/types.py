"""Values that cross layers. Frozen, free of behaviour, importing nothing of ours.

Ids are types, not strings. ``resource`` returns guest values (``GuestStorage``) that ``runtimes``
sends to the agent; ``service`` and ``agent`` translate them from and to protobuf messages.
"""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NewType

SandboxId = NewType("SandboxId", str)
ContainerId = NewType("ContainerId", str)
ExecId = NewType("ExecId", str)

JsonObject = dict[str, object]
"""A parsed JSON object, such as an OCI spec."""


class TaskStatus(Enum):
    """Task status as containerd numbers it (``containerd.v1.types.Status``)."""

    UNKNOWN = 0
    CREATED = 1
    RUNNING = 2
    STOPPED = 3
    PAUSED = 4
    PAUSING = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One mount of a root file system, as containerd asks for it (``containerd.types.Mount``)."""

    type: str
    source: str
    target: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stdio:
    """Where a process's standard streams go; an empty string means /dev/null."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitInfo:
    """How a process ended."""

    status: int
    """0-255; 128+n for signal n."""
    exited_at_ns: int
    """UTC, nanoseconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessState:
    """What ``Task.State`` reports of one process."""

    container_id: ContainerId
    exec_id: ExecId | None
    bundle: str
    pid: int
    status: TaskStatus
    stdio: Stdio
    exit: ExitInfo | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """A host process that can be told from a later one of the same pid.

    ``start_ticks`` is field 22 of ``/proc/PID/stat`` (proc(5)), clock ticks since boot.
    """

    name: str
    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestStorage:
    """Something the agent mounts before a container (agent protocol ``Storage``)."""

    driver: str
    source: str
    fstype: str
    mount_point: str
    driver_options: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    is_shared: bool = False
    """It stays until the guest ends, and not only as long as a container uses it."""
    group_id: int | None = None
    """Whose everything in it is to be."""
    is_group_kept_if_right: bool = False
    """Only if the root of it is another group's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestDevice:
    """A disk of the guest's that a container has as a device (agent protocol ``Device``)."""

    driver: str
    source: str
    """As of :class:`GuestDisk`."""
    container_path: str
    """By which the agent finds it in the container's spec."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestDetails:
    """What the agent says of itself and its guest."""

    agent_version: str
    storage_handlers: tuple[str, ...]
    extra_features: frozenset[str]
    supports_seccomp: bool
    memory_block_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuStats:
    """CPU time of a container."""

    total_ns: int = 0
    user_ns: int = 0
    kernel_ns: int = 0
    per_cpu_ns: tuple[int, ...] = ()
    periods: int = 0
    throttled_periods: int = 0
    throttled_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEntry:
    """Usage of one kind of memory, bytes."""

    usage: int = 0
    max_usage: int = 0
    failcnt: int = 0
    limit: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStats:
    """Memory of a container; ``raw`` is the guest's memory.stat."""

    usage: MemoryEntry = field(default_factory=MemoryEntry)
    swap: MemoryEntry = field(default_factory=MemoryEntry)
    kernel: MemoryEntry = field(default_factory=MemoryEntry)
    raw: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockIoEntry:
    """One counter of one block device."""

    major: int
    minor: int
    op: str
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HugetlbStats:
    """Usage of one huge page size, bytes."""

    page_size: str
    usage: int
    max_usage: int
    failcnt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerStats:
    """Everything ``Task.Stats`` needs, independent of the cgroup version."""

    cpu: CpuStats
    memory: MemoryStats
    pids_current: int
    pids_limit: int
    block_io: tuple[BlockIoEntry, ...] = ()
    hugetlb: tuple[HugetlbStats, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VmExit:
    """Why a virtual machine is no longer there."""

    reason: str
    """``guest-panic``, ``guest-reset``, ``guest-shutdown``, ``guest-triple-fault``, ``killed`` or
    ``failed``."""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDevice:
    """A disk of the guest's (virtio-blk)."""

    id: str
    """At most 20 bytes: becomes the virtio-blk serial."""
    path: Path
    is_read_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestDisk:
    """How the agent finds a disk of the guest's: what it is and where."""

    driver: str
    """The agent's storage driver: ``blk`` for a PCI path, ``mmioblk`` for a node below /dev."""
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkDevice:
    """A network card the guest gets before it boots (virtio-net), with a tap at the host's end."""

    id: str
    """The name of the link it stands for, for errors and metrics."""
    tap_fds: tuple[int, ...]
    """Open queues of a tap, one for each pair; they stay the giver's, and open until the start."""
    mac: str
    mtu: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestInterface:
    """How the agent sets a network card up (agent protocol ``Interface``)."""

    name: str
    mac: str
    """By which the agent finds it."""
    mtu: int
    addresses: tuple[str, ...]
    """Each with the length of its prefix, such as ``10.0.0.2/24``."""
    device_path: str = ""
    """The PCI path, where there is one: the agent waits for the device."""
    has_arp: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestRoute:
    """A route of the guest's (agent protocol ``Route``)."""

    destination: str
    """A prefix; empty for the default route."""
    gateway: str
    device: str
    source: str = ""
    scope: int = 0
    flags: int = 0
    mtu: int = 0
    is_ipv6: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestNeighbor:
    """A permanent neighbour of the guest's (agent protocol ``ARPNeighbor``)."""

    address: str
    device: str
    mac: str
    state: int
    flags: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestNetwork:
    """All that the agent sets up of a pod's network."""

    interfaces: tuple[GuestInterface, ...] = ()
    routes: tuple[GuestRoute, ...] = ()
    neighbors: tuple[GuestNeighbor, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkHooks:
    """Links in a network namespace that frames are redirected from: to be undone."""

    namespace: str
    """Its path."""
    identity: str
    """What tells it from a later one at that path (``persist/netns.py``)."""
    links: tuple[str, ...]


class FolderCache(Enum):
    """What the guest may cache of a shared folder."""

    NEVER = "never"
    AUTO = "auto"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True, kw_only=True)
class VhostUserFs:
    """A shared folder the guest mounts by ``tag``, served by a daemon on ``socket_path``."""

    tag: str
    socket_path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFolder:
    """A shared folder the guest mounts by ``tag``, served by the machine monitor itself."""

    tag: str
    path: Path
    cache: FolderCache = FolderCache.AUTO


FolderDevice = VhostUserFs | HostFolder
"""A virtio-fs device; which kind a machine takes is its monitor's business."""
