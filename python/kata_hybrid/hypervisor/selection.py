"""Which hypervisor runs a sandbox, and why: from the configuration and what the host can do.

configured hypervisor_name ────────▶ that one
KVM runs a real kernel ────────────▶ the built-in one, in this process
else ──────────────────────────────▶ QEMU

QEMU with machine_accelerators accel=kvm or accel=tcg ─▶ so; else with KVM where it runs a real
kernel, else with TCG (emulation: slower, same guest).
"""

from dataclasses import dataclass
from pathlib import Path

from kata_hybrid.aio.events import NativeEvents
from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.config.model import Config, HypervisorName, QemuConfig
from kata_hybrid.errors import FailedPreconditionError, InvalidConfigError, KvmAccessError
from kata_hybrid.hypervisor.base import Hypervisor, MachineConfig
from kata_hybrid.hypervisor.builtin import BuiltinHypervisor
from kata_hybrid.hypervisor.builtin_settings import BuiltinSettings, builtin_settings
from kata_hybrid.hypervisor.kernel_params import kernel_params
from kata_hybrid.hypervisor.probe import HostReport, KvmFinding, VirtiofsdFinding
from kata_hybrid.hypervisor.qemu import QemuHypervisor, QemuSettings
from kata_hybrid.hypervisor.qemu_command import Accelerator
from kata_hybrid.hypervisor.vsock import VsockBackendFactory

QEMU_REMEDY = "apt-get install qemu-system-x86 (or set path in [hypervisor.qemu])"
VIRTIOFSD_REMEDY = (
    "apt-get install qemu-system-common on Debian 12, virtiofsd on later ones "
    "(or set virtio_fs_daemon in [hypervisor.qemu])"
)
GUEST_REMEDY = "kata-hybrid guest build"
KVM_REMEDY = 'use a host whose KVM runs kernels, or hypervisor_name = "qemu" in [runtime]'


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Something a sandbox cannot do without."""

    thing: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltinChoice:
    """The monitor in this process; it serves the shared folder too."""

    settings: BuiltinSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuChoice:
    """QEMU, and the daemon that serves the shared folder."""

    settings: QemuSettings
    virtiofsd: VirtiofsdFinding


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The hypervisor that will be used."""

    name: str
    reason: str
    choice: BuiltinChoice | QemuChoice


def choose_monitor(config: Config, kvm: KvmFinding) -> tuple[HypervisorName, str]:
    """Choose the monitor, and say why."""
    configured = config.runtime.hypervisor_name
    if configured is not None:
        return configured, f"{configured.value} is configured"
    if kvm.is_usable:
        return HypervisorName.BUILTIN, f"KVM is usable: {kvm.reason}"
    return HypervisorName.QEMU, f"KVM is of no use here: {kvm.reason}"


def needs_virtiofsd(config: Config, kvm: KvmFinding) -> bool:
    """Say whether a daemon will serve the shared folder."""
    return choose_monitor(config, kvm)[0] is HypervisorName.QEMU


def missing_parts(config: Config, report: HostReport, name: HypervisorName) -> tuple[Missing, ...]:
    """List what a sandbox of this monitor would miss on this host; empty when it can start."""
    missing: list[Missing] = []
    match name:
        case HypervisorName.BUILTIN:
            if not report.kvm.is_usable:
                missing.append(Missing(thing=f"KVM ({report.kvm.reason})", remedy=KVM_REMEDY))
        case HypervisorName.QEMU:
            if report.qemu is None:
                where = config.qemu.path or "qemu-system-x86_64"
                missing.append(Missing(thing=f"QEMU ({where})", remedy=QEMU_REMEDY))
            if report.virtiofsd is None:
                where = config.qemu.virtio_fs_daemon or "in the usual places"
                missing.append(Missing(thing=f"virtiofsd ({where})", remedy=VIRTIOFSD_REMEDY))
    hypervisor = config.hypervisor(name)
    for what, path in (("kernel", hypervisor.kernel), ("initrd", hypervisor.initrd)):
        if not path.is_file():
            missing.append(Missing(thing=f"guest {what} ({path})", remedy=GUEST_REMEDY))
    return tuple(missing)


def select_hypervisor(config: Config, report: HostReport) -> Selection:
    """Choose.

    Raises:
        FailedPreconditionError: something is missing; the text says what and how to get it.
        KvmAccessError: KVM is needed, as configured, but cannot run a guest.
        InvalidConfigError: the configured accelerator is unknown.
    """
    name, reason = choose_monitor(config, report.kvm)
    if name is HypervisorName.BUILTIN and not report.kvm.is_usable:
        message = f"{reason}, but KVM is of no use here: {report.kvm.reason}"
        raise KvmAccessError(message)
    missing = missing_parts(config, report, name)
    if missing:
        message = "; ".join(f"{part.thing} is missing: {part.remedy}" for part in missing)
        raise FailedPreconditionError(message)
    match name:
        case HypervisorName.BUILTIN:
            return Selection(
                name="builtin (kvm)",
                reason=reason,
                choice=BuiltinChoice(settings=builtin_settings(config.builtin)),
            )
        case HypervisorName.QEMU:
            return _select_qemu(config.qemu, report, reason=reason)


def _select_qemu(config: QemuConfig, report: HostReport, *, reason: str) -> Selection:
    if report.qemu is None or report.virtiofsd is None:
        message = "missing_parts lets no host without QEMU and virtiofsd pass"
        raise AssertionError(message)
    accelerator, why = choose_accelerator(config, report)
    return Selection(
        name=f"qemu ({accelerator.value})",
        reason=reason if why in reason else f"{reason}; {why}",
        choice=QemuChoice(
            settings=QemuSettings(
                program=report.qemu,
                accelerator=accelerator,
                has_kernel_vsock=report.has_kernel_vsock,
                machine_type=config.machine_type,
                machine_options=config.machine_accelerators,
                cpu_features=config.cpu_features,
                entropy_source=config.entropy_source,
            ),
            virtiofsd=report.virtiofsd,
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
    events: NativeEvents,
    vsock_backend: VsockBackendFactory,
) -> Hypervisor:
    """Make the selected hypervisor for one sandbox; nothing is started.

    Args:
        config: the configuration.
        selection: what was selected from it.
        name: the sandbox's id.
        run_dir: the sandbox's own folder.
        reaper: starts QEMU.
        events: where the built-in monitor reports.
        vsock_backend: serves QEMU's guest on a host without vhost-vsock.
    """
    match selection.choice:
        case BuiltinChoice(settings=settings):
            machine = _machine(config, HypervisorName.BUILTIN, name=name, run_dir=run_dir)
            return BuiltinHypervisor(machine, settings=settings, events=events)
        case QemuChoice(settings=settings):
            machine = _machine(config, HypervisorName.QEMU, name=name, run_dir=run_dir)
            return QemuHypervisor(
                machine, settings=settings, reaper=reaper, vsock_backend=vsock_backend
            )


def _machine(config: Config, monitor: HypervisorName, *, name: str, run_dir: Path) -> MachineConfig:
    hypervisor = config.hypervisor(monitor)
    return MachineConfig(
        name=name,
        kernel=hypervisor.kernel,
        initrd=hypervisor.initrd,
        kernel_params=kernel_params(config, monitor),
        vcpu_count=hypervisor.vcpu_count(),
        memory_mib=hypervisor.memory_mib,
        run_dir=run_dir,
    )
