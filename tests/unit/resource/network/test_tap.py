import errno
import os

import pytest

from harness.leaks import count_descriptors
from harness.pods import Pod
from kata_hybrid.resource.network.tap import open_tap


def test_a_tap_is_up_and_goes_with_its_descriptor(pod: Pod) -> None:
    fd = pod.inside(lambda: open_tap("tap0_kata", mtu=1300))
    try:
        shown = pod.ip("-o", "link", "show", "tap0_kata")
        assert "mtu 1300" in shown
        assert ",UP" in shown
        assert "inet6" not in pod.ip("-o", "address", "show", "tap0_kata")
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)
    assert "tap0_kata" not in pod.links()


def test_a_name_in_use_is_refused_and_nothing_is_left_open(pod: Pod) -> None:
    fd = pod.inside(lambda: open_tap("tap0_kata", mtu=1500))
    before = count_descriptors(os.getpid())
    try:
        with pytest.raises(OSError, match=r"busy: 'tap0_kata'") as caught:
            pod.inside(lambda: open_tap("tap0_kata", mtu=1500))
        assert caught.value.errno == errno.EBUSY
        assert count_descriptors(os.getpid()) == before
    finally:
        os.close(fd)


def test_an_mtu_that_cannot_be_is_refused(pod: Pod) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        pod.inside(lambda: open_tap("tap0_kata", mtu=1))
    assert "tap0_kata" not in pod.links()
