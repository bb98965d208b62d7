"""A pod's network in its guest: addresses and routes, bytes both ways, and nothing left of it."""

import contextlib
import hashlib
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator

import pytest

from harness.containers import Containers
from harness.deadline import wait_until
from harness.pods import Node, Pod, known_upper_kinds

pytestmark = pytest.mark.newest

_MIB = 1 << 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "upper_kind" in metafunc.fixturenames:
        metafunc.parametrize("upper_kind", known_upper_kinds())


@pytest.fixture
def node() -> Iterator[Node]:
    with Node.made() as node:
        yield node


@pytest.fixture
def pod(node: Node) -> Iterator[Pod]:
    pod = node.pod()
    yield pod
    assert pod.leftovers() == ""


def test_the_guest_has_the_pods_addresses_and_routes(
    containers: Containers, node: Node, pod: Pod
) -> None:
    pod.ip("route", "add", "192.0.2.0/24", "via", "10.88.0.9", "mtu", "1300")
    pod.ip("route", "add", "198.51.100.7", "dev", "eth0")
    pod.ip("neighbor", "add", "10.88.0.99", "lladdr", "02:00:00:00:00:99", "dev", "eth0")
    mac = pod.ip("-o", "link", "show", "eth0").split("link/ether ")[1].split()[0]
    script = "ip -o link show eth0; ip -o addr show eth0; ip route; ip -6 route; ip neigh"
    seen = containers.run("sh", "-c", script, options=pod.options).text
    assert mac in seen
    assert "mtu 1500" in seen
    assert f"{pod.address}/24" in seen
    assert f"{pod.address6}/64" in seen
    assert f"default via {node.ADDRESS} dev eth0" in seen
    assert f"default via {node.ADDRESS6} dev eth0" in seen
    assert "192.0.2.0/24 via 10.88.0.9 dev eth0" in seen
    assert "198.51.100.7 dev eth0" in seen
    assert "10.88.0.99 dev eth0 lladdr 02:00:00:00:00:99" in seen


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_bytes_arrive_whole_both_ways(
    containers: Containers, node: Node, pod: Pod, family: str
) -> None:
    address = pod.address if family == "ipv4" else pod.address6
    script = "nc -l -p 5001 | sha256sum >/in; nc -l -p 5002 </in; sleep 1000"
    data = secrets.token_bytes(4 * _MIB)
    with containers.detached("sh", "-c", script, options=(*pod.options, "--null-io")):
        with _connected(node, address, 5001) as stream:
            stream.sendall(data)
        with _connected(node, address, 5002) as stream:
            said = b"".join(iter(lambda: stream.recv(4096), b""))
    assert said.split()[0].decode() == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("mtu", [1450, 9000])
def test_two_pods_talk_over_the_bridge(containers: Containers, node: Node, mtu: int) -> None:
    listener, speaker = node.pod(mtu=mtu), node.pod(mtu=mtu)
    options = (*listener.options, "--null-io")
    with containers.detached("nc", "-ll", "-p", "6001", "-e", "sha256sum", options=options):
        # As large as the link takes, whole: 28 bytes are the headers'.
        script = (
            f"ping -c 1 -w 20 -s {mtu - 28} {listener.address} >/dev/null || exit 1;"
            f"ping -6 -c 1 -w 20 -s {mtu - 48} {listener.address6} >/dev/null || exit 2;"
            "dd if=/dev/zero bs=1M count=1 2>/dev/null >/data;"
            f"nc {listener.address} 6001 </data && nc {listener.address6} 6001 </data"
        )
        said = containers.run("sh", "-c", script, options=speaker.options).text
    zeros = hashlib.sha256(bytes(_MIB)).hexdigest()
    assert said.splitlines() == [f"{zeros}  -"] * 2
    assert (listener.leftovers(), speaker.leftovers()) == ("", "")


def test_names_are_resolved_by_the_nodes_server(
    containers: Containers, node: Node, pod: Pod
) -> None:
    with node.datagrams(node.ADDRESS, 53) as server:
        answers = threading.Thread(target=_answer_queries, args=(server,), daemon=True)
        answers.start()
        said = containers.run("nslookup", "pod.test", node.ADDRESS, options=pod.options).text
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        answers.join(30)
    assert "Address: 203.0.113.7" in said


