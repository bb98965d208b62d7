"""The configuration in frozen values; the defaults here are what a host without a file gets.

:mod:`.load` fills them from ``configuration.toml``. Field names carry units; the comments name
the key of the file where it differs.
"""

import dataclasses
import logging
import math
import os
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Final

from kata_hybrid.types import FolderCache

Patterns = tuple[re.Pattern[str], ...]
ANY: Patterns = (re.compile(".*"),)
GUEST_DIR = Path("/usr/share/kata-hybrid/guest")
MIN_MEMORY_MIB = 128
MAX_MEMORY_MIB = 16 << 20
MAX_BUILTIN_MEMORY_MIB = 1 << 20
MIN_BOOT_TIMEOUT_MS = 10_000
"""Kata's connector raises a shorter ``reconnect_timeout_ms`` to this."""


class LogLevel(Enum):
    """Levels of the shim's log, as Kata names them."""

    TRACE = "trace"
    DEBUG = "debug"
    INFO = "info"
    WARN = "warn"
    ERROR = "error"
    CRITICAL = "critical"


class HypervisorName(Enum):
    """The machine monitors there are, as ``hypervisor_name`` and the tables spell them."""

    BUILTIN = "builtin"
    QEMU = "qemu"


class NetworkModel(Enum):
    """How a link of the pod is joined to the guest's card (key ``internetworking_model``)."""

    TC_FILTER = "tcfilter"
    NONE = "none"


class EmptyDirMode(Enum):
    """What an ``emptyDir`` on disk is in the guest (key ``emptydir_mode``)."""

    SHARED = "shared-fs"
    BLOCK = "block-plain"


class BlockEngine(Enum):
    """Who does the I/O of disks (key ``block_device_aio``)."""

    IO_URING = "io_uring"
    THREADS = "threads"


@dataclass(frozen=True, slots=True, kw_only=True)
class HypervisorConfig:
    """What every ``[hypervisor.…]`` table has."""

    MAX_VCPUS: ClassVar[int] = 1024
    """Processors a machine of this kind can have."""

    kernel: Path = GUEST_DIR / "vmlinux"
    initrd: Path = GUEST_DIR / "initrd.img"
    kernel_params: tuple[str, ...] = ()
    default_vcpus: float = 1.0
    """0 means one, below 0 means all of the host's."""
    memory_mib: int = 2048
    """Key ``default_memory``."""
    max_vcpus: int = 0
    """Key ``default_maxvcpus``; 0: what the host has."""
    max_memory_mib: int = 0
    """Key ``default_maxmemory``; 0: what the host has."""
    overhead_vcpus: float = 0.0
    """Processors a machine has besides its containers' limit."""
    overhead_memory_mib: int = 128
    """Key ``overhead_memory``: memory a machine has besides its containers' limit."""
    shared_fs: str = "virtio-fs"
    virtio_fs_cache: FolderCache = FolderCache.AUTO
    enable_annotations: Patterns = ()
    """Names below ``io.katacontainers.config.hypervisor.`` that pods may use."""
    enable_debug: bool = False

    def vcpu_count(self, *, host_cpu_count: int | None = None) -> int:
        """Return how many vCPUs a machine gets: whole, at least one, at most the host's."""
        host = min(host_cpu_count or os.cpu_count() or 1, self.max_vcpus or self.MAX_VCPUS)
        host = min(host, self.MAX_VCPUS)
        if self.default_vcpus < 0:
            return host
        return max(1, min(math.ceil(self.default_vcpus), host))


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltinConfig(HypervisorConfig):
    """``[hypervisor.builtin]``: the monitor in this process."""

    MAX_VCPUS: ClassVar[int] = 32

    enable_hugepages: bool = False
    block_engine: BlockEngine = BlockEngine.IO_URING
    """Key ``block_device_aio``."""
    is_block_direct: bool = False
    """Key ``block_device_cache_direct``."""
    reclaim_guest_freed_memory: bool = False
    disk_bandwidth_bits: int = 0
    """Key ``disk_rate_limiter_bw_max_rate``, bits each second; 0: no limit."""
    disk_bandwidth_burst_bits: int = 0
    """Key ``disk_rate_limiter_bw_one_time_burst``."""
    disk_operations: int = 0
    """Key ``disk_rate_limiter_ops_max_rate``, requests each second; 0: no limit."""
    disk_operations_burst: int = 0
    """Key ``disk_rate_limiter_ops_one_time_burst``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuConfig(HypervisorConfig):
    """``[hypervisor.qemu]``. A path of None means: look for it."""

    path: Path | None = None
    machine_type: str = "q35"
    machine_accelerators: str = ""
    """Appended to the machine options; ``accel=tcg`` or ``accel=kvm`` in it skips the choice."""
    cpu_features: str = ""
    entropy_source: Path = Path("/dev/urandom")
    valid_paths: tuple[str, ...] = ()
    """Key ``valid_hypervisor_paths``: globs that an annotation's ``path`` has to match."""
    valid_virtio_fs_daemons: tuple[str, ...] = ()
    """Key ``valid_virtio_fs_daemon_paths``."""
    valid_entropy_sources: tuple[str, ...] = ()
    virtio_fs_daemon: Path | None = None
    virtio_fs_extra_args: tuple[str, ...] = ()


