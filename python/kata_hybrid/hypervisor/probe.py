"""What this host can do for a machine, found out once per boot and kept in the run root.

Looking for files is cheap and always done. What needs a guest or a child process to find out (does
KVM run a real kernel, whose virtiofsd is it) is remembered in ``host.json``, keyed by the boot and
by the files it was found with. A damaged or foreign cache is ignored.
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
_CACHE_SCHEMA = 1
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
    """Everything a choice of hypervisor depends on. None means: not found."""

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


async def probe_host(
    config: QemuConfig,
    *,
    reaper: ProcessReaper,
    run_root: Path | None,
    probe_kvm: KvmProbe = probe_kvm_natively,
) -> HostReport:
    """Find out what this host can do. ``run_root`` holds the cache; None asks everything anew.

    Raises:
        VmmError: a virtiofsd is there but does not say its version.
    """
    qemu = find_qemu(config)
    virtiofsd_path = find_virtiofsd(config)
    key = _cache_key(virtiofsd_path)
    cached = None if run_root is None else _read_cache(run_root / CACHE_NAME, key=key)
    if cached is None:
        kvm = await asyncio.to_thread(probe_kvm)
        kind = (
            None if virtiofsd_path is None else await _virtiofsd_kind(virtiofsd_path, reaper=reaper)
        )
        if run_root is not None:
            _write_cache(run_root / CACHE_NAME, key=key, kvm=kvm, kind=kind)
    else:
        kvm, kind = cached
    return HostReport(
        kvm=kvm,
        qemu=qemu,
        virtiofsd=(
            None
            if virtiofsd_path is None or kind is None
            else VirtiofsdFinding(path=virtiofsd_path, kind=kind)
        ),
        has_kernel_vsock=_is_usable_device(VHOST_VSOCK_DEVICE),
        is_from_cache=cached is not None,
    )


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


def _cache_key(virtiofsd: Path | None) -> dict[str, object]:
    return {
        "schema": _CACHE_SCHEMA,
        "boot_id": _BOOT_ID.read_text().strip(),
        "kvm": _fingerprint(KVM_DEVICE),
        "virtiofsd": None if virtiofsd is None else _fingerprint(virtiofsd),
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


def _read_cache(
    path: Path, *, key: dict[str, object]
) -> tuple[KvmFinding, VirtiofsdKind | None] | None:
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(_MAX_CACHE_BYTES))
        if document["key"] != key:
            return None
        kvm = KvmFinding(
            is_usable=document["kvm"]["is_usable"] is True, reason=str(document["kvm"]["reason"])
        )
        kind = document["virtiofsd_kind"]
        return kvm, None if kind is None else VirtiofsdKind(kind)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_cache(
    path: Path, *, key: dict[str, object], kvm: KvmFinding, kind: VirtiofsdKind | None
) -> None:
    document = {
        "key": key,
        "kvm": asdict(kvm),
        "virtiofsd_kind": None if kind is None else kind.value,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        atomic.replace(path, json.dumps(document).encode())
    except OSError:
        # Only costs the next start a few milliseconds; a full disk is reported where it matters.
        return
