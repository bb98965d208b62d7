import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from harness.deadline import wait_until
from harness.leaks import count_descriptors
from harness.loop import on_loop
from harness.pods import Node, Pod
from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.config.model import NetworkModel
from kata_hybrid.errors import (
    FailedPreconditionError,
    InvalidStateError,
    ResourceExhaustedError,
    UnimplementedError,
)
from kata_hybrid.persist import netns
from kata_hybrid.resource.network import pod as pod_module
from kata_hybrid.resource.network.links import Link, read_links
from kata_hybrid.resource.network.loopback import Loopback, catch_loopback
from kata_hybrid.resource.network.pod import MAX_LINKS, Endpoint, PodNetwork
from kata_hybrid.types import GuestInterface, GuestNeighbor, GuestNetwork, GuestRoute


@contextlib.asynccontextmanager
async def made(
    namespace: Path | None, *, model: NetworkModel = NetworkModel.TC_FILTER
) -> AsyncIterator[PodNetwork]:
    reaper = ProcessReaper()
    network = PodNetwork(namespace, model=model, reaper=reaper)
    try:
        async with asyncio.timeout(30):
            yield network
    finally:
        await network.stop()
        reaper.close()


@on_loop
async def test_links_become_cards_and_what_the_guest_is_told(pod: Pod) -> None:
    pod.ip("route", "add", "192.0.2.0/24", "via", "10.88.0.9", "mtu", "1300")
    pod.ip("route", "add", "198.51.100.0/24", "dev", "eth0", "src", pod.address)
    pod.ip("route", "add", "blackhole", "203.0.113.0/24")
    pod.ip("route", "add", "192.0.3.0/24", "via", "169.254.1.1", "dev", "eth0", "onlink")
    pod.ip("route", "add", "10.77.0.0/16", "dev", "eth0", "table", "100")
    pod.ip("neighbor", "add", "10.88.0.99", "lladdr", "02:00:00:00:00:99", "dev", "eth0")
    pod.ip(
        *("neighbor", "add", "10.88.0.98", "lladdr", "02:00:00:00:00:98", "dev", "eth0"),
        *("nud", "stale"),
    )
    async with made(pod.path) as network:
        (card,) = await network.open()
        await network.wire()
        told = await network.described(device_paths=("17",))
        assert (card.id, card.mtu, len(card.tap_fds)) == ("eth0", 1450, 1)
        assert "mirred" in pod.tc("filter", "show", "dev", "eth0", "ingress")
        assert "mirred" in pod.tc("filter", "show", "dev", "tap0_kata", "ingress")
    assert pod.leftovers() == ""
    assert told.interfaces == (
        GuestInterface(
            name="eth0",
            mac=card.mac,
            mtu=1450,
            addresses=(f"{pod.address}/24", f"{pod.address6}/64"),
            device_path="17",
        ),
    )
    assert set(told.routes) == {
        GuestRoute(destination="", gateway=Node.ADDRESS, device="eth0"),
        GuestRoute(destination="", gateway=Node.ADDRESS6, device="eth0", is_ipv6=True),
        GuestRoute(destination="192.0.2.0/24", gateway="10.88.0.9", device="eth0", mtu=1300),
        GuestRoute(destination="192.0.3.0/24", gateway="169.254.1.1", device="eth0", flags=4),
        GuestRoute(
            destination="198.51.100.0/24",
            gateway="",
            device="eth0",
            source=pod.address,
            scope=253,
        ),
    }
    assert told.neighbors == (
        GuestNeighbor(address="10.88.0.99", device="eth0", mac="02:00:00:00:00:99", state=128),
    )


@on_loop
async def test_each_link_has_a_card(node: Node, pod: Pod) -> None:
    node.join(pod, "net1", "10.89.0.2/24")
    async with made(pod.path) as network:
        cards = await network.open()
        await network.wire()
        told = await network.described(device_paths=("17", "18"))
    assert [card.id for card in cards] == ["eth0", "net1"]
    assert [card.addresses for card in told.interfaces][1] == ("10.89.0.2/24",)
    assert pod.leftovers() == ""


@on_loop
async def test_what_is_to_be_undone_is_known_before_it_is_done(pod: Pod) -> None:
    async with made(pod.path) as network:
        assert network.hooks is None
        await network.open()
        hooks = network.hooks
        assert hooks is not None
        assert (hooks.namespace, hooks.links) == (os.fspath(pod.path), ("eth0",))
        with pod.path.open("rb") as file:
            assert hooks.identity == netns.identity(file.fileno())
        assert "ingress" not in pod.tc("qdisc", "show", "dev", "eth0")


