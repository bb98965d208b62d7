"""The lab itself: what the other tests here build on."""

import fcntl
import os
import platform
import socket
import stat
from pathlib import Path

from kata_hybrid._native import vmm

ROOT = Path(__file__).resolve().parents[2]
_KVM_GET_API_VERSION = 0xAE00
_TUNSETIFF = 0x400454CA
_IFF_TAP_NO_PI = (0x1002).to_bytes(2, "little")


def test_kvm_is_amds_with_nested_paging() -> None:
    modules = Path("/proc/modules").read_text()
    assert any(line.startswith("kvm_amd ") for line in modules.splitlines())
    assert Path("/sys/module/kvm_amd/parameters/npt").read_text().strip() in {"Y", "1"}


def test_kvm_answers() -> None:
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        assert fcntl.ioctl(kvm, _KVM_GET_API_VERSION) == 12
    finally:
        os.close(kvm)


def test_our_probe_finds_kvm_usable() -> None:
    found = vmm.probe_kvm()
    assert found.is_usable, found.reason
    assert "kvm_amd" in found.reason


def test_kernel_is_debians() -> None:
    assert platform.release().endswith("-amd64")


def test_vhost_devices_open() -> None:
    for name in ("/dev/vhost-vsock", "/dev/vhost-net"):
        assert stat.S_ISCHR(Path(name).stat().st_mode)
        os.close(os.open(name, os.O_RDWR | os.O_CLOEXEC))


def test_tap_devices_can_be_made() -> None:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        made = fcntl.ioctl(
            tun, _TUNSETIFF, b"labtest%d".ljust(16, b"\0") + _IFF_TAP_NO_PI + bytes(22)
        )
        name = made[:16].rstrip(b"\0").decode()
        assert name in {entry[1] for entry in socket.if_nameindex()}
    finally:
        os.close(tun)


def test_loopback_is_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_cgroup_controllers_are_delegated() -> None:
    delegated = Path("/sys/fs/cgroup/cgroup.subtree_control").read_text().split()
    assert {"cpu", "io", "memory", "pids"} <= set(delegated)


def test_temporary_files_are_not_on_an_overlay() -> None:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    assert [fields[2] for fields in mounts if fields[1] == "/tmp"][-1:] == ["tmpfs"]


def test_checkout_is_writable_and_build_is_shared() -> None:
    (ROOT / "written-in-the-lab").write_text("gone afterwards")
    types = {
        fields[1]: fields[2]
        for fields in map(str.split, Path("/proc/self/mounts").read_text().splitlines())
    }
    assert types[os.fspath(ROOT)] == "overlay"
    assert types[os.fspath(ROOT / "build")] == "virtiofs"
