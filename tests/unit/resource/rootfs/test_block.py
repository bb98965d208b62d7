from pathlib import Path

import pytest

from kata_hybrid.resource.rootfs.block import BlockRootfs, is_block_rootfs
from kata_hybrid.types import GuestDisk, GuestStorage, Mount

ROOT = "/run/kata-containers/shared/containers/passthrough/c1/rootfs"


def image(folder: Path) -> str:
    path = folder / "image"
    path.touch()
    return str(path)


def test_an_image_file_to_be_looped_is_a_disk(tmp_path: Path) -> None:
    assert is_block_rootfs((Mount(type="ext4", source=image(tmp_path), options=("loop",)),))


def test_an_image_file_without_loop_is_none(tmp_path: Path) -> None:
    assert not is_block_rootfs((Mount(type="ext4", source=image(tmp_path)),))


@pytest.mark.parametrize("kind", ["overlay", "bind", "tmpfs", ""])
def test_other_file_systems_are_none(kind: str, tmp_path: Path) -> None:
    assert not is_block_rootfs((Mount(type=kind, source=image(tmp_path), options=("loop",)),))


def test_a_missing_source_is_none(tmp_path: Path) -> None:
    assert not is_block_rootfs((Mount(type="ext4", source=str(tmp_path / "x"), options=("loop",)),))


def test_a_folder_or_a_character_device_is_none(tmp_path: Path) -> None:
    assert not is_block_rootfs((Mount(type="ext4", source=str(tmp_path), options=("loop",)),))
    assert not is_block_rootfs((Mount(type="ext4", source="/dev/null"),))


@pytest.mark.parametrize("count", [0, 2])
def test_one_file_system_is_needed(count: int, tmp_path: Path) -> None:
    entry = Mount(type="ext4", source=image(tmp_path), options=("loop",))
    assert not is_block_rootfs((entry,) * count)


def test_the_agent_mounts_the_disk_at_the_root() -> None:
    entry = Mount(type="ext4", source="/image", options=("loop", "rw", "noatime"))
    rootfs = BlockRootfs(entry, name="c1", disk=GuestDisk(driver="blk", source="02/03"))
    assert rootfs.storages == (
        GuestStorage(
            driver="blk", source="02/03", fstype="ext4", options=("noatime",), mount_point=ROOT
        ),
    )
    assert rootfs.guest_path == ROOT


def test_xfs_is_mounted_though_its_uuid_may_be_known() -> None:
    disk = GuestDisk(driver="mmioblk", source="/dev/vda")
    rootfs = BlockRootfs(Mount(type="xfs", source="/image"), name="c1", disk=disk)
    (storage,) = rootfs.storages
    assert (storage.driver, storage.source) == ("mmioblk", "/dev/vda")
    assert storage.options == ("nouuid",)