@on_loop
async def test_a_link_may_be_left_to_others(pod: Pod) -> None:
    async with made(pod.path, model=NetworkModel.NONE) as network:
        await network.open()
        assert network.hooks is None
        await network.wire()
        told = await network.described(device_paths=("",))
        assert told.interfaces[0].addresses
        assert "ingress" not in pod.tc("qdisc", "show")
        assert "tap0_kata" in pod.links()
    assert pod.leftovers() == ""


@on_loop
async def test_without_a_namespace_there_is_nothing() -> None:
    async with made(None) as network:
        assert await network.open() == ()
        await network.wire()
        assert await network.described(device_paths=()) == GuestNetwork()
        assert network.hooks is None


@on_loop
async def test_a_namespace_without_links_is_no_error(pod: Pod) -> None:
    pod.ip("link", "delete", "eth0")
    async with made(pod.path) as network:
        assert await network.open() == ()
        await network.wire()
        assert await network.described(device_paths=()) == GuestNetwork()


@on_loop
async def test_a_path_that_is_no_namespace_is_named(tmp_path: Path) -> None:
    async with made(tmp_path / "gone") as network:
        with pytest.raises(FailedPreconditionError, match=r"/gone: No such file"):
            await network.open()
    (tmp_path / "file").touch()
    async with made(tmp_path / "file") as network:
        with pytest.raises(FailedPreconditionError, match=r"/file: Invalid argument"):
            await network.open()


@on_loop
async def test_a_link_that_vanishes_is_named_and_nothing_is_left(pod: Pod) -> None:
    async with made(pod.path) as network:
        await network.open()
        pod.ip("link", "set", "eth0", "name", "eth7")
        await network.wire()
        with pytest.raises(FailedPreconditionError, match="link eth0 is gone"):
            await network.described(device_paths=("",))
    assert pod.leftovers() == ""


@on_loop
async def test_a_tap_of_somebody_else_is_left_alone(pod: Pod) -> None:
    pod.ip("tuntap", "add", "dev", "tap0_kata", "mode", "tap", "multi_queue")
    async with made(pod.path) as network:
        with pytest.raises(FailedPreconditionError, match="tap0_kata: Invalid argument"):
            await network.open()
    assert "tap0_kata" in pod.links()


@on_loop
async def test_links_of_other_kinds_are_unimplemented(pod: Pod) -> None:
    pod.ip("tuntap", "add", "dev", "tun7", "mode", "tun")
    pod.ip("address", "add", "10.99.0.2/24", "dev", "tun7")
    async with made(pod.path) as network:
        with pytest.raises(UnimplementedError, match=r"link tun7 \(tun\) is not Ethernet"):
            await network.open()
    assert pod.leftovers() == ""


@on_loop
async def test_links_that_cannot_be_told_apart_are_unimplemented(node: Node, pod: Pod) -> None:
    node.join(pod, "net1", "10.89.0.2/24")
    mac = pod.ip("-o", "link", "show", "eth0").split("link/ether ")[1].split()[0]
    pod.ip("link", "set", "net1", "address", mac)
    async with made(pod.path) as network:
        with pytest.raises(UnimplementedError, match="links eth0 and net1 have the same hardware"):
            await network.open()


@on_loop
async def test_too_many_links_are_refused_before_anything_is_made(node: Node, pod: Pod) -> None:
    for number in range(MAX_LINKS):
        node.join(pod, f"net{number}", f"10.89.{number}.2/24")
    async with made(pod.path) as network:
        with pytest.raises(ResourceExhaustedError, match="9 links: a guest has at most 8"):
            await network.open()
    assert pod.leftovers() == ""


@on_loop
async def test_the_hosts_own_namespace_is_refused() -> None:
    async with made(Path("/proc/self/ns/net")) as network:
        with pytest.raises(FailedPreconditionError, match="the host's own"):
            await network.open()


@on_loop
async def test_the_preferred_of_several_routes_is_the_guests(node: Node, pod: Pod) -> None:
    node.join(pod, "net1", "10.89.0.2/24")
    pod.ip("route", "add", "default", "via", "10.89.0.1", "metric", "100")
    pod.ip("route", "add", "default", "via", "10.88.0.77", "metric", "50")
    async with made(pod.path) as network:
        await network.open()
        await network.wire()
        told = await network.described(device_paths=("", ""))
    defaults = [route for route in told.routes if not route.destination and not route.is_ipv6]
    assert [(route.gateway, route.device) for route in defaults] == [(Node.ADDRESS, "eth0")]


