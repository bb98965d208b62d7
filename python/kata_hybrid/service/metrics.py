"""Container statistics as containerd's cgroup metrics, version 1 or 2 as the host's cgroups are.

Readers compare the whole type URL, and some (``ctr``) expect certain sub-messages to be present.
"""

from pathlib import Path
from typing import Final

from google.protobuf.any_pb2 import Any as AnyMessage

from kata_hybrid.protos import cgroups_v1_pb2 as v1
from kata_hybrid.protos import cgroups_v2_pb2 as v2
from kata_hybrid.types import BlockIoEntry, ContainerStats, MemoryEntry

_V1_URL: Final = "io.containerd.cgroups.v1.Metrics"
_V2_URL: Final = "io.containerd.cgroups.v2.Metrics"
_V2_NOT_IN_MEMORY_STAT: Final = frozenset(
    {"usage", "usage_limit", "max_usage", "swap_usage", "swap_limit", "swap_max_usage", "psi"}
)
"""Fields of the message that are files of their own, so a line of memory.stat cannot be one."""
_V2_IO_FIELDS: Final = {"read": "rbytes", "write": "wbytes", "rios": "rios", "wios": "wios"}


def is_cgroup_v2_host(root: Path = Path("/sys/fs/cgroup")) -> bool:
    """Say whether the host's cgroups are the unified hierarchy (cgroups(7))."""
    return (root / "cgroup.controllers").exists()


def metrics(stats: ContainerStats, *, is_v2: bool) -> AnyMessage:
    """Encode statistics."""
    if is_v2:
        return AnyMessage(type_url=_V2_URL, value=_metrics_v2(stats).SerializeToString())
    return AnyMessage(type_url=_V1_URL, value=_metrics_v1(stats).SerializeToString())


def _metrics_v2(stats: ContainerStats) -> v2.Metrics:
    memory = v2.MemoryStat(
        usage=stats.memory.usage.usage,
        usage_limit=stats.memory.usage.limit,
        max_usage=stats.memory.usage.max_usage,
        swap_usage=stats.memory.swap.usage,
        swap_limit=stats.memory.swap.limit,
        swap_max_usage=stats.memory.swap.max_usage,
    )
    # memory.stat's own names are the message's, so what both know is carried over.
    known = v2.MemoryStat.DESCRIPTOR.fields_by_name
    for name, value in stats.memory.raw.items():
        if name in known and name not in _V2_NOT_IN_MEMORY_STAT:
            setattr(memory, name, value)
    return v2.Metrics(
        pids=v2.PidsStat(current=stats.pids_current, limit=stats.pids_limit),
        cpu=v2.CPUStat(
            usage_usec=stats.cpu.total_ns // 1000,
            user_usec=stats.cpu.user_ns // 1000,
            system_usec=stats.cpu.kernel_ns // 1000,
            nr_periods=stats.cpu.periods,
            nr_throttled=stats.cpu.throttled_periods,
            throttled_usec=stats.cpu.throttled_ns // 1000,
        ),
        memory=memory,
        io=v2.IOStat(usage=_io_v2(stats.block_io)),
        hugetlb=[
            v2.HugeTlbStat(
                current=page.usage,
                max=page.max_usage,
                failcnt=page.failcnt,
                pagesize=page.page_size,
            )
            for page in stats.hugetlb
        ],
    )


def _io_v2(entries: tuple[BlockIoEntry, ...]) -> list[v2.IOEntry]:
    devices: dict[tuple[int, int], v2.IOEntry] = {}
    for entry in entries:
        field = _V2_IO_FIELDS.get(entry.op.lower())
        if field is not None:
            key = (entry.major, entry.minor)
            device = devices.setdefault(key, v2.IOEntry(major=entry.major, minor=entry.minor))
            setattr(device, field, entry.value)
    return list(devices.values())


def _metrics_v1(stats: ContainerStats) -> v1.Metrics:
    raw = stats.memory.raw
    cache = raw.get("file", raw.get("cache", 0))
    rss = raw.get("anon", raw.get("rss", 0))
    pages = {
        name: raw.get(name, 0)
        for name in (
            "inactive_anon",
            "active_anon",
            "inactive_file",
            "active_file",
            "unevictable",
        )
    }
    return v1.Metrics(
        pids=v1.PidsStat(current=stats.pids_current, limit=stats.pids_limit),
        cpu=v1.CPUStat(
            usage=v1.CPUUsage(
                total=stats.cpu.total_ns,
                kernel=stats.cpu.kernel_ns,
                user=stats.cpu.user_ns,
                per_cpu=stats.cpu.per_cpu_ns,
            ),
            throttling=v1.Throttle(
                periods=stats.cpu.periods,
                throttled_periods=stats.cpu.throttled_periods,
                throttled_time=stats.cpu.throttled_ns,
            ),
        ),
        memory=v1.MemoryStat(
            cache=cache,
            rss=rss,
            total_cache=cache,
            total_rss=rss,
            mapped_file=raw.get("file_mapped", 0),
            dirty=raw.get("file_dirty", 0),
            writeback=raw.get("file_writeback", 0),
            pg_fault=raw.get("pgfault", 0),
            pg_maj_fault=raw.get("pgmajfault", 0),
            **pages,
            **{f"total_{name}": value for name, value in pages.items()},
            hierarchical_memory_limit=stats.memory.usage.limit,
            usage=_entry_v1(stats.memory.usage),
            swap=_entry_v1(stats.memory.swap),
            kernel=_entry_v1(stats.memory.kernel),
            kernel_tcp=v1.MemoryEntry(),
        ),
        blkio=v1.BlkIOStat(
            io_service_bytes_recursive=[
                v1.BlkIOEntry(
                    op=entry.op.capitalize(),
                    major=entry.major,
                    minor=entry.minor,
                    value=entry.value,
                )
                for entry in stats.block_io
                if entry.op.lower() in {"read", "write"}
            ]
        ),
        hugetlb=[
            v1.HugetlbStat(
                usage=page.usage, max=page.max_usage, failcnt=page.failcnt, pagesize=page.page_size
            )
            for page in stats.hugetlb
        ],
    )


def _entry_v1(entry: MemoryEntry) -> v1.MemoryEntry:
    return v1.MemoryEntry(
        usage=entry.usage, max=entry.max_usage, failcnt=entry.failcnt, limit=entry.limit
    )
