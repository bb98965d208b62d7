"""A root file system that is a disk image: the machine's disk, never mounted on the host."""

import pytest

from harness.containers import Containers
from harness.deadline import wait_until
from harness.leaks import mount_points

pytestmark = pytest.mark.containerd(since=2)

_OPTIONS = ("--snapshotter", "blockfile")


def test_the_root_is_the_image_as_a_disk(containers: Containers) -> None:
    seen = containers.run("grep", " / ", "/proc/mounts", options=_OPTIONS)
    device, point, kind, options, *_rest = seen.text.split()
    assert (point, kind) == ("/", "ext4")
    assert device.startswith("/dev/vd" if containers.is_virtual else "/dev/loop")
    assert "rw" in options.split(",")


def test_what_it_writes_is_in_the_image_when_it_runs_again(containers: Containers) -> None:
    script = "echo run >>/runs; sync; sleep 1000"
    with containers.detached("sh", "-c", script, options=(*_OPTIONS, "--null-io")) as name:
        ctr = containers.containerd.ctr
        wait_until(
            lambda: containers.exec(name, "cat", "/runs").text == "run", what="the first run's line"
        )
        root = containers.containerd.bundle(name) / "rootfs"
        assert (str(root) in mount_points()) is not containers.is_virtual
        ctr("t", "kill", "-s", "SIGKILL", name)
        wait_until(lambda: containers.task(name).status == "STOPPED", what="the task's end")
        ctr("t", "rm", name)
        ctr("t", "start", "--detach", "--null-io", name, timeout_s=containers.boot_timeout_s)
        wait_until(
            lambda: containers.exec(name, "cat", "/runs").text == "run\nrun",
            what="the second run's line after the first's",
        )
