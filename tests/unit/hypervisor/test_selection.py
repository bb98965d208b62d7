from dataclasses import replace
from pathlib import Path

import pytest

from kata_hybrid.config.model import Config, QemuConfig
from kata_hybrid.errors import FailedPreconditionError, InvalidConfigError, KvmAccessError
from kata_hybrid.hypervisor.probe import (
    HostReport,
    KvmFinding,
    VirtiofsdFinding,
    VirtiofsdKind,
)
from kata_hybrid.hypervisor.qemu_command import Accelerator
from kata_hybrid.hypervisor.selection import choose_accelerator, missing_parts, select_hypervisor

BROKEN_KVM = KvmFinding(is_usable=False, reason="emulation of cmpxchg16b failed")
REPORT = HostReport(
    kvm=KvmFinding(is_usable=True, reason="a test guest ran"),
    qemu=Path("/usr/bin/qemu"),
    virtiofsd=VirtiofsdFinding(path=Path("/v"), kind=VirtiofsdKind.C),
    has_kernel_vsock=False,
    is_from_cache=False,
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name in ("vmlinux", "initrd.img"):
        (tmp_path / name).touch()
    return Config(qemu=QemuConfig(kernel=tmp_path / "vmlinux", initrd=tmp_path / "initrd.img"))


def with_accelerators(config: Config, text: str) -> Config:
    return replace(config, qemu=replace(config.qemu, machine_accelerators=text))


def test_kvm_is_used_where_it_works(config: Config) -> None:
    assert select_hypervisor(config, REPORT).name == "qemu (kvm)"


def test_without_a_working_kvm_tcg_is_used_and_the_reason_is_said(config: Config) -> None:
    selection = select_hypervisor(config, replace(REPORT, kvm=BROKEN_KVM))
    assert selection.accelerator is Accelerator.TCG
    assert "cmpxchg16b" in selection.reason


def test_tcg_can_be_configured_where_kvm_works(config: Config) -> None:
    chosen = with_accelerators(config, "usb=on,accel=tcg")
    assert choose_accelerator(chosen.qemu, REPORT)[0] is Accelerator.TCG


def test_a_configured_kvm_that_does_not_work_is_an_error(config: Config) -> None:
    with pytest.raises(KvmAccessError, match="cmpxchg16b"):
        select_hypervisor(with_accelerators(config, "accel=kvm"), replace(REPORT, kvm=BROKEN_KVM))


def test_an_unknown_accelerator_is_an_error(config: Config) -> None:
    with pytest.raises(InvalidConfigError, match="accel=hvf"):
        select_hypervisor(with_accelerators(config, "accel=hvf"), REPORT)


def test_everything_missing_is_named_at_once_with_its_remedy() -> None:
    config = Config(qemu=QemuConfig(kernel=Path("/no/k"), initrd=Path("/no/i")))
    report = replace(REPORT, qemu=None, virtiofsd=None)
    with pytest.raises(FailedPreconditionError) as caught:
        select_hypervisor(config, report)
    for text in ("qemu-system-x86", "virtiofsd", "/no/k", "/no/i", "kata-hybrid guest build"):
        assert text in str(caught.value)


def test_nothing_is_missing_on_a_complete_host(config: Config) -> None:
    assert missing_parts(config, REPORT) == ()
