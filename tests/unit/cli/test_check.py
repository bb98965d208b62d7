import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from kata_hybrid.cli.check import EXIT_MISSING, EXIT_OK, show
from kata_hybrid.cli.output import Output
from kata_hybrid.config.model import BuiltinConfig, Config, HypervisorName, QemuConfig
from kata_hybrid.hypervisor.probe import HostReport, KvmFinding, VirtiofsdFinding, VirtiofsdKind

REPORT = HostReport(
    kvm=KvmFinding(is_usable=False, reason="guest stopped at cmpxchg16b"),
    qemu=Path("/usr/bin/qemu"),
    virtiofsd=VirtiofsdFinding(path=Path("/v"), kind=VirtiofsdKind.C),
    has_kernel_vsock=False,
    is_from_cache=False,
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name in ("vmlinux", "initrd.img"):
        (tmp_path / name).touch()
    kernel, initrd = tmp_path / "vmlinux", tmp_path / "initrd.img"
    return Config(
        builtin=BuiltinConfig(kernel=kernel, initrd=initrd),
        qemu=QemuConfig(kernel=kernel, initrd=initrd),
    )


def check(config: Config, report: HostReport, *, is_json: bool = False) -> tuple[int, str]:
    stdout = io.StringIO()
    output = Output(is_json=is_json, stdout=stdout, stderr=io.StringIO())
    status = show(config, report, output=output, environment={"PATH": "/nowhere"})
    return status, stdout.getvalue()


def test_a_complete_host_is_ready_and_the_choice_explained(config: Config) -> None:
    status, text = check(config, REPORT)
    assert status == EXIT_OK
    assert "qemu (tcg) would be used" in text
    assert "cmpxchg16b" in text


def test_what_is_missing_is_named_with_how_to_get_it(config: Config) -> None:
    status, text = check(config, replace(REPORT, qemu=None))
    assert status == EXIT_MISSING
    assert "missing  qemu" in text
    assert "apt-get install qemu-system-x86" in text
    assert "No sandbox can start here: see what is missing" in text


def test_a_guest_that_is_not_built_is_missing() -> None:
    absent = Config(qemu=QemuConfig(kernel=Path("/no/k"), initrd=Path("/no/i")))
    status, text = check(absent, REPORT)
    assert status == EXIT_MISSING
    assert "-> kata-hybrid guest build" in text


def test_json_holds_the_same(config: Config) -> None:
    status, text = check(config, replace(REPORT, virtiofsd=None), is_json=True)
    document = json.loads(text)
    assert status == EXIT_MISSING
    assert document["ready"] is False
    assert document["hypervisor"] is None
    states = {finding["name"]: finding["state"] for finding in document["findings"]}
    assert states["virtiofsd"] == "missing"
    assert states["kvm"] == "note"


def test_json_of_a_ready_host(config: Config) -> None:
    status, text = check(config, REPORT, is_json=True)
    assert status == EXIT_OK
    assert json.loads(text)["hypervisor"] == "qemu (tcg)"


def test_a_configured_kvm_that_does_not_work_is_not_ready(config: Config) -> None:
    forced = replace(config, qemu=replace(config.qemu, machine_accelerators="accel=kvm"))
    status, text = check(forced, REPORT)
    assert status == EXIT_MISSING
    assert "accel=kvm is configured" in text


def test_a_shim_that_containerd_will_not_find_is_a_note(config: Config) -> None:
    assert "containerd-shim-kata-hybrid-v2 is not on PATH" in check(config, REPORT)[1]


def test_what_a_file_asks_for_in_vain_is_a_note(config: Config) -> None:
    status, text = check(replace(config, notices=("runtime.keep_abnormal = True",)), REPORT)
    assert status == EXIT_OK
    assert "runtime.keep_abnormal = True: not implemented, ignored" in text


GOOD = replace(REPORT, kvm=KvmFinding(is_usable=True, reason="a test guest ran"))


def test_where_kvm_works_nothing_else_is_needed(config: Config) -> None:
    status, text = check(config, replace(GOOD, qemu=None, virtiofsd=None))
    assert status == EXIT_OK
    assert "builtin (kvm) would be used: KVM is usable" in text
    assert "note     qemu" in text
    assert "only qemu needs it" in text


def test_where_kvm_does_not_work_the_builtin_monitors_need_is_a_note(config: Config) -> None:
    status, text = check(config, REPORT)
    assert status == EXIT_OK
    assert "note     kvm" in text
    assert "only builtin needs it" in text


def test_a_configured_builtin_monitor_misses_kvm(config: Config) -> None:
    forced = replace(
        config, runtime=replace(config.runtime, hypervisor_name=HypervisorName.BUILTIN)
    )
    status, text = check(forced, REPORT, is_json=True)
    document = json.loads(text)
    states = [(finding["name"], finding["state"]) for finding in document["findings"]]
    assert status == EXIT_MISSING
    assert ("kvm", "missing") in states
    assert [name for name, _ in states].count("kvm") == 1
