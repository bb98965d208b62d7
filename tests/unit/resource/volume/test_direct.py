import base64
import json
from pathlib import Path
from typing import Any

import pytest

from kata_hybrid.errors import InvalidSpecError, UnimplementedError
from kata_hybrid.resource.volume.direct import direct_volume
from kata_hybrid.types import GuestDisk, GuestStorage

SOURCE = "/var/lib/kubelet/pods/p/volumes/kubernetes.io~csi/v/mount"
NAME = base64.urlsafe_b64encode(SOURCE.encode()).decode()
VOLUME = {
    "volume-type": "directvol",
    "device": "/dev/sdx",
    "fstype": "ext4",
    "metadata": {},
    "options": ["rw", "noatime"],
}


def write(folder: Path, text: str) -> None:
    (folder / NAME).mkdir()
    (folder / NAME / "mountInfo.json").write_text(text)


def test_a_path_that_nobody_described_is_none(tmp_path: Path) -> None:
    assert direct_volume(SOURCE, folder=tmp_path) is None
    assert direct_volume("/" + "x" * 4000, folder=tmp_path) is None
    assert direct_volume(SOURCE, folder=tmp_path / "absent") is None


@pytest.mark.parametrize("source", [SOURCE, f"{SOURCE}/", SOURCE.replace("/v/", "/v/./")])
def test_one_that_is_described_is_a_disk_mounted_in_the_guest(source: str, tmp_path: Path) -> None:
    write(tmp_path, json.dumps(VOLUME))
    volume = direct_volume(source, folder=tmp_path)
    assert volume is not None
    assert (volume.device, volume.is_read_only) == (Path("/dev/sdx"), False)
    assert volume.storage(GuestDisk(driver="blk", source="07/01")) == GuestStorage(
        driver="blk",
        source="07/01",
        fstype="ext4",
        options=("rw", "noatime"),
        mount_point=f"/run/kata-containers/sandbox/storage/{NAME}",
    )


def test_its_group_and_its_options_are_passed_on(tmp_path: Path) -> None:
    metadata = {"fsGroup": "2000", "fsGroupChangePolicy": "OnRootMismatch"}
    document = {**VOLUME, "fstype": "xfs", "options": ["ro"], "metadata": metadata}
    write(tmp_path, json.dumps(document))
    volume = direct_volume(SOURCE, folder=tmp_path)
    assert volume is not None
    assert volume.is_read_only
    storage = volume.storage(GuestDisk(driver="mmioblk", source="/dev/vdb"))
    assert storage.options == ("ro", "nouuid")
    assert (storage.group_id, storage.is_group_kept_if_right) == (2000, True)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"device": ""}, "device must be a text"),
        ({"device": "/dev/\0"}, "device must be a text"),
        ({"fstype": None}, "fstype must be a text"),
        ({"options": "ro"}, "options must be a list of texts"),
        ({"options": [1]}, "options must be a list of texts"),
        ({"metadata": []}, None),
        ({"metadata": [1]}, "metadata must be an object"),
        ({"metadata": {"fsGroup": "-1"}}, "fsGroup must be a group's number, is '-1'"),
        ({"metadata": {"fsGroup": 2**32}}, "fsGroup must be a group's number"),
        ({"metadata": {"fsGroupChangePolicy": "Never"}}, "Always or OnRootMismatch, is 'Never'"),
    ],
)
def test_a_wrong_field_is_named(
    change: dict[str, Any], problem: str | None, tmp_path: Path
) -> None:
    write(tmp_path, json.dumps({**VOLUME, **change}))
    if problem is None:
        assert direct_volume(SOURCE, folder=tmp_path) is not None
        return
    with pytest.raises(InvalidSpecError, match=problem) as failure:
        direct_volume(SOURCE, folder=tmp_path)
    assert str(tmp_path / NAME / "mountInfo.json") in str(failure.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '"x"', " " * (1 << 20) + "{}"])
def test_what_is_no_description_is_an_error(text: str, tmp_path: Path) -> None:
    write(tmp_path, text)
    with pytest.raises(InvalidSpecError, match="direct volume"):
        direct_volume(SOURCE, folder=tmp_path)


def test_a_description_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    path = tmp_path / NAME / "mountInfo.json"
    path.symlink_to(path)
    with pytest.raises(InvalidSpecError, match=r"mountInfo\.json: Too many levels"):
        direct_volume(SOURCE, folder=tmp_path)


@pytest.mark.parametrize("kind", ["vfiovol", "spdkvol", "directVol"])
def test_other_kinds_are_unimplemented(kind: str, tmp_path: Path) -> None:
    write(tmp_path, json.dumps({**VOLUME, "volume-type": kind}))
    with pytest.raises(UnimplementedError, match=f"volume-type '{kind}'"):
        direct_volume(SOURCE, folder=tmp_path)
