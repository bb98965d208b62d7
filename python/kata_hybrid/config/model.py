"""The configuration in frozen values; the defaults here are what a host without a file gets.

:mod:`.load` fills them from ``configuration.toml``. Field names carry units; the comments name
the key of the file where it differs.
"""

import logging
import math
import os
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

GUEST_DIR = Path("/usr/share/kata-hybrid/guest")
MIN_MEMORY_MIB = 128
MAX_MEMORY_MIB = 16 << 20
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


class VirtioFsCache(Enum):
    """What the guest may cache of the shared folder."""

    NEVER = "never"
    AUTO = "auto"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuConfig:
    """``[hypervisor.qemu]``. A path of None means: look for it."""

    path: Path | None = None
    kernel: Path = GUEST_DIR / "vmlinux"
    initrd: Path = GUEST_DIR / "initrd.img"
    machine_type: str = "q35"
    machine_accelerators: str = ""
    """Appended to the machine options; ``accel=tcg`` or ``accel=kvm`` in it skips the choice."""
    cpu_features: str = ""
    kernel_params: tuple[str, ...] = ()
    default_vcpus: float = 1.0
    """0 means one, below 0 means all of the host's."""
    memory_mib: int = 2048
    """Key ``default_memory``."""
    entropy_source: Path = Path("/dev/urandom")
    shared_fs: str = "virtio-fs"
    virtio_fs_daemon: Path | None = None
    virtio_fs_cache: VirtioFsCache = VirtioFsCache.AUTO
    virtio_fs_extra_args: tuple[str, ...] = ()
    enable_debug: bool = False

    def vcpu_count(self, *, host_cpu_count: int | None = None) -> int:
        """Return how many vCPUs a machine gets: whole, at least one, at most the host's."""
        host = host_cpu_count or os.cpu_count() or 1
        if self.default_vcpus < 0:
            return host
        return max(1, min(math.ceil(self.default_vcpus), host))


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

    hypervisor_name: str = "qemu"
    agent_name: str = "kata"
    name: str = "virt_container"
    enable_debug: bool = False
    log_level: LogLevel = LogLevel.INFO
    disable_guest_seccomp: bool = False

    @property
    def logging_level(self) -> int:
        """The level for Python's ``logging``."""
        return logging.DEBUG if self.enable_debug else _LOGGING_LEVELS[self.log_level]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything, and where it was read from (no file: the built-in defaults)."""

    qemu: QemuConfig = field(default_factory=QemuConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    files: tuple[Path, ...] = ()
