import os
from pathlib import Path

import pytest

from harness.mounts import in_own_mounts, make_tmpfs, mount_points
from kata_hybrid.errors import FailedPreconditionError, InvalidArgumentError
from kata_hybrid.resource.rootfs.shared import SharedRootfs
from kata_hybrid.resource.share_fs.base import SharedFolder
from kata_hybrid.types import Mount

GUEST_ROOT = "/run/kata-containers/shared/containers/passthrough/c1/rootfs"


class World:
    """A shared folder and the parts of an image, on a tmpfs that overlays can stand on."""

    def __init__(self, base: Path) -> None:
        self.base = make_tmpfs(base / "world")
        self.shared = self.base / "shared"
        self.lower = self.base / "lower"
        self.upper = self.base / "upper"
        self.work = self.base / "work"
        for folder in (self.shared, self.lower, self.upper, self.work):
            folder.mkdir()
        self.folder = SharedFolder(host_path=self.shared)
        self.root = self.shared / "passthrough" / "c1" / "rootfs"

    def overlay(self, *, options: tuple[str, ...] = ()) -> Mount:
        places = {"lowerdir": self.lower, "upperdir": self.upper, "workdir": self.work}
        words = tuple(f"{name}={os.fspath(path)}" for name, path in places.items())
        return Mount(type="overlay", source="overlay", options=(*options, *words))

    def mounted(self, *mounts: Mount, root_path: Path = Path("/nowhere")) -> SharedRootfs:
        return SharedRootfs(self.folder, name="c1", mounts=mounts, root_path=root_path)

    def assert_nothing_left(self) -> None:
        assert mount_points(self.shared) == []
        assert not (self.shared / "passthrough" / "c1").exists()


def bind(source: Path, *, target: str = "", options: tuple[str, ...] = ("rbind",)) -> Mount:
    return Mount(type="bind", source=os.fspath(source), target=target, options=options)


@in_own_mounts
def test_an_overlay_is_seen_in_the_shared_folder(tmp_path: Path) -> None:
    world = World(tmp_path)
    (world.lower / "etc").mkdir()
    rootfs = world.mounted(world.overlay())
    assert rootfs.guest_path == GUEST_ROOT
    assert rootfs.storages == ()
    assert (world.root / "etc").is_dir()


