"""Pods whose sandboxes the shim makes itself (containerd 2: ``sandboxer = "shim"``)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from busybox_image import IMAGE_NAME, PAUSE_NAME
from go_build import CRICTL
from harness.containers import KATA_RUNTIME
from harness.cri import GATEWAY, Cri, cri_containerd
from harness.daemon import Containerd, ContainerdInstall, CriSettings
from harness.deadline import wait_until
from harness.leaks import find_processes

BUILD = Path(__file__).resolve().parents[2] / "build"
_FOREVER = ("sleep", "100000")

pytestmark = pytest.mark.containerd(since=2)


@pytest.fixture(scope="module")
def containerd(
    install: ContainerdInstall,
    shim_dir: Path | None,
    configuration: Path,
    runtime: str,
    node: Path,
) -> Iterator[Containerd]:
    """A daemon that has the shim make sandboxes, which runc's cannot."""
    if runtime != KATA_RUNTIME:
        pytest.skip("needs a shim that makes sandboxes")
    with cri_containerd(
        install,
        settings=CriSettings(
            runtime=runtime,
            pause_image=PAUSE_NAME,
            network=node,
            sandboxer="shim",
            configuration=configuration,
        ),
        shim_dir=shim_dir,
        configuration=configuration,
        archive=BUILD / "images" / "busybox.tar",
    ) as daemon:
        Cri(daemon, crictl=CRICTL, image=IMAGE_NAME).wait_for_images(IMAGE_NAME, PAUSE_NAME)
        yield daemon


def test_a_pod_is_a_machine_without_a_pause_container(cri: Cri) -> None:
    dns = {"servers": ["10.96.0.10"], "searches": ["svc.test"], "options": ["ndots:5"]}
    with cri.pod(dns_config=dns) as pod:
        assert pod.is_ready()
        assert cri.containerd.ctr("t", "ls", "-q").text == ""
        one = pod.start("sh", "-c", "nc -ll -p 5000 -e echo hello", name="one")
        two = pod.start(*_FOREVER, name="two")
        resolver = cri.exec(one, "cat", "/etc/resolv.conf").splitlines()
        assert resolver == ["nameserver 10.96.0.10", "search svc.test", "options ndots:5"]
        shown = cri.exec(one, "ip", "-o", "addr", "show", "eth0")
        assert all(f" {address}/" in shown for address in pod.addresses)
        cri.exec(one, "ping", "-c", "1", "-w", "10", GATEWAY)
        wait_until(
            lambda: cri.attempt("exec", "--sync", two, "nc", "127.0.0.1", "5000").text == "hello",
            what="the other container's answer",
        )
        boots = {cri.exec(each, "cat", "/proc/sys/kernel/random/boot_id") for each in (one, two)}
        assert len(boots) == 1
        assert cri.exec(two, "hostname") == cri.exec(two, "cat", "/etc/hostname")
        assert cri.exec(two, "grep", "-c", "localhost", "/etc/hosts") == "2"


def test_a_pod_outlives_its_containers_and_takes_new_ones(cri: Cri) -> None:
    with cri.pod() as pod:
        for number in range(2):
            container = pod.start("sh", "-c", f"exit {number}", name=f"c{number}")
            wait_until(
                lambda: cri.state(container) == "CONTAINER_EXITED",  # noqa: B023 - called before the next
                what="its end",
            )
            assert cri.exit_status(container)[0] == number
            cri.run("rm", container)
        assert pod.is_ready()
        cri.exec(pod.start(*_FOREVER, name="last"), "true")


def test_a_pod_goes_with_its_containers_running(cri: Cri) -> None:
    with cri.pod() as pod:
        container = pod.start(*_FOREVER)
        cri.run("stopp", pod.id)
        assert not pod.is_ready()
        assert cri.state(container) == "CONTAINER_EXITED"
        cri.run("rmp", pod.id)
    wait_until(lambda: find_processes(cri.containerd) == [], what="its processes to be gone")


def test_a_pod_outlives_a_restart_of_containerd(cri: Cri) -> None:
    with cri.pod() as pod:
        container = pod.start(*_FOREVER)
        cri.restart()
        assert pod.is_ready()
        cri.exec(container, "true")
        cri.exec(pod.start(*_FOREVER, name="after"), "true")


def test_sysctls_are_the_pods(cri: Cri) -> None:
    sysctls = {"net.ipv4.ip_local_port_range": "40000 50000", "kernel.shm_rmid_forced": "1"}
    with cri.pod(linux={"sysctls": sysctls}) as pod:
        container = pod.start(*_FOREVER)
        for name, value in sysctls.items():
            assert cri.exec(container, "sysctl", "-n", name).split() == value.split()


def test_a_pods_limits_size_its_machine(cri: Cri) -> None:
    resources = {"memory_limit_in_bytes": 300 << 20}
    with cri.pod(linux={"resources": resources}) as pod:
        container = pod.start(*_FOREVER)
        words = cri.exec(container, "grep", "MemTotal", "/proc/meminfo").split()
        assert 300_000 < int(words[1]) < 450_000


def test_a_pod_whose_machine_is_lost_is_not_ready_and_can_be_removed(cri: Cri) -> None:
    privileged = {"security_context": {"privileged": True}}
    with cri.pod(linux=privileged) as pod:
        container = pod.start(*_FOREVER, linux=privileged)
        cri.attempt("exec", "--sync", container, "sh", "-c", "echo c >/proc/sysrq-trigger")
        wait_until(lambda: not pod.is_ready(), what="the loss to be noticed", timeout_s=30)
        wait_until(lambda: cri.state(container) == "CONTAINER_EXITED", what="the container's end")