def test_each_link_of_a_pod_is_a_card_of_the_guests(
    containers: Containers, node: Node, pod: Pod
) -> None:
    node.join(pod, "net1", "10.89.0.2/24")
    seen = containers.run("ip", "-o", "addr", options=pod.options).text
    assert "eth0    inet 10.88.0.2/24" in seen
    assert "net1    inet 10.89.0.2/24" in seen


def test_of_two_default_routes_the_kernels_choice_is_the_guests(
    containers: Containers, node: Node, pod: Pod
) -> None:
    node.join(pod, "net1", "10.89.0.2/24")
    pod.ip("route", "add", "default", "via", "10.89.0.1", "dev", "net1", "metric", "200")
    pod.ip(
        "-6", "route", "add", "default", "via", "fd89::1", "dev", "net1", "metric", "2000", "onlink"
    )
    routes = containers.run("ip", "route", options=pod.options).text.splitlines()
    defaults = [line for line in routes if line.startswith("default")]
    assert defaults[0].startswith(f"default via {node.ADDRESS} dev eth0")


def test_links_of_other_kinds_carry_frames(
    containers: Containers, node: Node, pod: Pod, upper_kind: str
) -> None:
    node.join_upper(pod, "net1", upper_kind, address="10.90.0.2/24", peer="10.90.0.1/24")
    ping = ("ping", "-c", "1", "-w", "20", "10.90.0.1")
    assert "1 packets received" in containers.run(*ping, options=pod.options).text


def test_frames_pass_the_host_by(vm_containers: Containers, pod: Pod) -> None:
    with vm_containers.detached("sleep", "1000", options=(*pod.options, "--null-io")):
        assert "tap0_kata" in pod.links()
        assert "mirred" in pod.tc("filter", "show", "dev", "eth0", "ingress")
    assert pod.leftovers() == ""


def test_a_killed_shim_leaves_no_hook_on_the_pods_link(vm_containers: Containers, pod: Pod) -> None:
    with vm_containers.detached("sleep", "1000", options=(*pod.options, "--null-io")) as name:
        os.kill(vm_containers.shim_pid(name), signal.SIGKILL)
    wait_until(lambda: pod.leftovers() == "", what="a clean pod")


def test_a_namespace_that_is_gone_is_named(vm_containers: Containers, pod: Pod) -> None:
    missing = f"{pod.path}-gone"
    failed = vm_containers.attempt("true", options=("--with-ns", f"network:{missing}"))
    assert failed.status != 0
    assert f"network namespace {missing}: No such file or directory" in failed.error


def test_a_link_that_is_no_ethernet_is_named(vm_containers: Containers, pod: Pod) -> None:
    pod.ip("tuntap", "add", "dev", "tun7", "mode", "tun")
    pod.ip("address", "add", "10.99.0.2/24", "dev", "tun7")
    pod.ip("link", "set", "tun7", "up")
    failed = vm_containers.attempt("true", options=pod.options)
    assert failed.status != 0
    assert "link tun7 (tun) is not Ethernet" in failed.error


def _answer_queries(server: socket.socket) -> None:
    """Answer each question for an IPv4 address with one, and others with none (RFC 1035, 4.1)."""
    while True:
        try:
            query, client = server.recvfrom(512)
        except OSError:
            return
        question = query[12:]
        is_ipv4 = question.endswith(b"\0\1\0\1")
        head = query[:2] + b"\x85\x80\0\1" + bytes([0, is_ipv4]) + b"\0\0\0\0"
        # A pointer to the name, its type and class, a minute, and the address.
        answer = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\xcb\0\x71\7" if is_ipv4 else b""
        server.sendto(head + question + answer, client)


@contextlib.contextmanager
def _connected(node: Node, address: str, port: int) -> Iterator[socket.socket]:
    """Connect once somebody listens."""
    streams: list[socket.socket] = []

    def connect() -> bool:
        with contextlib.suppress(ConnectionError, TimeoutError):
            streams.append(node.connect(address, port))
        return bool(streams)

    wait_until(connect, what=f"a listener on port {port}", timeout_s=30)
    with streams[0] as stream:
        yield stream