@in_own_mounts
def test_writes_go_to_the_upper_layer(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.mounted(world.overlay())
    (world.root / "new").touch()
    assert (world.upper / "new").exists()
    assert not (world.lower / "new").exists()


@in_own_mounts
def test_a_bind_is_seen_in_the_shared_folder(tmp_path: Path) -> None:
    world = World(tmp_path)
    (world.lower / "etc").mkdir()
    world.mounted(bind(world.lower))
    assert (world.root / "etc").is_dir()


@in_own_mounts
def test_a_read_only_bind_stays_read_only(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.mounted(bind(world.lower, options=("rbind", "ro")))
    with pytest.raises(OSError, match="Read-only file system"):
        (world.root / "new").touch()


@in_own_mounts
def test_without_mounts_the_bundles_root_is_used(tmp_path: Path) -> None:
    world = World(tmp_path)
    (world.lower / "etc").mkdir()
    world.mounted(root_path=world.lower)
    assert (world.root / "etc").is_dir()


@in_own_mounts
def test_a_second_mount_goes_below_the_first(tmp_path: Path) -> None:
    world = World(tmp_path)
    (world.lower / "file").write_text("below")
    rootfs = world.mounted(world.overlay(), bind(world.lower, target="/a/b"))
    assert (world.root / "a" / "b" / "file").read_text() == "below"
    rootfs.release()
    world.assert_nothing_left()


@in_own_mounts
def test_release_leaves_nothing_and_repeats(tmp_path: Path) -> None:
    world = World(tmp_path)
    rootfs = world.mounted(world.overlay())
    (world.root / "kept").touch()
    rootfs.release()
    rootfs.release()
    world.assert_nothing_left()
    assert (world.upper / "kept").exists()


@in_own_mounts
def test_release_of_a_root_in_use_leaves_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    rootfs = world.mounted(world.overlay())
    with (world.root / "open").open("w"):
        rootfs.release()
    world.assert_nothing_left()


@in_own_mounts
def test_another_container_is_not_touched_by_release(tmp_path: Path) -> None:
    world = World(tmp_path)
    first = world.mounted(bind(world.lower))
    SharedRootfs(world.folder, name="c2", mounts=(bind(world.upper),), root_path=Path("/"))
    first.release()
    assert mount_points(world.shared) == [world.shared / "passthrough" / "c2" / "rootfs"]


@pytest.mark.parametrize("target", ["/link", "link/below", "/../../..", "../c2", "/link/.."])
@in_own_mounts
def test_a_target_that_leaves_the_root_is_refused(target: str, tmp_path: Path) -> None:
    world = World(tmp_path)
    outside = world.base / "outside"
    outside.mkdir()
    (world.lower / "link").symlink_to(outside)
    with pytest.raises(InvalidArgumentError, match="leaves the root file system"):
        world.mounted(world.overlay(), bind(world.upper, target=target))
    world.assert_nothing_left()
    assert mount_points(outside) == []
    assert list(outside.iterdir()) == []


@in_own_mounts
def test_an_absolute_symlink_into_the_host_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    (world.lower / "etc").symlink_to("/etc")
    with pytest.raises(InvalidArgumentError, match="'/etc/new' leaves"):
        world.mounted(world.overlay(), bind(world.upper, target="/etc/new"))
    assert not Path("/etc/new").exists()
    world.assert_nothing_left()


@in_own_mounts
def test_a_symlink_that_stays_inside_is_followed(tmp_path: Path) -> None:
    world = World(tmp_path)
    (world.lower / "real").mkdir()
    (world.lower / "link").symlink_to("real")
    (world.base / "data").mkdir()
    (world.base / "data" / "file").touch()
    world.mounted(world.overlay(), bind(world.base / "data", target="/link"))
    assert (world.root / "real" / "file").exists()


@pytest.mark.parametrize("target", ["/file", "/file/below", "/loop", "/a\0b", "/" + "n" * 300])
@in_own_mounts
def test_a_target_that_can_be_no_folder_is_refused(target: str, tmp_path: Path) -> None:
    world = World(tmp_path)
    (world.lower / "file").touch()
    (world.lower / "loop").symlink_to("loop")
    with pytest.raises((InvalidArgumentError, FailedPreconditionError)):
        world.mounted(world.overlay(), bind(world.upper, target=target))
    world.assert_nothing_left()


@in_own_mounts
def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(InvalidArgumentError, match=f"mount bind {world.base}/missing on"):
        world.mounted(bind(world.base / "missing"))
    world.assert_nothing_left()


@in_own_mounts
def test_a_lower_layer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.lower.rmdir()
    with pytest.raises(InvalidArgumentError, match=r"mount overlay overlay on .*No such file"):
        world.mounted(world.overlay())
    world.assert_nothing_left()


@pytest.mark.parametrize("name", ["missing", "file"])
@in_own_mounts
def test_a_bundle_root_that_is_no_folder_is_named(name: str, tmp_path: Path) -> None:
    world = World(tmp_path)
    (world.base / "file").touch()
    with pytest.raises(InvalidArgumentError, match=f"{world.base}/{name} is not a directory"):
        world.mounted(root_path=world.base / name)
    world.assert_nothing_left()


@in_own_mounts
def test_a_failure_half_way_undoes_what_was_mounted(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(InvalidArgumentError, match="missing"):
        world.mounted(world.overlay(), bind(world.lower, target="/a"), bind(world.base / "missing"))
    world.assert_nothing_left()


@in_own_mounts
def test_what_the_kernel_refuses_is_undone(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(FailedPreconditionError, match="options nonsense"):
        world.mounted(world.overlay(options=("nonsense",)))
    world.assert_nothing_left()


@in_own_mounts
def test_many_layers_fit(tmp_path: Path) -> None:
    world = World(tmp_path)
    layers = [world.base / f"layer-with-a-rather-long-name-{number:060}" for number in range(60)]
    for layer in layers:
        layer.mkdir()
    (layers[-1] / "file").touch()
    lower = ":".join(os.fspath(layer) for layer in layers)
    assert len(lower) > 4096
    options = (f"lowerdir={lower}", f"upperdir={world.upper}", f"workdir={world.work}")
    world.mounted(Mount(type="overlay", source="overlay", options=options))
    assert (world.root / "file").exists()
