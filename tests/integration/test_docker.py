"""What Docker does between create and start: it puts links into the task's network namespace.

``ctr run --cni`` does the same at the same time, in containerd's namespace of Docker's.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from busybox_image import IMAGE_NAME
from harness.containers import Containers
from harness.cri import GATEWAY, SUBNET, write_network
from harness.daemon import Containerd, ContainerdInstall, private_containerd

pytestmark = pytest.mark.newest

BUILD = Path(__file__).resolve().parents[2] / "build"
# Where ctr looks for plugins and networks; for it alone, so that nothing of the host's is changed.
_PLACES = """
    set -e
    mount -t tmpfs tmpfs /opt
    mkdir -p /opt/cni
    ln -s /usr/lib/cni /opt/cni/bin
    mount -t tmpfs tmpfs /etc
    mkdir -p /etc/cni
    cp -r "$0" /etc/cni/net.d
    exec "$@"
"""


@pytest.fixture(scope="module")
def containerd(
    install: ContainerdInstall, shim_dir: Path | None, configuration: Path
) -> Iterator[Containerd]:
    """A daemon whose containers are in the namespace that Docker uses."""
    if missing := install.missing():
        pytest.skip(f"no {missing}: run make setup")
    with private_containerd(
        install,
        namespace="moby",
        shim_dir=shim_dir,
        archive=BUILD / "images" / "busybox.tar",
        environment={"KATA_CONF_FILE": os.fspath(configuration)},
        prepare=write_network,
    ) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def containers(containerd: Containerd, runtime: str) -> Containers:
    return Containers(containerd, runtime=runtime, image=IMAGE_NAME, boot_timeout_s=90)


def run(containers: Containers, node: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a new container that is given a network before it is started."""
    daemon = containers.containerd
    name = containers.new_id()
    arguments = containers.run_arguments(name, command, ["--rm", "--cni"])
    try:
        return subprocess.run(
            [
                *("unshare", "--mount", "--", "sh", "-c", _PLACES, os.fspath(daemon.home / "cni")),
                *("nsenter", f"--net={node}", "--", *daemon.ctr_argv(*arguments)),
            ],
            env=daemon.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        containers.remove(name)


def test_a_link_that_comes_before_the_start_is_the_guests(
    containers: Containers, node: Path
) -> None:
    for _ in range(2):
        script = f"ip -o address show dev eth0 && ping -c1 -W5 {GATEWAY}"
        done = run(containers, node, "sh", "-c", script)
        assert done.returncode == 0, done
        assert f" {SUBNET.rpartition('.')[0]}." in done.stdout


def test_a_command_that_is_not_there_is_named_by_the_start(
    containers: Containers, node: Path
) -> None:
    done = run(containers, node, "/no/such/program")
    assert done.returncode != 0
    assert "no such file" in done.stderr.lower(), done.stderr


def test_exec_and_end_are_as_ever(containers: Containers) -> None:
    with containers.detached("sleep", "1000") as name:
        assert containers.exec(name, "echo", "hello").text == "hello"
        containers.containerd.ctr("t", "kill", "-s", "SIGKILL", name)