@on_loop
async def test_an_ipv4_address_of_the_link_is_the_guests(node: Node, pod: Pod) -> None:
    # As the VPC plugin of a large cloud has it: nobody makes these by himself.
    node.join(pod, "v4if0", "169.254.172.2/22")
    async with made(pod.path) as network:
        await network.open()
        await network.wire()
        told = await network.described(device_paths=("", ""))
    assert told.interfaces[1].addresses == ("169.254.172.2/22",)


@on_loop
async def test_filters_of_somebody_else_are_an_error_and_stay(pod: Pod) -> None:
    pod.tc("qdisc", "add", "dev", "eth0", "ingress")
    pod.add_filter("eth0", 5)
    async with made(pod.path) as network:
        await network.open()
        await network.wire()
        with pytest.raises(FailedPreconditionError, match="link eth0 has filters of somebody"):
            await network.described(device_paths=("",))
    assert "pref 5 " in pod.tc("filter", "show", "dev", "eth0", "ingress")


@pytest.mark.parametrize("priorities", [(), (netns.FILTER_PRIORITY,)])
@on_loop
async def test_what_a_sandbox_left_is_taken_over(pod: Pod, priorities: tuple[int, ...]) -> None:
    pod.tc("qdisc", "add", "dev", "eth0", "ingress")
    for priority in priorities:
        pod.add_filter("eth0", priority)
    async with made(pod.path) as network:
        await network.open()
        await network.wire()
        await network.described(device_paths=("",))
        filters = pod.tc("filter", "show", "dev", "eth0", "ingress")
        assert filters.count("match 00000000/00000000") == 1
        assert "Redirect to device tap0_kata" in filters
    assert pod.leftovers() == ""


@on_loop
async def test_taps_that_come_too_late_are_closed(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, done = threading.Event(), asyncio.Event()
    close_unwanted = pod_module._close_unwanted

    def read_late() -> tuple[Link, ...]:
        go.wait(30)
        return read_links()

    def close(opening: "asyncio.Future[tuple[Endpoint, ...]]") -> None:
        assert pod.leftovers() == "tap0_kata"
        close_unwanted(opening)
        done.set()

    monkeypatch.setattr(pod_module, "read_links", read_late)
    monkeypatch.setattr(pod_module, "_close_unwanted", close)
    monkeypatch.setattr(pod_module, "_SCAN_TIMEOUT_S", 0.05)
    async with made(pod.path) as network:
        with pytest.raises(FailedPreconditionError, match="could not be read in"):
            await network.open()
        await network.stop()
        go.set()
        await done.wait()
        assert pod.leftovers() == ""


@on_loop
async def test_it_is_stopped_at_any_time_and_only_opened_once(pod: Pod) -> None:
    async with made(pod.path) as network:
        await network.open()
        with pytest.raises(InvalidStateError):
            await network.open()
        await network.wire()
        # The program has hardly begun.
        await network.stop()
        assert pod.leftovers() == ""
        await network.stop()
        with pytest.raises(InvalidStateError):
            await network.open()


@on_loop
async def test_it_leaves_no_descriptor_open(pod: Pod) -> None:
    before = count_descriptors(os.getpid())
    async with made(pod.path) as network:
        inside = count_descriptors(os.getpid())
        await network.open()
        await network.wire()
        await network.described(device_paths=("",))
        await network.stop()
        assert count_descriptors(os.getpid()) == inside
    assert count_descriptors(os.getpid()) == before


@on_loop
async def test_the_loopback_is_caught_and_given_back(pod: Pod) -> None:
    pod.ip("link", "set", "lo", "up")
    async with made(pod.path) as network:
        await network.open()
        loopback = await network.catch_loopback()
        assert loopback is not None
        with contextlib.closing(loopback), pod.connect("127.0.0.1", 7) as client:
            connection, _ = await asyncio.get_running_loop().sock_accept(loopback.listener)
            with connection:
                assert connection.getpeername()[1] == client.getsockname()[1]
    async with made(None) as network:
        assert await network.catch_loopback() is None


@on_loop
async def test_a_loopback_that_is_given_up_is_closed(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = count_descriptors(os.getpid())
    go_on = threading.Event()

    def slow(namespace_fd: int) -> Loopback:
        assert go_on.wait(10)
        return catch_loopback(namespace_fd)

    monkeypatch.setattr(pod_module, "catch_loopback", slow)
    async with made(pod.path) as network:
        await network.open()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await network.catch_loopback()
    go_on.set()
    await asyncio.to_thread(
        wait_until,
        lambda: count_descriptors(os.getpid()) <= before,
        what="its end",
        timeout_s=10,
    )
