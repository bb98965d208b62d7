"""Which hypervisor runs a sandbox, and why: from the configuration and what the host can do.

configured accel=kvm / accel=tcg ─▶ that one
KVM runs a real kernel ───────────▶ QEMU with KVM
else ─────────────────────────────▶ QEMU with TCG (emulation: slower, same guest)
"""

from dataclasses import dataclass
from pathlib import Path

from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.config.model import Config, QemuConfig
from kata_hybrid.errors import FailedPreconditionError, InvalidConfigError, KvmAccessError
from kata_hybrid.hypervisor.base import MachineConfig
from kata_hybrid.hypervisor.kernel_params import kernel_params
from kata_hybrid.hypervisor.probe import HostReport
from kata_hybrid.hypervisor.qemu import QemuHypervisor, QemuSettings
from kata_hybrid.hypervisor.qemu_command import Accelerator
from kata_hybrid.hypervisor.vsock import VsockBackendFactory

QEMU_REMEDY = "apt-get install qemu-system-x86 (or set path in [hypervisor.qemu])"
VIRTIOFSD_REMEDY = (
    "apt-get install qemu-system-common on Debian 12, virtiofsd on later ones "
    "(or set virtio_fs_daemon in [hypervisor.qemu])"
)
GUEST_REMEDY = "kata-hybrid guest build"


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Something a sandbox cannot do without."""

    thing: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The hypervisor that will be used."""

    name: str
    reason: str
    accelerator: Accelerator
    settings: QemuSettings


def missing_parts(config: Config, report: HostReport) -> tuple[Missing, ...]:
    """List what a sandbox would miss on this host; empty when it can start."""
    missing: list[Missing] = []
    if report.qemu is None:
        where = config.qemu.path or "qemu-system-x86_64"
        missing.append(Missing(thing=f"QEMU ({where})", remedy=QEMU_REMEDY))
    if report.virtiofsd is None:
        where = config.qemu.virtio_fs_daemon or "in the usual places"
        missing.append(Missing(thing=f"virtiofsd ({where})", remedy=VIRTIOFSD_REMEDY))
    for what, path in (("kernel", config.qemu.kernel), ("initrd", config.qemu.initrd)):
        if not path.is_file():
            missing.append(Missing(thing=f"guest {what} ({path})", remedy=GUEST_REMEDY))
    return tuple(missing)


def select_hypervisor(config: Config, report: HostReport) -> Selection:
    """Choose.

    Raises:
        FailedPreconditionError: something is missing; the text says what and how to get it.
        KvmAccessError: KVM is configured but cannot run a guest.
        InvalidConfigError: the configured accelerator is unknown.
    """
    missing = missing_parts(config, report)
    if missing or report.qemu is None:
        message = "; ".join(f"{part.thing} is missing: {part.remedy}" for part in missing)
        raise FailedPreconditionError(message)
    accelerator, reason = choose_accelerator(config.qemu, report)
    return Selection(
        name=f"qemu ({accelerator.value})",
        reason=reason,
        accelerator=accelerator,
        settings=QemuSettings(
            program=report.qemu,
            accelerator=accelerator,
            has_kernel_vsock=report.has_kernel_vsock,
            machine_type=config.qemu.machine_type,
            machine_options=config.qemu.machine_accelerators,
            cpu_features=config.qemu.cpu_features,
            entropy_source=config.qemu.entropy_source,
        ),
    )


def choose_accelerator(config: QemuConfig, report: HostReport) -> tuple[Accelerator, str]:
    """Choose how guest code is run, and say why.

    Raises:
        KvmAccessError: KVM is configured but cannot run a guest.
        InvalidConfigError: the configured accelerator is unknown.
    """
    configured = _configured_accelerator(config)
    if configured is Accelerator.KVM and not report.kvm.is_usable:
        message = f"accel=kvm is configured, but KVM is of no use here: {report.kvm.reason}"
        raise KvmAccessError(message)
    if configured is not None:
        return configured, "configured by machine_accelerators in [hypervisor.qemu]"
    if report.kvm.is_usable:
        return Accelerator.KVM, f"KVM is usable: {report.kvm.reason}"
    return Accelerator.TCG, f"KVM is of no use here: {report.kvm.reason}"


def _configured_accelerator(config: QemuConfig) -> Accelerator | None:
    for part in config.machine_accelerators.split(","):
        key, _, value = part.partition("=")
        if key.strip() != "accel":
            continue
        try:
            return Accelerator(value.strip())
        except ValueError as error:
            message = f"hypervisor.qemu.machine_accelerators: accel={value} is neither kvm nor tcg"
            raise InvalidConfigError(message) from error
    return None


def new_hypervisor(
    config: Config,
    selection: Selection,
    *,
    name: str,
    run_dir: Path,
    reaper: ProcessReaper,
    vsock_backend: VsockBackendFactory,
) -> QemuHypervisor:
    """Make the selected hypervisor for one sandbox; nothing is started."""
    machine = MachineConfig(
        name=name,
        kernel=config.qemu.kernel,
        initrd=config.qemu.initrd,
        kernel_params=kernel_params(config),
        vcpu_count=config.qemu.vcpu_count(),
        memory_mib=config.qemu.memory_mib,
        run_dir=run_dir,
    )
    return QemuHypervisor(
        machine, settings=selection.settings, reaper=reaper, vsock_backend=vsock_backend
    )
