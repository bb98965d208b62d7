"""Pods by way of containerd's Kubernetes part, with our runtime and with runc, in turn.

*Pod start*: sandbox and one container, from the first request until the container runs. Most of it
is the guest's kernel, so it is reported and not gated.

*Added container*: one more in a pod that runs: what a pod with sidecars waits for, and what each of
them costs the shim in memory.

*Network*: bytes from one pod to another over the node's bridge, against two network namespaces on
the same bridge. Where the guest's processor is emulated, so is its network stack: reported.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench_containers import read_memory
from pytest_benchmark.fixture import BenchmarkFixture
from recording import Recorder

from busybox_image import IMAGE_NAME, PAUSE_NAME
from go_build import CRICTL
from harness.containers import KATA_RUNTIME
from harness.cri import Cri, Pod, cri_containerd, node_namespace
from harness.daemon import CriSettings, containerd_installs
from harness.deadline import wait_until

BUILD = Path(__file__).resolve().parents[1] / "build"
_ROUNDS = 5
_ADDED = 8
_FOREVER = ("sleep", "100000")
_PORT = 7000
_MIB = 64
_RUNC = "io.containerd.runc.v2"


def _pods(runtime: str, bin_dir: Path) -> Iterator[Cri]:
    """A containerd whose pods are of one runtime, on a node of its own."""
    with (
        node_namespace(CRICTL) as node,
        cri_containerd(
            containerd_installs(BUILD)["1"],
            settings=CriSettings(runtime=runtime, pause_image=PAUSE_NAME, network=node),
            shim_dir=bin_dir,
            configuration=BUILD / "guest" / "configuration.toml",
            archive=BUILD / "images" / "busybox.tar",
        ) as daemon,
    ):
        cri = Cri(daemon, crictl=CRICTL, image=IMAGE_NAME)
        cri.wait_for_images(IMAGE_NAME, PAUSE_NAME)
        yield cri


@pytest.fixture(scope="session")
def kata_pods(bin_dir: Path) -> Iterator[Cri]:
    yield from _pods(KATA_RUNTIME, bin_dir)


@pytest.fixture(scope="session")
def runc_pods(bin_dir: Path) -> Iterator[Cri]:
    yield from _pods(_RUNC, bin_dir)


def _start_s(cri: Cri) -> float:
    began = time.perf_counter()
    with cri.pod() as pod:
        pod.start(*_FOREVER)
        return time.perf_counter() - began


def _added_s(pod: Pod) -> float:
    began = time.perf_counter()
    pod.start(*_FOREVER)
    return time.perf_counter() - began


@pytest.mark.timeout(280)
def test_pod_start(
    kata_pods: Cri, runc_pods: Cri, benchmark: BenchmarkFixture, recorder: Recorder
) -> None:
    theirs: list[float] = []
    ours: list[float] = []
    # pytest-benchmark's own time includes the pod's end; the record is its start.
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        lambda: ours.append(_start_s(kata_pods)),
        setup=lambda: theirs.append(_start_s(runc_pods)),
        rounds=_ROUNDS,
        warmup_rounds=1,
        iterations=1,
    )
    recorder.keep(
        "pod_start",
        ours=[seconds * 1e3 for seconds in ours[-_ROUNDS:]],
        reference=[seconds * 1e3 for seconds in theirs[-_ROUNDS:]],
    )


@pytest.mark.timeout(280)
def test_added_container(kata_pods: Cri, runc_pods: Cri, recorder: Recorder) -> None:
    with kata_pods.pod() as kata, runc_pods.pod() as runc:
        _added_s(kata)
        _added_s(runc)
        shim = _shim_pid(kata_pods)
        before = read_memory(shim).pss
        theirs, ours = zip(*((_added_s(runc), _added_s(kata)) for _ in range(_ADDED)), strict=True)
        after = read_memory(shim).pss
    recorder.keep(
        "added_container",
        ours=[seconds * 1e3 for seconds in ours],
        reference=[seconds * 1e3 for seconds in theirs],
    )
    recorder.keep("added_container_pss", ours=[(after - before) / _ADDED * 1024], reference=[1.0])


@pytest.mark.timeout(280)
def test_pod_network(kata_pods: Cri, runc_pods: Cri, recorder: Recorder) -> None:
    ours, theirs = ([_rate(cri) for _ in range(3)] for cri in (kata_pods, runc_pods))
    recorder.keep("pod_network", ours=ours, reference=theirs)


def _rate(cri: Cri) -> float:
    """MiB in a second from one pod to another."""
    with cri.pod() as receiver, cri.pod() as sender:
        # Its own end stays open, or the sender would take it for the end of everything.
        script = f"sleep 100000 | nc -l -p {_PORT} | wc -c >/count"
        target = receiver.start("sh", "-c", script)
        source = sender.start(*_FOREVER)
        listening = f"grep -qi ':{_PORT:X} ' /proc/net/tcp /proc/net/tcp6"
        wait_until(
            lambda: cri.attempt("exec", "--sync", target, "sh", "-c", listening).status == 0,
            what="somebody to listen",
        )
        send = (
            f"dd if=/dev/zero bs=1M count={_MIB} 2>/dev/null | nc {receiver.addresses[0]} {_PORT}"
        )
        began = time.perf_counter()
        cri.exec(source, "sh", "-c", send)
        took = time.perf_counter() - began
        wait_until(
            lambda: cri.exec(target, "cat", "/count").strip() == str(_MIB << 20),
            what="all that was sent",
            timeout_s=60,
        )
    return _MIB / took


def _shim_pid(cri: Cri) -> int:
    (folder,) = (cri.containerd.run_dir / "sb").iterdir()
    return int((folder / "shim.pid").read_text().split()[0])
