import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.config.model import QemuConfig
from kata_hybrid.errors import InvalidStateError, VmmError
from kata_hybrid.hypervisor.probe import VirtiofsdFinding, VirtiofsdKind
from kata_hybrid.resource.share_fs.base import SharedFolder
from kata_hybrid.resource.share_fs.virtiofsd import (
    VirtiofsdSettings,
    VirtiofsdShare,
    build_arguments,
    virtiofsd_settings,
)
from kata_hybrid.types import FolderCache
from open_descriptors import is_alive, open_descriptors

DEADLINE_S = 20.0
READY = "echo 'Waiting for vhost-user socket connection...' >&2\n"


def arguments(kind: VirtiofsdKind, folder: str, **changes: object) -> tuple[str, ...]:
    settings = VirtiofsdSettings(program=Path("/v"), kind=kind, **changes)  # type: ignore[arg-type]
    return build_arguments(settings, folder=Path(folder), socket_fd=5, file_limit=1000)


def test_the_c_daemon_gets_its_options_and_an_escaped_path() -> None:
    command = arguments(VirtiofsdKind.C, "/a,b\\c", cache=FolderCache.NEVER)
    assert command[:3] == ("/v", "--fd=5", "--rlimit-nofile=1000")
    assert "source=/a\\,b\\\\c" in command
    assert {"cache=none", "xattr", "sandbox=chroot"} <= set(command)


def test_the_rust_daemon_gets_its_options_and_the_path_as_it_is() -> None:
    command = arguments(VirtiofsdKind.RUST, "/a,b", cache=FolderCache.NEVER)
    assert {"--shared-dir=/a,b", "--cache=never", "--xattr", "--sandbox=chroot"} <= set(command)


def test_extra_arguments_come_last() -> None:
    command = arguments(VirtiofsdKind.RUST, "/a", extra_arguments=("--x", "y"))
    assert command[-2:] == ("--x", "y")


def test_settings_combine_configuration_and_finding() -> None:
    config = QemuConfig(virtio_fs_cache=FolderCache.ALWAYS, virtio_fs_extra_args=("-z",))
    found = VirtiofsdFinding(path=Path("/v"), kind=VirtiofsdKind.RUST)
    assert virtiofsd_settings(config, found) == VirtiofsdSettings(
        program=Path("/v"),
        kind=VirtiofsdKind.RUST,
        cache=FolderCache.ALWAYS,
        extra_arguments=("-z",),
    )


Use = Callable[[VirtiofsdShare], Awaitable[None]]


def run(tmp_path: Path, daemon: str, use: Use) -> None:
    """Use a folder served by a shell script, then check that nothing is left of it."""
    program = tmp_path / "daemon"
    program.write_text(f"#!/bin/sh\n{daemon}")
    program.chmod(0o755)
    (tmp_path / "shared").mkdir(exist_ok=True)
    serve(tmp_path, VirtiofsdSettings(program=program, kind=VirtiofsdKind.C), use)


def serve(tmp_path: Path, settings: VirtiofsdSettings, use: Use) -> None:
    async def main() -> None:
        reaper = ProcessReaper()
        share = VirtiofsdShare(
            SharedFolder(host_path=tmp_path / "shared"),
            run_dir=tmp_path,
            settings=settings,
            reaper=reaper,
        )
        before = open_descriptors()
        try:
            async with asyncio.timeout(DEADLINE_S):
                await use(share)
        finally:
            await share.stop()
            reaper.close()
        assert open_descriptors() == before
        assert not share.device.socket_path.exists()
        for process in share.processes:
            assert not is_alive(process.pid)

    asyncio.run(main())


def test_a_served_folder_can_be_connected_to(tmp_path: Path) -> None:
    async def use(share: VirtiofsdShare) -> None:
        await share.start()
        path = share.device.socket_path
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(os.fspath(path))
        assert [process.name for process in share.processes] == ["virtiofsd"]

    run(tmp_path, f"{READY}exec sleep 60\n", use)


def test_a_daemon_that_ends_at_once_fails_the_start_with_its_words(tmp_path: Path) -> None:
    async def use(share: VirtiofsdShare) -> None:
        with pytest.raises(VmmError, match="status 3: no such option"):
            await share.start()

    run(tmp_path, "echo 'no such option' >&2; exit 3\n", use)


def test_death_is_reported_with_the_daemons_words(tmp_path: Path) -> None:
    async def use(share: VirtiofsdShare) -> None:
        await share.start()
        (tmp_path / "die").touch()
        reason = await share.died()
        assert "status 7" in reason
        assert "out of luck" in reason

    wait = f"while [ ! -e {tmp_path}/die ]; do sleep 0.01; done\n"
    run(tmp_path, f"{READY}{wait}echo 'out of luck' >&2; exit 7\n", use)


def test_a_stopped_daemon_says_so(tmp_path: Path) -> None:
    async def use(share: VirtiofsdShare) -> None:
        await share.start()
        await share.stop()
        assert await share.died() == "virtiofsd was stopped"
        await share.stop()

    run(tmp_path, f"{READY}exec sleep 60\n", use)


def test_a_stopped_share_does_not_start_again(tmp_path: Path) -> None:
    async def use(share: VirtiofsdShare) -> None:
        await share.stop()
        with pytest.raises(InvalidStateError):
            await share.start()

    run(tmp_path, "", use)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    async def use(share: VirtiofsdShare) -> None:
        (tmp_path / "shared").rmdir()
        with pytest.raises(VmmError, match="shared is not a folder"):
            await share.start()

    run(tmp_path, "", use)


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    async def use(share: VirtiofsdShare) -> None:
        (tmp_path / "daemon").unlink()
        with pytest.raises(VmmError, match="daemon"):
            await share.start()

    run(tmp_path, "", use)


def test_a_start_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    async def use(share: VirtiofsdShare) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await share.start()

    run(tmp_path, "exec sleep 60\n", use)
