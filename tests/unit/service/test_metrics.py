from pathlib import Path

import pytest

from kata_hybrid.protos import cgroups_v1_pb2 as v1
from kata_hybrid.protos import cgroups_v2_pb2 as v2
from kata_hybrid.service.metrics import is_cgroup_v2_host, metrics
from kata_hybrid.types import (
    BlockIoEntry,
    ContainerStats,
    CpuStats,
    HugetlbStats,
    MemoryEntry,
    MemoryStats,
)

STATS = ContainerStats(
    cpu=CpuStats(
        total_ns=9_000,
        user_ns=7_000,
        kernel_ns=2_000,
        per_cpu_ns=(4_000, 5_000),
        periods=10,
        throttled_periods=11,
        throttled_ns=12_000,
    ),
    memory=MemoryStats(
        usage=MemoryEntry(usage=20, max_usage=21, failcnt=22, limit=23),
        swap=MemoryEntry(usage=30, max_usage=31, failcnt=32, limit=33),
        kernel=MemoryEntry(usage=40, max_usage=41, failcnt=42, limit=43),
        raw={
            "anon": 50,
            "file": 51,
            "file_mapped": 52,
            "file_dirty": 53,
            "file_writeback": 54,
            "pgfault": 55,
            "pgmajfault": 56,
            "inactive_anon": 57,
            "active_anon": 58,
            "inactive_file": 59,
            "active_file": 60,
            "unevictable": 61,
            "zswap": 62,
        },
    ),
    pids_current=3,
    pids_limit=64,
    block_io=(
        BlockIoEntry(major=8, minor=0, op="Read", value=70),
        BlockIoEntry(major=8, minor=0, op="write", value=71),
        BlockIoEntry(major=8, minor=16, op="rios", value=72),
        BlockIoEntry(major=8, minor=16, op="Discard", value=73),
    ),
    hugetlb=(HugetlbStats(page_size="2MB", usage=80, max_usage=81, failcnt=82),),
)
EMPTY = ContainerStats(cpu=CpuStats(), memory=MemoryStats(), pids_current=0, pids_limit=0)
LARGEST = 2**64 - 1


def in_v1(stats: ContainerStats) -> v1.Metrics:
    packed = metrics(stats, is_v2=False)
    assert packed.type_url == "io.containerd.cgroups.v1.Metrics"
    return v1.Metrics.FromString(packed.value)


def in_v2(stats: ContainerStats) -> v2.Metrics:
    packed = metrics(stats, is_v2=True)
    assert packed.type_url == "io.containerd.cgroups.v2.Metrics"
    return v2.Metrics.FromString(packed.value)


def test_v2_cpu_is_in_microseconds() -> None:
    assert in_v2(STATS).cpu == v2.CPUStat(
        usage_usec=9,
        user_usec=7,
        system_usec=2,
        nr_periods=10,
        nr_throttled=11,
        throttled_usec=12,
    )


def test_v2_memory_has_the_names_of_memory_stat() -> None:
    assert in_v2(STATS).memory == v2.MemoryStat(
        usage=20,
        max_usage=21,
        usage_limit=23,
        swap_usage=30,
        swap_max_usage=31,
        swap_limit=33,
        anon=50,
        file=51,
        file_mapped=52,
        file_dirty=53,
        file_writeback=54,
        pgfault=55,
        pgmajfault=56,
        inactive_anon=57,
        active_anon=58,
        inactive_file=59,
        active_file=60,
        unevictable=61,
    )


def test_v2_counts_processes() -> None:
    assert in_v2(STATS).pids == v2.PidsStat(current=3, limit=64)


def test_v2_has_one_io_entry_for_each_device() -> None:
    assert list(in_v2(STATS).io.usage) == [
        v2.IOEntry(major=8, minor=0, rbytes=70, wbytes=71),
        v2.IOEntry(major=8, minor=16, rios=72),
    ]


def test_v2_has_huge_pages() -> None:
    (page,) = in_v2(STATS).hugetlb
    assert page == v2.HugeTlbStat(current=80, max=81, pagesize="2MB", failcnt=82)


@pytest.mark.parametrize("name", ["psi", "usage", "usage_limit", "swap_usage", "max_usage"])
def test_v2_counters_are_not_the_guests_to_rename(name: str) -> None:
    stats = ContainerStats(
        cpu=CpuStats(),
        memory=MemoryStats(usage=MemoryEntry(usage=1, max_usage=1, limit=1), raw={name: 99}),
        pids_current=0,
        pids_limit=0,
    )
    memory = in_v2(stats).memory
    assert (memory.usage, memory.max_usage, memory.usage_limit) == (1, 1, 1)
    assert memory.swap_usage == 0


