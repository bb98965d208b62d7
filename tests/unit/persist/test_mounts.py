import os
import subprocess
from pathlib import Path

import pytest

from kata_hybrid.persist import mounts
from kata_hybrid.persist.mounts import mounts_below, unmount, unmount_below

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def mount(*words: str | Path) -> None:
    subprocess.run(["mount", *words], check=True)


@needs_root
def test_stacked_and_nested_mounts_are_all_detached(tmp_path: Path) -> None:
    folder = tmp_path / "with blank"
    folder.mkdir()
    mount("-t", "tmpfs", "none", folder)
    mount("-t", "tmpfs", "none", folder)
    (folder / "inner").mkdir()
    mount("-t", "tmpfs", "none", folder / "inner")
    assert mounts_below(str(folder)) == [str(folder), str(folder), f"{folder}/inner"]
    assert unmount_below(str(folder)) == []
    assert mounts_below(str(folder)) == []


@needs_root
def test_links_to_the_folder_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    mount("-t", "tmpfs", "none", tmp_path / "real")
    assert mounts_below(str(tmp_path / "link")) == [str(tmp_path / "real")]
    assert unmount_below(str(tmp_path / "link")) == []


@needs_root
def test_what_is_no_mount_point_is_no_error(tmp_path: Path) -> None:
    unmount(str(tmp_path))
    unmount(str(tmp_path / "absent"))


def test_a_folder_that_is_gone_has_no_mounts(tmp_path: Path) -> None:
    assert mounts_below(str(tmp_path / "absent")) == []


def test_a_name_that_only_begins_alike_is_not_below(tmp_path: Path) -> None:
    assert mounts_below(str(tmp_path)) == []


def test_only_blanks_and_line_feeds_separate(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (
        "22 1 0:5 / /mnt/a\u2028b\x85\x0bc rw shared:1 - tmpfs tmp\rfs rw,size=1k\n"
        "23 1 0:6 /sub\\040dir /mnt/d\\134040 rw - ext4  rw\n"
    ).encode()
    monkeypatch.setattr(mounts, "_read_table", lambda: table + b"24 1 0:7 / /mnt/\xff rw - x y z\n")
    first, second, third = mounts.mount_table()
    assert (first.point, first.kind) == ("/mnt/a\u2028b\x85\x0bc", "tmpfs")
    assert first.options == ["rw", "size=1k"]
    assert (second.root, second.point) == ("/sub dir", "/mnt/d\\040")
    assert (second.kind, second.options) == ("ext4", ["rw"])
    assert third.point == "/mnt/\udcff"
