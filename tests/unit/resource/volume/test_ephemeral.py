"""Volumes in memory are recognised by where they are and what is mounted there."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kata_hybrid.persist import mounts
from kata_hybrid.resource.volume.ephemeral import ephemeral_storage

Volume = Callable[..., str]


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Volume:
    """Make a folder for a volume, and have mountinfo say what is mounted on it."""

    def make(*lines: str, folder: str = "kubernetes.io~empty-dir", name: str = "cache") -> str:
        path = tmp_path / folder / name
        path.mkdir(parents=True)
        escaped = str(path).replace(" ", "\\040")
        table = "".join(f"{line}\n".replace("HERE", escaped) for line in lines).encode()
        monkeypatch.setattr(mounts, "_read_table", lambda: table)
        return str(path)

    return make


_ROOT = "22 1 8:1 / / rw - ext4 /dev/sda1 rw"
_TMPFS = "90 22 0:50 / HERE rw,relatime shared:9 - tmpfs tmpfs rw,size=8192k,inode64"


def test_a_tmpfs_becomes_one_of_the_guests_with_its_size(volume: Volume) -> None:
    storage = ephemeral_storage(volume(_ROOT, _TMPFS))
    assert storage is not None
    assert (storage.driver, storage.fstype) == ("ephemeral", "tmpfs")
    assert storage.mount_point == "/run/kata-containers/sandbox/ephemeral/cache"
    assert storage.options == ("size=8192k", "nodev", "mode=755")
    assert storage.is_shared


def test_the_group_of_the_volume_goes_along(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = volume(_TMPFS)
    status = Path(source).stat()
    fields = [*status]
    fields[0] = 0o42777
    fields[5] = 2000
    changed = type(status)(fields)
    monkeypatch.setattr(Path, "stat", lambda _path: changed)
    storage = ephemeral_storage(source)
    assert storage is not None
    assert storage.options == ("size=8192k", "nodev", "mode=2777", "fsgid=2000")


@pytest.mark.parametrize("name", ["a b", "dépôt"])
def test_any_name_is_found(volume: Volume, name: str) -> None:
    storage = ephemeral_storage(volume(_TMPFS, name=name))
    assert storage is not None
    assert storage.mount_point.endswith(f"/{name}")


def test_a_mount_of_nothing_is_no_obstacle(volume: Volume) -> None:
    assert ephemeral_storage(volume("80 22 0:9 / HERE rw - tmpfs  rw,size=1k")) is not None


@pytest.mark.parametrize(
    "lines",
    [
        [_ROOT],
        ["90 22 8:2 / HERE rw - ext4 /dev/sdb rw"],
        [_TMPFS, "91 90 8:2 / HERE rw - ext4 /dev/sdb rw"],
        ["90 22 0:50 / HERE/below rw - tmpfs tmpfs rw,size=1k"],
        ["90 22 0:51 / HERE rw - hugetlbfs nodev rw,pagesize=2M"],
    ],
)
def test_what_is_no_tmpfs_is_shared(volume: Volume, lines: list[str]) -> None:
    assert ephemeral_storage(volume(*lines)) is None


def test_a_tmpfs_elsewhere_is_shared(volume: Volume) -> None:
    assert ephemeral_storage(volume(_TMPFS, folder="kubernetes.io~secret")) is None