def test_v1_cpu_is_in_nanoseconds() -> None:
    assert in_v1(STATS).cpu == v1.CPUStat(
        usage=v1.CPUUsage(total=9_000, kernel=2_000, user=7_000, per_cpu=[4_000, 5_000]),
        throttling=v1.Throttle(periods=10, throttled_periods=11, throttled_time=12_000),
    )


def test_v1_memory_is_translated_from_memory_stat() -> None:
    memory = in_v1(STATS).memory
    assert (memory.cache, memory.total_cache) == (51, 51)
    assert (memory.rss, memory.total_rss) == (50, 50)
    assert (memory.mapped_file, memory.dirty, memory.writeback) == (52, 53, 54)
    assert (memory.pg_fault, memory.pg_maj_fault) == (55, 56)
    assert (memory.inactive_anon, memory.total_inactive_anon) == (57, 57)
    assert (memory.active_file, memory.total_active_file) == (60, 60)
    assert (memory.unevictable, memory.hierarchical_memory_limit) == (61, 23)


def test_v1_memory_of_a_v1_guest_is_taken_as_it_is() -> None:
    stats = ContainerStats(
        cpu=CpuStats(),
        memory=MemoryStats(raw={"cache": 1, "rss": 2}),
        pids_current=0,
        pids_limit=0,
    )
    assert (in_v1(stats).memory.cache, in_v1(stats).memory.rss) == (1, 2)


def test_v1_memory_entries_keep_every_field() -> None:
    memory = in_v1(STATS).memory
    assert memory.usage == v1.MemoryEntry(usage=20, max=21, failcnt=22, limit=23)
    assert memory.swap == v1.MemoryEntry(usage=30, max=31, failcnt=32, limit=33)
    assert memory.kernel == v1.MemoryEntry(usage=40, max=41, failcnt=42, limit=43)


def test_v1_block_io_is_bytes_read_and_written() -> None:
    assert list(in_v1(STATS).blkio.io_service_bytes_recursive) == [
        v1.BlkIOEntry(op="Read", major=8, minor=0, value=70),
        v1.BlkIOEntry(op="Write", major=8, minor=0, value=71),
    ]


def test_v1_has_processes_and_huge_pages() -> None:
    assert in_v1(STATS).pids == v1.PidsStat(current=3, limit=64)
    (page,) = in_v1(STATS).hugetlb
    assert page == v1.HugetlbStat(usage=80, max=81, failcnt=82, pagesize="2MB")


@pytest.mark.parametrize("part", ["cpu", "memory", "pids", "blkio"])
def test_v1_parts_that_ctr_reads_are_always_there(part: str) -> None:
    assert in_v1(EMPTY).HasField(part)


@pytest.mark.parametrize("part", ["usage", "swap", "kernel", "kernel_tcp"])
def test_v1_memory_entries_that_ctr_reads_are_always_there(part: str) -> None:
    assert in_v1(EMPTY).memory.HasField(part)


@pytest.mark.parametrize("part", ["cpu", "memory", "pids", "io"])
def test_v2_parts_that_ctr_reads_are_always_there(part: str) -> None:
    assert in_v2(EMPTY).HasField(part)


@pytest.mark.parametrize("is_v2", [False, True])
def test_the_largest_numbers_a_guest_can_send_fit(*, is_v2: bool) -> None:
    names = [field.name for field in v2.MemoryStat.DESCRIPTOR.fields]
    entry = MemoryEntry(usage=LARGEST, max_usage=LARGEST, failcnt=LARGEST, limit=LARGEST)
    stats = ContainerStats(
        cpu=CpuStats(total_ns=LARGEST, per_cpu_ns=(LARGEST,), periods=LARGEST),
        memory=MemoryStats(
            usage=entry, swap=entry, kernel=entry, raw=dict.fromkeys(names, LARGEST)
        ),
        pids_current=LARGEST,
        pids_limit=LARGEST,
        block_io=(BlockIoEntry(major=LARGEST, minor=LARGEST, op="read", value=LARGEST),),
        hugetlb=(HugetlbStats(page_size="", usage=LARGEST, max_usage=LARGEST, failcnt=LARGEST),),
    )
    assert metrics(stats, is_v2=is_v2).value


def test_a_unified_hierarchy_is_recognised(tmp_path: Path) -> None:
    assert not is_cgroup_v2_host(tmp_path)
    (tmp_path / "cgroup.controllers").touch()
    assert is_cgroup_v2_host(tmp_path)
