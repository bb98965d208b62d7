import asyncio
import json
from pathlib import Path

import pytest

from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.config.model import QemuConfig
from kata_hybrid.errors import VmmError
from kata_hybrid.hypervisor.probe import (
    CACHE_NAME,
    HostReport,
    KvmFinding,
    VirtiofsdKind,
    find_qemu,
    find_virtiofsd,
    probe_host,
    virtiofsd_kind,
)

C_VERSION = "virtiofsd version 7.2.22 (Debian)\nCopyright (c) the QEMU Project developers\n"
RUST_VERSION = "virtiofsd 1.13.0\n"


class CountingProbe:
    def __init__(self, *, is_usable: bool = False) -> None:
        self.calls = 0
        self.finding = KvmFinding(is_usable=is_usable, reason="as the test says")

    def __call__(self) -> KvmFinding:
        self.calls += 1
        return self.finding


def make_daemon(path: Path, version: str) -> QemuConfig:
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{version}END\n")
    path.chmod(0o755)
    return QemuConfig(virtio_fs_daemon=path)


def probe(
    config: QemuConfig, kvm: CountingProbe, root: Path | None, *, needs_virtiofsd: bool = True
) -> HostReport:
    async def run() -> HostReport:
        reaper = ProcessReaper()
        try:
            return await probe_host(
                config,
                reaper=reaper,
                run_root=root,
                probe_kvm=kvm,
                needs_virtiofsd=lambda _kvm: needs_virtiofsd,
            )
        finally:
            reaper.close()

    return asyncio.run(run())


def test_a_second_probe_of_the_same_boot_runs_nothing(tmp_path: Path) -> None:
    kvm = CountingProbe(is_usable=True)
    config = make_daemon(tmp_path / "virtiofsd", C_VERSION)
    first = probe(config, kvm, tmp_path / "run")
    second = probe(config, kvm, tmp_path / "run")
    assert kvm.calls == 1
    assert (first.is_from_cache, second.is_from_cache) == (False, True)
    assert second.kvm == kvm.finding
    assert second.virtiofsd == first.virtiofsd
    assert second.virtiofsd is not None
    assert second.virtiofsd.kind is VirtiofsdKind.C


def test_another_daemon_is_asked_and_kvm_is_not(tmp_path: Path) -> None:
    kvm = CountingProbe()
    probe(make_daemon(tmp_path / "virtiofsd", C_VERSION), kvm, tmp_path)
    report = probe(make_daemon(tmp_path / "other", RUST_VERSION), kvm, tmp_path)
    assert kvm.calls == 1
    assert report.virtiofsd is not None
    assert report.virtiofsd.kind is VirtiofsdKind.RUST


def test_a_daemon_that_was_replaced_is_asked_again(tmp_path: Path) -> None:
    kvm = CountingProbe()
    probe(make_daemon(tmp_path / "virtiofsd", C_VERSION), kvm, tmp_path)
    report = probe(make_daemon(tmp_path / "virtiofsd", RUST_VERSION), kvm, tmp_path)
    assert report.virtiofsd is not None
    assert report.virtiofsd.kind is VirtiofsdKind.RUST


def test_a_daemon_nobody_needs_is_not_asked_and_not_forgotten(tmp_path: Path) -> None:
    kvm = CountingProbe()
    config = make_daemon(tmp_path / "virtiofsd", "no virtiofsd at all\n")
    assert probe(config, kvm, tmp_path, needs_virtiofsd=False).virtiofsd is None
    config = make_daemon(tmp_path / "virtiofsd", C_VERSION)
    probe(config, kvm, tmp_path)
    probe(config, kvm, tmp_path, needs_virtiofsd=False)
    assert probe(config, kvm, tmp_path).virtiofsd is not None
    document = json.loads((tmp_path / CACHE_NAME).read_text())
    assert document["virtiofsd"]["kind"] == "c"
    assert kvm.calls == 1


def test_another_boot_makes_the_cache_void(tmp_path: Path) -> None:
    kvm = CountingProbe()
    config = make_daemon(tmp_path / "virtiofsd", C_VERSION)
    probe(config, kvm, tmp_path)
    document = json.loads((tmp_path / CACHE_NAME).read_text())
    document["key"]["boot_id"] = "an earlier boot"
    (tmp_path / CACHE_NAME).write_text(json.dumps(document))
    probe(config, kvm, tmp_path)
    assert kvm.calls == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff", b'{"key": 1}', b"{" * 9])
def test_a_damaged_cache_is_ignored(tmp_path: Path, content: bytes) -> None:
    kvm = CountingProbe()
    (tmp_path / CACHE_NAME).write_bytes(content)
    probe(QemuConfig(virtio_fs_daemon=tmp_path / "none"), kvm, tmp_path)
    assert kvm.calls == 1


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    kvm = CountingProbe()
    assert not probe(QemuConfig(virtio_fs_daemon=tmp_path / "none"), kvm, blocked).is_from_cache


def test_without_a_run_root_everything_is_asked_anew(tmp_path: Path) -> None:
    kvm = CountingProbe()
    config = make_daemon(tmp_path / "virtiofsd", C_VERSION)
    probe(config, kvm, None)
    probe(config, kvm, None)
    assert kvm.calls == 2


def test_a_configured_program_that_is_absent_is_not_replaced(tmp_path: Path) -> None:
    config = QemuConfig(path=tmp_path / "qemu", virtio_fs_daemon=tmp_path / "virtiofsd")
    assert find_qemu(config) is None
    assert find_virtiofsd(config) is None


def test_a_file_that_cannot_be_executed_is_no_program(tmp_path: Path) -> None:
    (tmp_path / "qemu").write_text("")
    (tmp_path / "qemu").chmod(0o644)
    assert find_qemu(QemuConfig(path=tmp_path / "qemu")) is None


@pytest.mark.parametrize(
    ("version", "kind"),
    [
        (C_VERSION, VirtiofsdKind.C),
        (RUST_VERSION, VirtiofsdKind.RUST),
        ("virtiofsd backend 1.5.1\n", VirtiofsdKind.RUST),
    ],
)
def test_the_two_daemons_are_told_apart(version: str, kind: VirtiofsdKind) -> None:
    assert virtiofsd_kind(version, path=Path("/v")) is kind


def test_a_program_that_is_no_virtiofsd_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VmmError, match="no virtiofsd"):
        probe(make_daemon(tmp_path / "virtiofsd", "GNU bash\n"), CountingProbe(), None)
