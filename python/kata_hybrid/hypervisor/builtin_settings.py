"""How the built-in monitor makes machines on this host: its part of the configuration."""

from dataclasses import dataclass

from kata_hybrid.config.model import BlockEngine, BuiltinConfig
from kata_hybrid.errors import InvalidConfigError

_HUGE_PAGE_MIB = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskLimit:
    """How much a disk may do in a second: bytes or requests, and more of them once."""

    per_second: int
    one_time_burst: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltinSettings:
    """How machines are made on this host: from the configuration."""

    has_hugepages: bool = False
    block_engine: BlockEngine = BlockEngine.IO_URING
    is_block_direct: bool = False
    disk_bandwidth: DiskLimit | None = None
    disk_operations: DiskLimit | None = None
    reclaims_freed_memory: bool = False


def builtin_settings(config: BuiltinConfig) -> BuiltinSettings:
    """Take what is configured.

    Raises:
        InvalidConfigError: the memory is no whole number of huge pages.
    """
    if config.enable_hugepages and config.memory_mib % _HUGE_PAGE_MIB:
        message = (
            f"hypervisor.builtin.default_memory = {config.memory_mib} is no multiple of "
            f"{_HUGE_PAGE_MIB}, the MiB of a huge page (enable_hugepages)"
        )
        raise InvalidConfigError(message)
    return BuiltinSettings(
        has_hugepages=config.enable_hugepages,
        block_engine=config.block_engine,
        is_block_direct=config.is_block_direct,
        disk_bandwidth=_disk_limit(
            config.disk_bandwidth_bits // 8, burst=config.disk_bandwidth_burst_bits // 8
        ),
        disk_operations=_disk_limit(config.disk_operations, burst=config.disk_operations_burst),
        reclaims_freed_memory=config.reclaim_guest_freed_memory,
    )


def _disk_limit(per_second: int, *, burst: int) -> DiskLimit | None:
    return DiskLimit(per_second=per_second, one_time_burst=burst) if per_second else None
