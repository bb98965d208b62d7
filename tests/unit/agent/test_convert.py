import re
from typing import Any

import pytest

from kata_hybrid.agent import convert
from kata_hybrid.errors import InvalidSpecError
from kata_hybrid.protos import agent_pb2
from kata_hybrid.types import (
    BlockIoEntry,
    CpuStats,
    GuestDetails,
    GuestStorage,
    HugetlbStats,
    JsonObject,
    MemoryEntry,
)

SPEC: JsonObject = {
    "ociVersion": "1.0.2",
    "hostname": "box",
    "root": {"path": "rootfs", "readonly": True},
    "process": {
        "terminal": True,
        "consoleSize": {"height": 24, "width": 80},
        "user": {"uid": 1000, "gid": 100, "additionalGids": [5, 6]},
        "args": ["sh", "-c", "true"],
        "env": ["A=1"],
        "cwd": "/",
        "capabilities": {"bounding": ["CAP_KILL"]},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 2**64 - 1, "soft": 1024}],
        "noNewPrivileges": True,
        "oomScoreAdj": -500,
    },
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]}],
    "annotations": {"key": "value"},
    "linux": {
        "uidMappings": [{"hostID": 1, "containerID": 2, "size": 3}],
        "sysctl": {"net.ipv4.ip_forward": "1"},
        "cgroupsPath": "/c1",
        "namespaces": [{"type": "pid"}, {"type": "ipc", "path": "/x"}],
        "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "fileMode": 438}],
        "resources": {
            "memory": {"limit": -1, "disableOOMKiller": True},
            "cpu": {"shares": 1024, "quota": -1, "realtimePeriod": 7},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 9}],
        },
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [
                {
                    "names": ["read"],
                    "action": "SCMP_ACT_ALLOW",
                    "errnoRet": 0,
                    "args": [{"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_EQ"}],
                }
            ],
        },
        "maskedPaths": ["/proc/kcore"],
    },
}


def test_version_becomes_version() -> None:
    assert convert.spec_message(SPEC).Version == "1.0.2"


def test_process_is_converted() -> None:
    process = convert.spec_message(SPEC).Process
    assert process.Terminal
    assert (process.ConsoleSize.Height, process.ConsoleSize.Width) == (24, 80)
    assert (process.User.UID, process.User.GID) == (1000, 100)
    assert list(process.User.AdditionalGids) == [5, 6]
    assert list(process.Args) == ["sh", "-c", "true"]
    assert list(process.Env) == ["A=1"]
    assert list(process.Capabilities.Bounding) == ["CAP_KILL"]
    assert (process.Rlimits[0].Type, process.Rlimits[0].Hard) == ("RLIMIT_NOFILE", 2**64 - 1)
    assert process.NoNewPrivileges
    assert process.OOMScoreAdj == -500


def test_linux_is_converted() -> None:
    linux = convert.spec_message(SPEC).Linux
    assert (linux.UIDMappings[0].HostID, linux.UIDMappings[0].ContainerID) == (1, 2)
    assert dict(linux.Sysctl) == {"net.ipv4.ip_forward": "1"}
    assert [(entry.Type, entry.Path) for entry in linux.Namespaces] == [("pid", ""), ("ipc", "/x")]
    assert (linux.Devices[0].Major, linux.Devices[0].FileMode) == (1, 0o666)
    assert (linux.Resources.Memory.Limit, linux.Resources.Memory.DisableOOMKiller) == (-1, True)
    assert (linux.Resources.CPU.Quota, linux.Resources.CPU.RealtimePeriod) == (-1, 7)
    assert linux.Resources.HugepageLimits[0].Pagesize == "2MB"
    assert list(linux.MaskedPaths) == ["/proc/kcore"]


def test_errno_of_zero_is_told_from_no_errno() -> None:
    syscall = convert.spec_message(SPEC).Linux.Seccomp.Syscalls[0]
    assert syscall.HasField("errnoret")
    assert (syscall.errnoret, syscall.Args[0].ValueTwo) == (0, 2)


def test_rest_of_the_document_is_converted() -> None:
    message = convert.spec_message(SPEC)
    assert (message.Hostname, message.Root.Path, message.Root.Readonly) == ("box", "rootfs", True)
    assert (message.Mounts[0].destination, list(message.Mounts[0].options)) == ("/proc", ["nosuid"])
    assert dict(message.Annotations) == {"key": "value"}


def test_unknown_keys_are_left_out() -> None:
    assert convert.spec_message({"vm": {"kernel": 1}}) == convert.spec_message({})


def test_null_is_as_if_absent() -> None:
    assert not convert.spec_message({"linux": None}).HasField("Linux")