FORWARD_PORT: Final = 1027
"""The vsock port on which the guest's agent is told to take connections to its loopback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """``[agent.kata]``."""

    enable_debug: bool = False
    debug_console_enabled: bool = False
    server_port: int = 1024
    log_port: int = 1025
    reconnect_timeout_ms: int = 60_000
    """The time a guest has to boot and answer."""
    request_timeout_s: int = 30
    """Key ``create_container_timeout``: the deadline of every request that has one."""
    health_check_request_timeout_ms: int = 90_000
    container_pipe_size: int = 0
    enable_annotations: Patterns = ANY
    """As in ``[hypervisor.…]``; in Kata any is allowed."""

    @property
    def boot_timeout_s(self) -> float:
        """How long a guest may take until its agent answers."""
        return max(self.reconnect_timeout_ms, MIN_BOOT_TIMEOUT_MS) / 1000

    @property
    def health_check_timeout_s(self) -> float:
        """Deadline of a health check."""
        return self.health_check_request_timeout_ms / 1000


_LOGGING_LEVELS = {
    LogLevel.TRACE: logging.DEBUG,
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.INFO,
    LogLevel.WARN: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
    LogLevel.CRITICAL: logging.CRITICAL,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """``[runtime]``."""

    hypervisor_name: HypervisorName | None = None
    """None: the built-in one where KVM runs guests, else QEMU."""
    agent_name: str = "kata"
    name: str = "virt_container"
    enable_debug: bool = False
    log_level: LogLevel = LogLevel.INFO
    disable_guest_seccomp: bool = False
    network_model: NetworkModel = NetworkModel.TC_FILTER
    """Key ``internetworking_model``."""
    enable_annotations: Patterns = ANY
    """As in ``[hypervisor.…]``; in Kata any is allowed."""
    empty_dir_mode: EmptyDirMode = EmptyDirMode.SHARED
    """Key ``emptydir_mode``."""
    sandbox_cgroup_only: bool = False
    """The machine and all that serves it are in the pod's cgroup."""
    is_sized_by_limits: bool = True
    """Key ``static_sandbox_resource_mgmt``: a machine is as large as its containers' limits ask."""

    @property
    def logging_level(self) -> int:
        """The level for Python's ``logging``."""
        return logging.DEBUG if self.enable_debug else _LOGGING_LEVELS[self.log_level]


Section = BuiltinConfig | QemuConfig | AgentConfig | RuntimeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything, and where it was read from (no file: the built-in defaults)."""

    builtin: BuiltinConfig = field(default_factory=BuiltinConfig)
    qemu: QemuConfig = field(default_factory=QemuConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    files: tuple[Path, ...] = ()
    described: frozenset[HypervisorName] = frozenset(HypervisorName)
    """The monitors that the files describe; all, where they describe none."""
    notices: tuple[str, ...] = ()
    """What the files ask for that is not implemented, and is ignored."""

    def hypervisor(self, name: HypervisorName) -> HypervisorConfig:
        """Return the table of a monitor."""
        match name:
            case HypervisorName.BUILTIN:
                return self.builtin
            case HypervisorName.QEMU:
                return self.qemu

    def section(self, table: tuple[str, ...]) -> Section:
        """Return a table by its name in the file."""
        section: Section = getattr(self, table[-1] if table[0] == "hypervisor" else table[0])
        return section

    def with_section(self, table: tuple[str, ...], section: Section) -> "Config":
        """Return the same with another content of a table."""
        fields: dict[str, Any] = {table[-1] if table[0] == "hypervisor" else table[0]: section}
        return dataclasses.replace(self, **fields)
