import os
from pathlib import Path

import pytest

from harness.mounts import in_own_mounts, make_tmpfs, mount_points
from kata_hybrid.errors import InvalidIdError, InvalidSpecError
from kata_hybrid.resource.share_fs.base import GUEST_PATH, SharedFolder
from kata_hybrid.resource.volume.bind import GUEST_SHM, BindVolumes
from kata_hybrid.service.convert import container_id


class World:
    """A shared folder and something to share."""

    def __init__(self, base: Path) -> None:
        self.shared = base / "shared"
        self.shared.mkdir()
        self.folder = SharedFolder(host_path=self.shared)
        self.volumes = BindVolumes(self.folder, name="c1")
        self.source = base / "source"
        self.source.mkdir()
        (self.source / "file").write_text("here")

    def add(self, source: Path | str, *, is_read_only: bool = False) -> Path:
        """Return where the host sees what the guest will."""
        path = self.volumes.add(os.fspath(source), destination="/mnt", is_read_only=is_read_only)
        return self.shared / Path(path).relative_to(GUEST_PATH)

    def assert_nothing_left(self) -> None:
        assert mount_points(self.shared) == []
        assert list(self.shared.glob("passthrough/*")) == []


@in_own_mounts
def test_a_folder_is_shared(tmp_path: Path) -> None:
    world = World(tmp_path)
    place = world.add(world.source)
    assert (place / "file").read_text() == "here"
    (place / "new").touch()
    assert (world.source / "new").exists()


@in_own_mounts
def test_a_file_is_shared(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert world.add(world.source / "file").read_text() == "here"


@in_own_mounts
def test_a_read_only_share_refuses_writes(tmp_path: Path) -> None:
    world = World(tmp_path)
    place = world.add(world.source, is_read_only=True)
    with pytest.raises(OSError, match="Read-only file system"):
        (place / "new").touch()
    file = world.add(world.source / "file", is_read_only=True)
    with pytest.raises(OSError, match="Read-only file system"):
        file.write_text("no")
    assert (world.source / "file").read_text() == "here"


@in_own_mounts
def test_what_is_mounted_below_is_shared_too(tmp_path: Path) -> None:
    world = World(tmp_path)
    (make_tmpfs(world.source / "inner") / "file").write_text("below")
    assert (world.add(world.source) / "inner" / "file").read_text() == "below"


@in_own_mounts
def test_the_same_source_twice_has_two_places(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert world.add(world.source) != world.add(world.source)


@in_own_mounts
def test_the_root_itself_can_be_shared(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert (world.add("/") / "etc").is_dir()


@in_own_mounts
def test_a_source_with_a_long_name_is_shared(tmp_path: Path) -> None:
    world = World(tmp_path)
    source = tmp_path / ("n" * 255)
    source.write_text("long")
    assert world.add(source).read_text() == "long"


@in_own_mounts
def test_no_other_containers_root_can_fall_into_a_volume(tmp_path: Path) -> None:
    world = World(tmp_path)
    place = world.add(world.source)
    with pytest.raises(InvalidIdError):
        container_id(place.name)
    assert [path.name for path in world.source.iterdir()] == ["file"]


def test_shm_is_the_sandboxes() -> None:
    volumes = BindVolumes(SharedFolder(host_path=Path("/nowhere")), name="c1")
    source = volumes.add("/host/shm", destination="/dev/shm", is_read_only=False)
    assert source == GUEST_SHM


@pytest.mark.parametrize(
    "source", ["/dev", "/dev/null", "/proc/sys", "/sys/", "/proc/../proc/cpuinfo"]
)
def test_what_the_kernel_serves_is_the_guests_own(source: str) -> None:
    volumes = BindVolumes(SharedFolder(host_path=Path("/nowhere")), name="c1")
    assert volumes.add(source, destination="/mnt", is_read_only=False) == source


@in_own_mounts
def test_a_path_that_only_begins_like_a_device_is_shared(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(InvalidSpecError, match="source /device does not exist"):
        world.add("/device")


@in_own_mounts
def test_a_missing_source_is_named_with_its_destination(tmp_path: Path) -> None:
    world = World(tmp_path)
    missing = tmp_path / "missing"
    with pytest.raises(InvalidSpecError, match=f"mount /mnt: source {missing} does not exist"):
        world.add(missing)


@in_own_mounts
def test_a_bind_without_source_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(InvalidSpecError, match=r"mount /mnt: .*source"):
        world.add("")
    world.assert_nothing_left()


@in_own_mounts
def test_a_source_of_no_kind_to_share_is_named(tmp_path: Path) -> None:
    world = World(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidSpecError, match="is neither a file nor a folder"):
        world.add(tmp_path / "fifo")
    world.assert_nothing_left()


@in_own_mounts
def test_release_leaves_nothing_and_the_source_as_it_was(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.add(world.source)
    world.add(world.source / "file")
    world.volumes.release()
    world.volumes.release()
    world.assert_nothing_left()
    assert (world.source / "file").read_text() == "here"


@in_own_mounts
def test_release_after_a_failure_leaves_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.add(world.source)
    with pytest.raises(InvalidSpecError):
        world.add(tmp_path / "missing")
    world.volumes.release()
    world.assert_nothing_left()


@in_own_mounts
def test_release_does_not_delete_through_what_is_still_mounted(tmp_path: Path) -> None:
    world = World(tmp_path)
    place = world.add(world.source)
    with (place / "file").open():
        world.volumes.release()
    world.assert_nothing_left()
    assert (world.source / "file").exists()