def test_an_empty_object_is_present() -> None:
    assert convert.spec_message({"linux": {}}).HasField("Linux")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"hostname": 1}, "hostname must be a string, is int"),
        ({"process": []}, "process must be an object, is list"),
        ({"process": {"args": "sh"}}, "process.args must be an array, is str"),
        ({"process": {"args": ["sh", 1]}}, "process.args[1] must be a string, is int"),
        ({"process": {"terminal": 1}}, "process.terminal must be true or false, is int"),
        ({"process": {"user": {"uid": True}}}, "process.user.uid must be an integer, is bool"),
        ({"process": {"user": {"uid": 1.0}}}, "process.user.uid must be an integer, is float"),
        (
            {"process": {"user": {"uid": -1}}},
            "process.user.uid must be from 0 to 4294967295, is -1",
        ),
        ({"mounts": [{}, 1]}, "mounts[1] must be an object, is int"),
        ({"mounts": [None]}, "mounts[0] must be an object, is NoneType"),
        ({"annotations": {"a b": 1}}, "annotations['a b'] must be a string, is int"),
        ({"annotations": ["a"]}, "annotations must be an object, is list"),
        ({"hostname": "\ud800"}, "hostname is not valid Unicode"),
        ({"annotations": {"\ud800": "a"}}, "annotations['\\ud800'] is not valid Unicode"),
        (
            {"linux": {"resources": {"memory": {"limit": 2**63}}}},
            f"linux.resources.memory.limit must be from {-(2**63)} to {2**63 - 1}, is {2**63}",
        ),
    ],
)
def test_a_wrong_field_is_named_by_its_path(spec: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidSpecError, match=re.escape(text)):
        convert.spec_message(spec)


def test_paths_of_a_lone_process_begin_with_process() -> None:
    with pytest.raises(InvalidSpecError, match=r"^process\.cwd must be a string"):
        convert.process_message({"cwd": 1})


def test_paths_of_lone_resources_begin_with_resources() -> None:
    with pytest.raises(InvalidSpecError, match=r"^resources\.memory must be an object"):
        convert.resources_message({"memory": 1})


def test_resources_are_converted() -> None:
    message = convert.resources_message({"pids": {"limit": 10}, "cpu": {"cpus": "0-1"}})
    assert (message.Pids.Limit, message.CPU.Cpus) == (10, "0-1")


def test_storage_keeps_every_field() -> None:
    storage = GuestStorage(
        driver="blk",
        source="02",
        fstype="ext4",
        mount_point="/mnt",
        driver_options=("d",),
        options=("ro", "noatime"),
    )
    (message,) = convert.storage_messages([storage])
    assert message == agent_pb2.Storage(
        driver="blk",
        driver_options=["d"],
        source="02",
        fstype="ext4",
        options=["ro", "noatime"],
        mount_point="/mnt",
    )


def test_guest_details_are_read() -> None:
    reply = agent_pb2.GuestDetailsResponse(
        mem_block_size_bytes=1 << 27,
        agent_details=agent_pb2.AgentDetails(
            version="3.20.0",
            storage_handlers=["blk", "9p"],
            supports_seccomp=True,
            extra_features=["wait-keeps-output"],
        ),
    )
    assert convert.guest_details(reply) == GuestDetails(
        agent_version="3.20.0",
        storage_handlers=("blk", "9p"),
        extra_features=frozenset({"wait-keeps-output"}),
        supports_seccomp=True,
        memory_block_bytes=1 << 27,
    )


def test_empty_statistics_are_zeros() -> None:
    stats = convert.container_stats(agent_pb2.StatsContainerResponse())
    assert stats.cpu == CpuStats()
    assert stats.memory.usage == MemoryEntry()
    assert (stats.block_io, stats.hugetlb, stats.pids_current) == ((), (), 0)


def test_statistics_are_read() -> None:
    cgroup = agent_pb2.CgroupStats(
        cpu_stats=agent_pb2.CpuStats(
            cpu_usage=agent_pb2.CpuUsage(
                total_usage=9, percpu_usage=[4, 5], usage_in_kernelmode=2, usage_in_usermode=7
            ),
            throttling_data=agent_pb2.ThrottlingData(
                periods=1, throttled_periods=2, throttled_time=3
            ),
        ),
        memory_stats=agent_pb2.MemoryStats(
            usage=agent_pb2.MemoryData(usage=10, max_usage=11, failcnt=12, limit=13),
            swap_usage=agent_pb2.MemoryData(usage=20),
            kernel_usage=agent_pb2.MemoryData(usage=30),
            stats={"anon": 5},
        ),
        pids_stats=agent_pb2.PidsStats(current=3, limit=64),
        blkio_stats=agent_pb2.BlkioStats(
            io_service_bytes_recursive=[
                agent_pb2.BlkioStatsEntry(major=8, minor=1, op="Read", value=77)
            ],
            io_serviced_recursive=[agent_pb2.BlkioStatsEntry(major=8, op="Read", value=1)],
        ),
        hugetlb_stats={"2MB": agent_pb2.HugetlbStats(usage=1, max_usage=2, failcnt=3)},
    )
    stats = convert.container_stats(agent_pb2.StatsContainerResponse(cgroup_stats=cgroup))
    assert stats.cpu == CpuStats(
        total_ns=9,
        user_ns=7,
        kernel_ns=2,
        per_cpu_ns=(4, 5),
        periods=1,
        throttled_periods=2,
        throttled_ns=3,
    )
    assert stats.memory.usage == MemoryEntry(usage=10, max_usage=11, failcnt=12, limit=13)
    assert (stats.memory.swap.usage, stats.memory.kernel.usage) == (20, 30)
    assert stats.memory.raw == {"anon": 5}
    assert (stats.pids_current, stats.pids_limit) == (3, 64)
    assert stats.block_io == (BlockIoEntry(major=8, minor=1, op="Read", value=77),)
    assert stats.hugetlb == (HugetlbStats(page_size="2MB", usage=1, max_usage=2, failcnt=3),)
