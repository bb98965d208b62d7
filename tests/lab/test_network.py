"""A network card of a real guest, over a tap in a bridge: packets of any size, both ways, whole."""

import hashlib
import json
import socket
import subprocess
from collections.abc import Iterator

import pytest

from lab_guest.machine import Machine
from lab_guest.network import BRIDGE_ADDRESS, CARD, GUEST_ADDRESS, JUMBO_MTU, MAC
from lab_guest.streams import random_bytes

pytestmark = pytest.mark.timeout(180)

MTUS = (576, 1500, JUMBO_MTU)
HEADERS_BYTES = 28
"""Of IPv4 and ICMP."""
SENT = 4 << 20
ACCEPT_TIMEOUT_S = 30.0


@pytest.fixture
def online(guest: Machine) -> Machine:
    """The guest, with its card up and addressed."""
    guest.run(f"ip addr replace {GUEST_ADDRESS}/24 dev eth0 && ip link set eth0 up mtu 1500")
    return guest


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A listening socket on the host's side of the bridge."""
    with socket.create_server((BRIDGE_ADDRESS, 0)) as server:
        server.settimeout(ACCEPT_TIMEOUT_S)
        yield server


def test_the_card_is_as_it_was_described(online: Machine) -> None:
    assert online.run("cat /sys/class/net/eth0/address") == MAC.hex(":")
    assert online.run("cat /sys/class/net/eth0/carrier") == "1"
    assert f"maxmtu {JUMBO_MTU}" in online.run("ip -d link show eth0")


@pytest.mark.parametrize("mtu", MTUS)
def test_a_packet_of_the_largest_size_is_answered(online: Machine, mtu: int) -> None:
    online.run(f"ip link set eth0 mtu {mtu}")
    before = online.counters("net", CARD)
    said = online.run(f"busybox ping -c 3 -s {mtu - HEADERS_BYTES} {BRIDGE_ADDRESS}")
    assert "3 packets received" in said
    after = online.counters("net", CARD)
    for direction in ("tx", "rx"):
        assert after[f"{direction}_bytes"] - before[f"{direction}_bytes"] >= 3 * mtu


@pytest.mark.parametrize("mtu", MTUS)
@pytest.mark.parametrize("direction", [pytest.param("", id="up"), pytest.param("-R", id="down")])
def test_iperf(online: Machine, mtu: int, direction: str) -> None:
    online.run(f"ip link set eth0 mtu {mtu}")
    server = subprocess.Popen(
        ["iperf3", "--server", "--one-off", "--bind", BRIDGE_ADDRESS, "--forceflush"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        while "listening" not in server.stdout.readline():
            assert server.poll() is None, "iperf3 does not serve"
        # With a small window: what is under way when the sender is done is not counted.
        client = f"iperf3 --client {BRIDGE_ADDRESS} --bytes {SENT} --window 64K"
        said = online.run(f"{client} {direction} --json", timeout_s=90)
    finally:
        server.kill()
        server.communicate()
    end = json.loads(said)["end"]
    assert end["sum_received"]["bytes"] >= SENT * 0.9


@pytest.mark.parametrize("mtu", MTUS)
def test_what_the_guest_sends_is_the_same_here(
    online: Machine, listener: socket.socket, mtu: int
) -> None:
    online.run(f"ip link set eth0 mtu {mtu}")
    port = listener.getsockname()[1]
    online.run(f"head -c {SENT} /dev/urandom >/tmp/sent")
    sending = online.begin(
        f"busybox nc {BRIDGE_ADDRESS} {port} </tmp/sent >/dev/null && sha256sum </tmp/sent"
    )
    connection, _ = listener.accept()
    digest = hashlib.sha256()
    with connection:
        while data := connection.recv(1 << 16):
            digest.update(data)
    assert sending.wait(timeout_s=60).split()[0] == digest.hexdigest()


@pytest.mark.parametrize("mtu", MTUS)
def test_what_the_host_sends_is_the_same_there(
    online: Machine, listener: socket.socket, mtu: int
) -> None:
    online.run(f"ip link set eth0 mtu {mtu}")
    port = listener.getsockname()[1]
    data = random_bytes(SENT, seed=mtu)
    receiving = online.begin(f"busybox nc {BRIDGE_ADDRESS} {port} </dev/null | sha256sum")
    connection, _ = listener.accept()
    with connection:
        connection.sendall(data)
    assert receiving.wait(timeout_s=60).split()[0] == hashlib.sha256(data).hexdigest()
