"""What this host can do for a machine, found out once per boot and kept in the run root.

Looking for files is cheap and always done. What needs a guest or a child process to find out (does
KVM run a real kernel, whose virtiofsd is it) is asked when it matters and remembered in
``host.json``, keyed by the boot and by the files it was found with. A damaged or foreign cache is
ignored.
"""

import asyncio
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from kata_hybrid.aio.blocking import call_in_thread
from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.config.model import QemuConfig
from kata_hybrid.errors import VmmError
from kata_hybrid.hypervisor.vsock import VHOST_VSOCK_DEVICE
from kata_hybrid.persist import atomic

CACHE_NAME = "host.json"
KVM_DEVICE = Path("/dev/kvm")
QEMU_NAME = "qemu-system-x86_64"
QEMU_PATHS = (Path("/usr/bin/qemu-system-x86_64"), Path("/usr/libexec/qemu-kvm"))
VIRTIOFSD_PATHS = (
    Path("/usr/libexec/virtiofsd"),
    Path("/usr/lib/virtiofsd"),
    Path("/usr/lib/qemu/virtiofsd"),
)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_VERSION_TIMEOUT_S = 10.0
_KVM_TIMEOUT_S = 10.0
_CACHE_SCHEMA = 2
_MAX_CACHE_BYTES = 64 << 10


class VirtiofsdKind(Enum):
    """Whose virtiofsd it is; their options differ."""

    C = "c"
    RUST = "rust"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvmFinding:
    """Whether KVM runs a real kernel here, and how that is known."""

    is_usable: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtiofsdFinding:
    """A virtiofsd and whose it is."""

    path: Path
    kind: VirtiofsdKind


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """Everything a choice of hypervisor depends on. None means: not found, or not asked for."""

    kvm: KvmFinding
    qemu: Path | None
    virtiofsd: VirtiofsdFinding | None
    has_kernel_vsock: bool
    is_from_cache: bool


KvmProbe = Callable[[], KvmFinding]
"""Blocking, milliseconds; called in a thread."""


def probe_kvm_natively() -> KvmFinding:
    """Run a tiny guest under KVM. Never raises."""
    from kata_hybrid._native import vmm  # noqa: PLC0415 - not needed when the cache answers

    found = vmm.probe_kvm()
    return KvmFinding(is_usable=found.is_usable, reason=found.reason)


def _always(_kvm: KvmFinding) -> bool:
    return True


async def probe_host(
    config: QemuConfig,
    *,
    reaper: ProcessReaper,
    run_root: Path | None,
    probe_kvm: KvmProbe = probe_kvm_natively,
    needs_virtiofsd: Callable[[KvmFinding], bool] = _always,
) -> HostReport:
    """Find out what this host can do. ``run_root`` holds the cache; None asks everything anew.

    Where ``needs_virtiofsd`` says no, nobody looks for one.

    Raises:
        VmmError: a virtiofsd is there but does not say its version, or KVM does not answer.
    """
    cache = _Findings() if run_root is None else _read_cache(run_root / CACHE_NAME)
    kvm = cache.kvm or await _ask_kvm(probe_kvm)
    path = find_virtiofsd(config) if needs_virtiofsd(kvm) else None
    virtiofsd = None if path is None else cache.virtiofsd_at(path)
    if path is not None and virtiofsd is None:
        kind = await _virtiofsd_kind(path, reaper=reaper)
        virtiofsd = VirtiofsdFinding(path=path, kind=kind)
    found = _Findings(kvm=kvm, virtiofsd=virtiofsd or cache.virtiofsd)
    if run_root is not None and found != cache:
        _write_cache(run_root / CACHE_NAME, found)
    return HostReport(
        kvm=kvm,
        qemu=find_qemu(config),
        virtiofsd=virtiofsd,
        has_kernel_vsock=_is_usable_device(VHOST_VSOCK_DEVICE),
        is_from_cache=cache.kvm is not None,
    )


async def _ask_kvm(probe_kvm: KvmProbe) -> KvmFinding:
    try:
        return await call_in_thread(probe_kvm, name="probe", timeout_s=_KVM_TIMEOUT_S)
    except TimeoutError as error:
        operation = "run a test guest under KVM"
        raise VmmError(operation, f"not over after {_KVM_TIMEOUT_S:g} s") from error


