"""The whole way to the agent: our vsock back end, QEMU, the package's own guest programs."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from kata_hybrid._native import events, vsock
from kata_hybrid.agent.client import AgentClient
from kata_hybrid.aio.events import NativeEvents
from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.config.model import Config, QemuConfig
from kata_hybrid.errors import AgentUnavailableError, KataError
from kata_hybrid.guest.build import bundled_programs
from kata_hybrid.hypervisor.probe import HostReport, KvmFinding, VirtiofsdFinding, VirtiofsdKind
from kata_hybrid.hypervisor.selection import new_hypervisor, select_hypervisor
from kata_hybrid.hypervisor.vsock_backend import NativeVsockBackendFactory

pytestmark = pytest.mark.vm

BOOT_TIMEOUT_S = 45.0


@pytest.fixture
def agent_guest_dir(make_guest: Callable[[Path, Path], Path]) -> Path:
    programs = bundled_programs()
    if not (programs.agent.is_file() and programs.init.is_file()):
        pytest.skip("the package was built without its guest programs")
    return make_guest(programs.init, programs.agent)


def test_the_agent_answers_through_our_vsock_back_end(
    agent_guest_dir: Path, run_dir: Path, qemu: Path
) -> None:
    report = HostReport(
        kvm=KvmFinding(is_usable=False, reason="the test wants TCG"),
        qemu=qemu,
        virtiofsd=VirtiofsdFinding(path=qemu, kind=VirtiofsdKind.C),
        has_kernel_vsock=False,
        is_from_cache=False,
    )
    config = Config(
        qemu=QemuConfig(
            kernel=agent_guest_dir / "vmlinux",
            initrd=agent_guest_dir / "initrd.img",
            memory_mib=512,
        )
    )

    async def main() -> None:
        reaper = ProcessReaper()
        port = events.EventPort()
        native = NativeEvents(port)
        io = vsock.IoThread(port)
        machine = new_hypervisor(
            config,
            select_hypervisor(config, report),
            name="agent",
            run_dir=run_dir,
            reaper=reaper,
            events=native,
            vsock_backend=NativeVsockBackendFactory(io, native),
        )
        agent = AgentClient(io, native, timeout_s=10)
        try:
            await machine.start()
            await agent.connect(address=machine.agent_address, port=1024, timeout_s=BOOT_TIMEOUT_S)
            details = await agent.guest_details()
            assert details.agent_version
            await machine.stop()
            async with asyncio.timeout(10):
                await agent.closed()
            with pytest.raises((AgentUnavailableError, KataError)):
                await agent.check(timeout_s=5)
        finally:
            await agent.close()
            await machine.stop()
            await machine.cleanup()
            io.close()
            native.close()
            reaper.close()

    asyncio.run(main())
    assert not [path for path in run_dir.iterdir() if path.is_socket()]
