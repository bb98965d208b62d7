"""The whole way to the agent with the built-in monitor: sockets, a shared folder, a disk."""

import asyncio
import subprocess
from pathlib import Path

import pytest

from kata_hybrid._native import vsock
from kata_hybrid._native.events import EventPort
from kata_hybrid.agent.client import AgentClient
from kata_hybrid.aio.events import NativeEvents
from kata_hybrid.config.model import Config, HypervisorName
from kata_hybrid.hypervisor.base import MachineConfig
from kata_hybrid.hypervisor.builtin import BuiltinHypervisor
from kata_hybrid.hypervisor.builtin_settings import BuiltinSettings
from kata_hybrid.hypervisor.kernel_params import kernel_params
from kata_hybrid.types import BlockDevice, GuestStorage, HostFolder, SandboxId
from lab_guest.image import GuestImage

GUEST = Path(__file__).resolve().parents[2] / "build" / "guest"
BOOT_TIMEOUT_S = 120.0


@pytest.fixture
def guest_dir(image: GuestImage) -> Path:
    """The guest that set-up built, where a machine can run one."""
    del image
    if not (GUEST / "initrd.img").is_file():
        pytest.skip(f"no {GUEST}: run make setup")
    return GUEST


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", path], check=True, timeout=60)
    return path


def test_the_agent_answers_and_mounts_what_it_is_given(
    guest_dir: Path, run_dir: Path, disk: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        port = EventPort()
        native = NativeEvents(port)
        io = vsock.IoThread(port)
        machine = BuiltinHypervisor(
            MachineConfig(
                name="agent",
                kernel=guest_dir / "vmlinux",
                initrd=guest_dir / "initrd.img",
                kernel_params=kernel_params(Config(), HypervisorName.BUILTIN),
                vcpu_count=1,
                memory_mib=512,
                run_dir=run_dir,
            ),
            settings=BuiltinSettings(),
            events=native,
        )
        found = await machine.add_disk(BlockDevice(id="data", path=disk, is_read_only=False))
        machine.add_shared_folder(HostFolder(tag="share", path=tmp_path))
        agent = AgentClient(io, native, timeout_s=30)
        try:
            await machine.start()
            await agent.connect(address=machine.agent_address, port=1024, timeout_s=BOOT_TIMEOUT_S)
            await agent.create_sandbox(
                SandboxId("s"),
                hostname="guest",
                dns=(),
                storages=(
                    GuestStorage(
                        driver="virtio-fs", source="share", fstype="virtiofs", mount_point="/mnt/s"
                    ),
                    GuestStorage(
                        driver=found.driver,
                        source=found.source,
                        fstype="ext4",
                        mount_point="/mnt/d",
                    ),
                ),
            )
            assert (await agent.guest_details()).agent_version
            await machine.stop()
            async with asyncio.timeout(10):
                await agent.closed()
            assert (await machine.exited()).reason == "killed"
        finally:
            await agent.close()
            await machine.stop()
            await machine.cleanup()
            io.close()
            native.close()

    asyncio.run(main())
    assert not (run_dir / "agent.sock").exists()
