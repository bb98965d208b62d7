import os
from pathlib import Path

import pytest

from harness.mounts import in_own_mounts, make_tmpfs, mount_points
from kata_hybrid.errors import FailedPreconditionError, InvalidArgumentError
from kata_hybrid.resource import mount
from kata_hybrid.types import Mount


def folders(base: Path, *names: str) -> list[Path]:
    made = [base / name for name in names]
    for folder in made:
        folder.mkdir()
    return made


@in_own_mounts
def test_a_bind_shows_its_source(tmp_path: Path) -> None:
    source, target = folders(tmp_path, "source", "target")
    (source / "file").write_text("here")
    mount.bind(source, target, is_read_only=False)
    assert (target / "file").read_text() == "here"
    (target / "new").touch()
    assert (source / "new").exists()


@in_own_mounts
def test_a_read_only_bind_refuses_writes(tmp_path: Path) -> None:
    source, target = folders(tmp_path, "source", "target")
    mount.bind(source, target, is_read_only=True)
    with pytest.raises(OSError, match="Read-only file system"):
        (target / "new").touch()
    (source / "new").touch()
    assert (target / "new").exists()


@in_own_mounts
def test_a_bind_brings_what_is_mounted_below(tmp_path: Path) -> None:
    source, target = folders(tmp_path, "source", "target")
    (make_tmpfs(source / "inner") / "file").write_text("below")
    mount.bind(source, target, is_read_only=False)
    assert (target / "inner" / "file").read_text() == "below"


@in_own_mounts
def test_a_file_can_be_bound(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("here")
    target.touch()
    mount.bind(source, target, is_read_only=True)
    assert target.read_text() == "here"


@in_own_mounts
def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    (target,) = folders(tmp_path, "target")
    with pytest.raises(InvalidArgumentError, match=f"{tmp_path}/missing on {target}: .*No such"):
        mount.bind(tmp_path / "missing", target, is_read_only=False)


@in_own_mounts
def test_a_file_does_not_go_onto_a_folder(tmp_path: Path) -> None:
    (target,) = folders(tmp_path, "target")
    (tmp_path / "source").touch()
    with pytest.raises(InvalidArgumentError, match="Not a directory"):
        mount.bind(tmp_path / "source", target, is_read_only=False)


@in_own_mounts
def test_what_the_kernel_refuses_is_told_with_its_options(tmp_path: Path) -> None:
    (target,) = folders(tmp_path, "target")
    entry = Mount(type="tmpfs", source="tmpfs", target="", options=("nosuid", "size=banana"))
    with pytest.raises(FailedPreconditionError, match=r"options nosuid,size=banana"):
        mount.mount(entry, target)


@in_own_mounts
def test_an_unknown_file_system_is_refused(tmp_path: Path) -> None:
    (target,) = folders(tmp_path, "target")
    with pytest.raises(FailedPreconditionError, match=r"mount nofs x on .*options none"):
        mount.mount(Mount(type="nofs", source="x"), target)


@in_own_mounts
@pytest.mark.parametrize("field", ["type", "source", "options"])
def test_a_nul_in_a_mount_is_one_of_our_errors(field: str, tmp_path: Path) -> None:
    (target,) = folders(tmp_path, "target")
    values = {"type": "bind", "source": os.fspath(tmp_path), "options": ("rbind",)}
    values[field] = ("a\0b",) if field == "options" else "a\0b"
    with pytest.raises((InvalidArgumentError, FailedPreconditionError)):
        mount.mount(Mount(**values), target)  # type: ignore[arg-type]
    assert mount_points(target) == []


@in_own_mounts
def test_unmounting_detaches_even_what_is_in_use(tmp_path: Path) -> None:
    target = make_tmpfs(tmp_path / "target")
    with (target / "open").open("w"):
        mount.unmount(target)
    assert mount_points(target) == []


@in_own_mounts
def test_unmounting_what_is_no_mount_is_no_error(tmp_path: Path) -> None:
    mount.unmount(tmp_path)
    mount.unmount(tmp_path / "missing")


@in_own_mounts
def test_unmounting_does_not_follow_a_symlink(tmp_path: Path) -> None:
    target = make_tmpfs(tmp_path / "target")
    (tmp_path / "link").symlink_to(target)
    mount.unmount(tmp_path / "link")
    assert mount_points(target) == [target]
