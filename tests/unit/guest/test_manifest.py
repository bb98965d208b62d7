from pathlib import Path

import pytest

from kata_hybrid.errors import InvalidArgumentError
from kata_hybrid.guest.manifest import (
    FileDigest,
    Manifest,
    digest_bytes,
    digest_file,
    read_manifest,
)

MANIFEST = Manifest(
    schema=1,
    builder_version="1",
    command="kata-hybrid guest build",
    kernel_version="6.1",
    kernel_source="linux-image",
    modules=("virtio",),
    inputs=(FileDigest(name="agent", size=1, sha256="aa"),),
    outputs=(),
)


def test_round_trip(tmp_path: Path) -> None:
    (tmp_path / "m").write_text(MANIFEST.to_json())
    assert read_manifest(tmp_path / "m") == MANIFEST


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 2}', "not json"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "m").write_text(text)
    with pytest.raises(InvalidArgumentError):
        read_manifest(tmp_path / "m")


def test_digest_of_a_file_and_of_its_bytes_agree(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"content")
    assert digest_file(tmp_path / "x") == digest_bytes("x", b"content")
