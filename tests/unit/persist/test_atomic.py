import errno
import os
import stat
from pathlib import Path

import pytest

from harness.mounts import in_own_mounts, make_tmpfs
from kata_hybrid.persist import atomic


class CrashError(Exception):
    """The process ends here."""


def test_a_new_file_holds_the_data(tmp_path: Path) -> None:
    atomic.replace(tmp_path / "state", b"data")
    assert (tmp_path / "state").read_bytes() == b"data"


def test_an_old_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"a longer old text")
    atomic.replace(tmp_path / "state", b"new")
    assert (tmp_path / "state").read_bytes() == b"new"


def test_a_reader_of_the_old_file_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"old")
    with (tmp_path / "state").open("rb") as reader:
        atomic.replace(tmp_path / "state", b"new")
        assert reader.read() == b"old"


def test_no_data_makes_an_empty_file(tmp_path: Path) -> None:
    atomic.replace(tmp_path / "state", b"")
    assert (tmp_path / "state").read_bytes() == b""


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_the_file_has_the_mode_asked_for(mode: int, tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        atomic.replace(tmp_path / "state", b"data", mode=mode)
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == mode


def test_nothing_else_is_left(tmp_path: Path) -> None:
    atomic.replace(tmp_path / "state", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_the_data_is_on_disk_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(name: str) -> None:
        call = getattr(os, name)

        def note(*arguments: object) -> object:
            calls.append(name)
            return call(*arguments)

        monkeypatch.setattr(os, name, note)

    noted("fsync")
    noted("rename")
    atomic.replace(tmp_path / "state", b"data")
    assert calls == ["fsync", "rename", "fsync"]


def test_a_crash_before_the_rename_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").write_bytes(b"old")

    def crash(*_: object) -> None:
        raise CrashError

    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(CrashError):
        atomic.replace(tmp_path / "state", b"new")
    assert (tmp_path / "state").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    atomic.replace(tmp_path / "state", b"more than three bytes")
    assert (tmp_path / "state").read_bytes() == b"more than three bytes"


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic.replace(tmp_path / "missing" / "state", b"data")


@in_own_mounts
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    small = make_tmpfs(tmp_path / "small", size="16k")
    atomic.replace(small / "state", b"old")
    with pytest.raises(OSError, match="No space left") as caught:
        atomic.replace(small / "state", bytes(1 << 20))
    assert caught.value.errno == errno.ENOSPC
    assert (small / "state").read_bytes() == b"old"
    assert [path.name for path in small.iterdir()] == ["state"]
