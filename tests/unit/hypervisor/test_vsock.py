import os
from pathlib import Path

import pytest

from kata_hybrid.errors import VmmError
from kata_hybrid.hypervisor.vsock import VHOST_VSOCK_DEVICE, open_kernel_vsock
from open_descriptors import open_descriptors


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(VmmError, match=r"absent.*No such file"):
        open_kernel_vsock(tmp_path / "absent")


def test_a_file_that_is_no_such_device_is_refused_and_closed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = open_descriptors()
    with pytest.raises(VmmError, match="guest CID"):
        open_kernel_vsock(tmp_path / "file")
    assert open_descriptors() == before


def test_two_guests_get_different_cids() -> None:
    if not os.access(VHOST_VSOCK_DEVICE, os.R_OK | os.W_OK):
        pytest.skip(f"{VHOST_VSOCK_DEVICE} is not usable here")
    one, two = open_kernel_vsock(), open_kernel_vsock()
    os.close(one.vhost_fd)
    os.close(two.vhost_fd)
    assert one.guest_cid != two.guest_cid
    assert min(one.guest_cid, two.guest_cid) >= 3
