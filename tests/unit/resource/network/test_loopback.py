"""The loopback of a pod's namespace, caught by one socket."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator

import pytest

from harness.leaks import count_descriptors
from harness.pods import Pod
from kata_hybrid.resource.network.loopback import Loopback, catch_loopback

_TIMEOUT_S = 10


@contextlib.contextmanager
def caught(pod: Pod) -> Iterator[Loopback]:
    def catch() -> Loopback:
        with pod.path.open("rb") as file:
            return catch_loopback(file.fileno())

    loopback = pod.inside(catch)
    loopback.listener.settimeout(_TIMEOUT_S)
    try:
        yield loopback
    finally:
        loopback.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1"])
@pytest.mark.parametrize("port", [1, 80, 65535])
def test_any_port_of_the_loopback_is_caught(pod: Pod, address: str, port: int) -> None:
    pod.ip("link", "set", "lo", "up")
    with caught(pod) as loopback, pod.connect(address, port) as client:
        connection, _ = loopback.listener.accept()
        with connection:
            assert connection.getsockname()[1] == port
            client.sendall(b"x")
            assert connection.recv(2) == b"x"


def test_other_addresses_of_the_pod_are_not(pod: Pod) -> None:
    pod.ip("link", "set", "lo", "up")
    with caught(pod), pytest.raises(ConnectionRefusedError):
        pod.connect(pod.address, 80)


def test_what_listens_there_gets_its_own_again_when_it_is_closed(pod: Pod) -> None:
    pod.ip("link", "set", "lo", "up")

    def listen() -> socket.socket:
        return socket.create_server(("127.0.0.1", 80))

    with pod.inside(listen) as listener:
        listener.settimeout(_TIMEOUT_S)
        with caught(pod) as loopback, pod.connect("127.0.0.1", 80):
            loopback.listener.accept()[0].close()
        with pod.connect("127.0.0.1", 80):
            listener.accept()[0].close()
    with pytest.raises(ConnectionRefusedError):
        pod.connect("127.0.0.1", 80)


def test_what_is_no_namespace_is_refused(pod: Pod) -> None:
    def catch() -> None:
        with open("/dev/null", "rb") as file:  # noqa: PTH123
            catch_loopback(file.fileno())

    before = count_descriptors(os.getpid())
    with pytest.raises(OSError, match="Invalid") as refused:
        pod.inside(catch)
    assert refused.value.errno == errno.EINVAL
    assert count_descriptors(os.getpid()) == before
