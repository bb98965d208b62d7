from dataclasses import replace
from pathlib import Path

import pytest

from kata_hybrid.config.model import BuiltinConfig, Config, HypervisorName, QemuConfig
from kata_hybrid.errors import FailedPreconditionError, InvalidConfigError, KvmAccessError
from kata_hybrid.hypervisor.builtin_settings import BuiltinSettings
from kata_hybrid.hypervisor.probe import (
    HostReport,
    KvmFinding,
    VirtiofsdFinding,
    VirtiofsdKind,
)
from kata_hybrid.hypervisor.qemu_command import Accelerator
from kata_hybrid.hypervisor.selection import (
    BuiltinChoice,
    QemuChoice,
    choose_accelerator,
    missing_parts,
    needs_virtiofsd,
    select_hypervisor,
)

GOOD_KVM = KvmFinding(is_usable=True, reason="a test guest ran")
BROKEN_KVM = KvmFinding(is_usable=False, reason="emulation of cmpxchg16b failed")
REPORT = HostReport(
    kvm=GOOD_KVM,
    qemu=Path("/usr/bin/qemu"),
    virtiofsd=VirtiofsdFinding(path=Path("/v"), kind=VirtiofsdKind.C),
    has_kernel_vsock=False,
    is_from_cache=False,
)
WITHOUT_KVM = replace(REPORT, kvm=BROKEN_KVM)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name in ("vmlinux", "initrd.img"):
        (tmp_path / name).touch()
    kernel, initrd = tmp_path / "vmlinux", tmp_path / "initrd.img"
    return Config(
        builtin=BuiltinConfig(kernel=kernel, initrd=initrd),
        qemu=QemuConfig(kernel=kernel, initrd=initrd),
    )


def with_accelerators(config: Config, text: str) -> Config:
    return replace(config, qemu=replace(config.qemu, machine_accelerators=text))


def with_monitor(config: Config, name: HypervisorName) -> Config:
    return replace(config, runtime=replace(config.runtime, hypervisor_name=name))


def test_the_builtin_monitor_is_used_where_kvm_works(config: Config) -> None:
    selection = select_hypervisor(config, REPORT)
    assert selection.name == "builtin (kvm)"
    assert selection.choice == BuiltinChoice(settings=BuiltinSettings())
    assert "a test guest ran" in selection.reason


def test_the_builtin_monitor_needs_neither_qemu_nor_virtiofsd(config: Config) -> None:
    bare = replace(REPORT, qemu=None, virtiofsd=None)
    assert select_hypervisor(config, bare).name == "builtin (kvm)"
    assert not needs_virtiofsd(config, GOOD_KVM)
    assert needs_virtiofsd(config, BROKEN_KVM)


def test_without_a_working_kvm_tcg_is_used_and_the_reason_is_said_once(config: Config) -> None:
    selection = select_hypervisor(config, WITHOUT_KVM)
    assert isinstance(selection.choice, QemuChoice)
    assert selection.choice.settings.accelerator is Accelerator.TCG
    assert selection.name == "qemu (tcg)"
    assert selection.reason.count("cmpxchg16b") == 1


def test_a_configured_qemu_is_used_where_kvm_works_and_with_kvm(config: Config) -> None:
    chosen = with_monitor(config, HypervisorName.QEMU)
    assert select_hypervisor(chosen, REPORT).name == "qemu (kvm)"
    assert needs_virtiofsd(chosen, GOOD_KVM)


def test_a_configured_builtin_monitor_without_kvm_is_an_error(config: Config) -> None:
    chosen = with_monitor(config, HypervisorName.BUILTIN)
    with pytest.raises(KvmAccessError, match=r"builtin is configured.*cmpxchg16b"):
        select_hypervisor(chosen, WITHOUT_KVM)


def test_tcg_can_be_configured_where_kvm_works(config: Config) -> None:
    chosen = with_accelerators(config, "usb=on,accel=tcg")
    assert choose_accelerator(chosen.qemu, REPORT)[0] is Accelerator.TCG


def test_a_configured_kvm_that_does_not_work_is_an_error(config: Config) -> None:
    with pytest.raises(KvmAccessError, match="cmpxchg16b"):
        select_hypervisor(with_accelerators(config, "accel=kvm"), WITHOUT_KVM)


def test_an_unknown_accelerator_is_an_error(config: Config) -> None:
    with pytest.raises(InvalidConfigError, match="accel=hvf"):
        select_hypervisor(with_accelerators(config, "accel=hvf"), WITHOUT_KVM)


def test_everything_missing_is_named_at_once_with_its_remedy() -> None:
    config = Config(qemu=QemuConfig(kernel=Path("/no/k"), initrd=Path("/no/i")))
    report = replace(WITHOUT_KVM, qemu=None, virtiofsd=None)
    with pytest.raises(FailedPreconditionError) as caught:
        select_hypervisor(config, report)
    for text in ("qemu-system-x86", "virtiofsd", "/no/k", "/no/i", "kata-hybrid guest build"):
        assert text in str(caught.value)


def test_each_monitor_boots_the_guest_of_its_own_table(config: Config) -> None:
    other = replace(config, builtin=BuiltinConfig(kernel=Path("/no/k")))
    with pytest.raises(FailedPreconditionError, match="/no/k"):
        select_hypervisor(other, REPORT)
    assert select_hypervisor(other, WITHOUT_KVM).name == "qemu (tcg)"


@pytest.mark.parametrize("name", HypervisorName)
def test_nothing_is_missing_on_a_complete_host(config: Config, name: HypervisorName) -> None:
    assert missing_parts(config, REPORT, name) == ()


def test_without_kvm_the_builtin_monitor_misses_it(config: Config) -> None:
    (missing,) = missing_parts(config, WITHOUT_KVM, HypervisorName.BUILTIN)
    assert missing.thing == "KVM (emulation of cmpxchg16b failed)"
    assert 'hypervisor_name = "qemu"' in missing.remedy
