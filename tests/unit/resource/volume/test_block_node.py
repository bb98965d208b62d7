import os
import stat
from pathlib import Path

import pytest

from kata_hybrid.errors import InvalidSpecError
from kata_hybrid.resource.volume.block_node import host_device


def test_a_device_is_found_by_its_numbers() -> None:
    known = [path for path in Path("/sys/dev/block").iterdir() if not path.name.startswith("1:")]
    if not known:
        pytest.skip("this host has no block device")
    major, minor = map(int, known[0].name.split(":"))
    status = host_device(major, minor).stat()
    assert stat.S_ISBLK(status.st_mode)
    assert status.st_rdev == os.makedev(major, minor)


def test_one_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidSpecError, match="block device 4000:77 is not there on this host"):
        host_device(4000, 77)
