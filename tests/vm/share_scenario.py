"""Run by ``test_shared_folder`` in a mount namespace of its own, like the shim's.

Boots a guest, bind-mounts a folder below the shared one while the guest runs, and lets the guest
read a file in it. Prints the guest's console. Arguments: guest folder, run directory, QEMU,
virtiofsd.
"""

# ruff: noqa: T201 - what it prints is what the test reads

import asyncio
import ctypes
import os
import sys
from pathlib import Path

from guest_console import ConsoleWatch
from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.config.model import Config, HypervisorName, QemuConfig
from kata_hybrid.hypervisor import qemu_command
from kata_hybrid.hypervisor.base import MachineConfig
from kata_hybrid.hypervisor.kernel_params import kernel_params
from kata_hybrid.hypervisor.probe import KvmFinding, probe_host
from kata_hybrid.hypervisor.qemu import QemuHypervisor, QemuSettings
from kata_hybrid.hypervisor.qemu_command import Accelerator
from kata_hybrid.resource.share_fs.base import SharedFolder
from kata_hybrid.resource.share_fs.virtiofsd import VirtiofsdShare, virtiofsd_settings

DEADLINE_S = 50.0
MS_BIND = 4096


def bind_mount(source: Path, target: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(os.fsencode(source), os.fsencode(target), None, MS_BIND, None) != 0:
        raise OSError(ctypes.get_errno(), "bind mount")


class NoBackend:
    def close(self) -> None:
        """There is nothing to close."""


async def main(guest_dir: Path, run_dir: Path, qemu: Path, virtiofsd: Path) -> None:
    # vsock is not under test and would need a live back end.
    setattr(qemu_command, "_vsock", lambda _vsock: ())  # noqa: B010 - mypy refuses to assign
    shared, source = run_dir / "shared", run_dir / "source"
    for folder in (shared, source):
        folder.mkdir()
    (source / "file").write_text("mounted late")
    reaper = ProcessReaper()
    config = QemuConfig(path=qemu, virtio_fs_daemon=virtiofsd)
    report = await probe_host(
        config,
        reaper=reaper,
        run_root=None,
        probe_kvm=lambda: KvmFinding(is_usable=False, reason="not asked"),
    )
    assert report.virtiofsd is not None
    share = VirtiofsdShare(
        SharedFolder(host_path=shared),
        run_dir=run_dir,
        settings=virtiofsd_settings(config, report.virtiofsd),
        reaper=reaper,
    )
    machine = QemuHypervisor(
        MachineConfig(
            name="share",
            kernel=guest_dir / "vmlinux",
            initrd=guest_dir / "initrd.img",
            kernel_params=kernel_params(Config(), HypervisorName.QEMU),
            vcpu_count=1,
            memory_mib=256,
            run_dir=run_dir,
        ),
        settings=QemuSettings(program=qemu, accelerator=Accelerator.TCG, has_kernel_vsock=False),
        reaper=reaper,
        vsock_backend=lambda **_paths: NoBackend(),
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            await share.start()
            machine.add_shared_folder(share.device)
            with ConsoleWatch("mounted") as console:
                await machine.start()
                await console.seen()
            (shared / "late").mkdir()
            bind_mount(source, shared / "late")
            print(await machine.exited())
            print(await share.died())
    finally:
        print(machine.console_tail())
        await machine.stop()
        await machine.cleanup()
        await share.stop()
        reaper.close()
    print("written:", (shared / "from-guest").read_text())


if __name__ == "__main__":
    guest_dir, run_dir, qemu, virtiofsd = (Path(argument) for argument in sys.argv[1:])
    asyncio.run(main(guest_dir, run_dir, qemu, virtiofsd))
