"""``kata-hybrid check``: what this host can do, what would be used and why, what is missing."""

import argparse
import asyncio
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.cli.output import Output
from kata_hybrid.config.load import load_config
from kata_hybrid.config.model import Config, HypervisorConfig, HypervisorName
from kata_hybrid.errors import KataError
from kata_hybrid.guest.build import bundled_programs
from kata_hybrid.hypervisor.probe import HostReport, KvmProbe, probe_host, probe_kvm_natively
from kata_hybrid.hypervisor.selection import (
    Missing,
    choose_monitor,
    missing_parts,
    select_hypervisor,
)

EXIT_OK = 0
EXIT_MISSING = 1
SHIM_NAME = "containerd-shim-kata-hybrid-v2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    state: str
    """``ok``, ``note`` (works without) or ``missing``."""
    detail: str
    remedy: str = ""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser("check", help="say what this host can do and what is missing")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Run the command; 0 when a sandbox can start, 1 when something is missing."""
    del arguments
    config = load_config(environment=os.environ)
    with output.progress() as progress:
        progress.step("probe the host")
        report = asyncio.run(_probe(config, probe_kvm=probe_kvm_natively))
    return show(config, report, output=output, environment=os.environ)


async def _probe(config: Config, *, probe_kvm: KvmProbe) -> HostReport:
    reaper = ProcessReaper()
    try:
        return await probe_host(config.qemu, reaper=reaper, run_root=None, probe_kvm=probe_kvm)
    finally:
        reaper.close()


def show(
    config: Config, report: HostReport, *, output: Output, environment: Mapping[str, str]
) -> int:
    """Print the report and return the exit status."""
    findings = examine(config, report, environment=environment)
    choice, reason = _choice(config, report)
    is_ready = not any(finding.state == "missing" for finding in findings) and bool(choice)
    _show_lines(findings, choice=choice, reason=reason, output=output)
    output.document(
        {
            "ready": is_ready,
            "hypervisor": choice or None,
            "reason": reason,
            "configuration": [str(path) for path in config.files],
            "findings": [asdict(finding) for finding in findings],
        }
    )
    return EXIT_OK if is_ready else EXIT_MISSING


def examine(
    config: Config, report: HostReport, *, environment: Mapping[str, str]
) -> tuple[Finding, ...]:
    """Turn what was found into lines."""
    chosen, _reason = choose_monitor(config, report.kvm)
    missing = missing_parts(config, report, chosen)
    found = [*_host_findings(report), *_guest_findings(config.hypervisor(chosen))]
    found.extend(_missing_finding(part) for part in missing)
    for other in HypervisorName:
        if other is not chosen:
            parts = missing_parts(config, report, other)
            found.extend(_unused_finding(part, other) for part in parts if part not in missing)
    found.append(_shim_finding(environment))
    found.extend(
        Finding(name="configuration", state="note", detail=f"{notice}: not implemented, ignored")
        for notice in config.notices
    )
    # What is missing says more than what was found of the same thing.
    names = {finding.name for finding in found if finding.state == "missing"}
    return tuple(
        finding for finding in found if finding.state == "missing" or finding.name not in names
    )


def _host_findings(report: HostReport) -> Iterator[Finding]:
    if report.kvm.is_usable:
        yield Finding(name="kvm", state="ok", detail=report.kvm.reason)
    if report.has_kernel_vsock:
        yield Finding(name="vsock", state="ok", detail="/dev/vhost-vsock, for QEMU")
    else:
        yield Finding(
            name="vsock",
            state="note",
            detail="no usable /dev/vhost-vsock: for QEMU our own vhost-user back end is used",
            remedy="modprobe vhost_vsock",
        )
    if report.qemu is not None:
        yield Finding(name="qemu", state="ok", detail=str(report.qemu))
    if report.virtiofsd is not None:
        detail = f"{report.virtiofsd.path} ({report.virtiofsd.kind.value}), for QEMU"
        yield Finding(name="virtiofsd", state="ok", detail=detail)


def _guest_findings(hypervisor: HypervisorConfig) -> Iterator[Finding]:
    for name, path in (("guest kernel", hypervisor.kernel), ("guest initrd", hypervisor.initrd)):
        if path.is_file():
            yield Finding(name=name, state="ok", detail=str(path))


def _unused_finding(part: Missing, monitor: HypervisorName) -> Finding:
    """Something that would be missing for another monitor."""
    missing = _missing_finding(part)
    detail = f"{missing.detail}: only {monitor.value} needs it"
    return replace(missing, state="note", detail=detail)


def _missing_finding(part: Missing) -> Finding:
    name, _, detail = part.thing.partition(" (")
    return Finding(
        name=name.lower(), state="missing", detail=detail.removesuffix(")"), remedy=part.remedy
    )


def _shim_finding(environment: Mapping[str, str]) -> Finding:
    """The shim's program and the guest programs are in the package; say if they are not."""
    program = shutil.which(SHIM_NAME, path=environment.get("PATH", os.defpath))
    if program is not None:
        return Finding(name="shim", state="ok", detail=program)
    return Finding(
        name="shim",
        state="note",
        detail=f"{SHIM_NAME} is not on PATH, where containerd looks for it",
        remedy="install the wheel, or set runtime_path in containerd's configuration",
    )


def _choice(config: Config, report: HostReport) -> tuple[str, str]:
    try:
        selection = select_hypervisor(config, report)
    except KataError as error:
        return "", str(error)
    return selection.name, selection.reason


def _show_lines(findings: tuple[Finding, ...], *, choice: str, reason: str, output: Output) -> None:
    signs = {
        "ok": output.good("ok     "),
        "note": output.notable("note   "),
        "missing": output.bad("missing"),
    }
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        output.line(f"{signs[finding.state]}  {finding.name:<{width}}  {finding.detail}")
        if finding.remedy:
            output.line(f"{'':<{width + 11}}-> {finding.remedy}")
    output.line()
    if choice:
        output.line(f"{output.strong(choice)} would be used: {reason}")
    else:
        is_missing = any(finding.state == "missing" for finding in findings)
        why = "see what is missing above" if is_missing else reason
        output.line(f"{output.bad('No sandbox can start here')}: {why}")
    programs = bundled_programs()
    absent = [path.name for path in (programs.agent, programs.init) if not path.is_file()]
    if absent:
        output.line(
            f"The package was built without {' and '.join(absent)}: "
            "guest build needs --agent and --init."
        )