def find_qemu(config: QemuConfig) -> Path | None:
    """Return the configured QEMU, or the first found; None if it is not there."""
    on_path = shutil.which(QEMU_NAME)
    places = (Path(on_path),) if on_path else ()
    return _first_program(config.path, *((*places, *QEMU_PATHS) if config.path is None else ()))


def find_virtiofsd(config: QemuConfig) -> Path | None:
    """Return the configured virtiofsd, or the first found; None if it is not there."""
    configured = config.virtio_fs_daemon
    on_path = shutil.which("virtiofsd")
    places = (*VIRTIOFSD_PATHS, *((Path(on_path),) if on_path else ()))
    return _first_program(configured, *(places if configured is None else ()))


def _first_program(*candidates: Path | None) -> Path | None:
    for path in candidates:
        if path is not None and path.is_file() and os.access(path, os.X_OK):
            return path
    return None


def _is_usable_device(path: Path) -> bool:
    try:
        is_device = stat.S_ISCHR(path.stat().st_mode)
    except OSError:
        return False
    return is_device and os.access(path, os.R_OK | os.W_OK)


async def _virtiofsd_kind(path: Path, *, reaper: ProcessReaper) -> VirtiofsdKind:
    with tempfile.TemporaryFile() as output:
        try:
            child = await reaper.spawn((path, "--version"), stdout=output.fileno())
            try:
                async with asyncio.timeout(_VERSION_TIMEOUT_S):
                    await child.exited()
            finally:
                child.kill()
        except (OSError, TimeoutError) as error:
            operation = f"ask {path} for its version"
            raise VmmError(operation, str(error) or "no answer in time") from error
        output.seek(0)
        version = output.read(4096).decode("utf-8", "replace")
    return virtiofsd_kind(version, path=path)


def virtiofsd_kind(version: str, *, path: Path) -> VirtiofsdKind:
    """Tell whose virtiofsd says ``version``.

    Raises:
        VmmError: neither is known to say so.
    """
    if "QEMU Project" in version or "FUSE kernel interface" in version:
        return VirtiofsdKind.C
    if version.startswith("virtiofsd "):
        return VirtiofsdKind.RUST
    msg = f"ask {path} for its version"
    raise VmmError(msg, f"it is no virtiofsd: {version[:200]!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Findings:
    """What the cache holds. None: not asked yet."""

    kvm: KvmFinding | None = None
    virtiofsd: VirtiofsdFinding | None = None

    def virtiofsd_at(self, path: Path) -> VirtiofsdFinding | None:
        """Return the finding if it is of this program."""
        found = self.virtiofsd
        return found if found is not None and found.path == path else None


def _cache_key() -> dict[str, object]:
    return {
        "schema": _CACHE_SCHEMA,
        "boot_id": _BOOT_ID.read_text().strip(),
        "kvm": _fingerprint(KVM_DEVICE),
    }


def _fingerprint(path: Path) -> list[object] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    is_device = stat.S_ISCHR(status.st_mode)
    # A device node's times change with every use.
    changing = 0 if is_device else status.st_mtime_ns
    return [str(path), status.st_ino, status.st_size, changing, os.access(path, os.R_OK)]


def _read_cache(path: Path) -> _Findings:
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(_MAX_CACHE_BYTES))
        if document["key"] != _cache_key():
            return _Findings()
        kvm = KvmFinding(
            is_usable=document["kvm"]["is_usable"] is True, reason=str(document["kvm"]["reason"])
        )
        return _Findings(kvm=kvm, virtiofsd=_cached_virtiofsd(document["virtiofsd"]))
    except (OSError, ValueError, KeyError, TypeError):
        return _Findings()


def _cached_virtiofsd(entry: dict[str, object] | None) -> VirtiofsdFinding | None:
    if entry is None:
        return None
    path = Path(str(entry["path"]))
    if entry["fingerprint"] != _fingerprint(path):
        return None
    return VirtiofsdFinding(path=path, kind=VirtiofsdKind(entry["kind"]))


def _write_cache(path: Path, found: _Findings) -> None:
    virtiofsd = found.virtiofsd
    document = {
        "key": _cache_key(),
        "kvm": None if found.kvm is None else asdict(found.kvm),
        "virtiofsd": None
        if virtiofsd is None
        else {
            "path": str(virtiofsd.path),
            "fingerprint": _fingerprint(virtiofsd.path),
            "kind": virtiofsd.kind.value,
        },
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        atomic.replace(path, json.dumps(document).encode())
    except OSError:
        # Only costs the next start a few milliseconds; a full disk is reported where it matters.
        return
