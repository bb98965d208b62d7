from kata_hybrid.agent.network import interface_message, neighbor_message, route_message
from kata_hybrid.protos import agent_types_pb2
from kata_hybrid.types import GuestInterface, GuestNeighbor, GuestRoute


def test_an_interface_keeps_its_prefixes_apart_by_family() -> None:
    interface = GuestInterface(
        name="eth0",
        mac="02:00:00:00:00:01",
        mtu=1450,
        addresses=("10.0.0.2/24", "fd00::2/64"),
        device_path="17",
    )
    message = interface_message(interface)
    assert (message.name, message.hwAddr, message.mtu) == ("eth0", "02:00:00:00:00:01", 1450)
    assert (message.device, message.devicePath, message.raw_flags) == ("eth0", "17", 0)
    assert [(entry.family, entry.address, entry.mask) for entry in message.IPAddresses] == [
        (agent_types_pb2.v4, "10.0.0.2", "24"),
        (agent_types_pb2.v6, "fd00::2", "64"),
    ]


def test_a_link_without_arp_says_so() -> None:
    interface = GuestInterface(name="i", mac="", mtu=1, addresses=(), has_arp=False)
    assert interface_message(interface).raw_flags == 0x80


def test_a_default_route_has_no_destination() -> None:
    message = route_message(
        GuestRoute(destination="", gateway="fe80::1", device="eth0", mtu=1300, is_ipv6=True)
    )
    assert (message.dest, message.gateway, message.device) == ("", "fe80::1", "eth0")
    assert (message.family, message.mtu) == (agent_types_pb2.v6, 1300)


def test_a_route_keeps_its_scope_flags_and_source() -> None:
    message = route_message(
        GuestRoute(
            destination="192.0.2.0/24",
            gateway="",
            device="eth0",
            source="10.0.0.2",
            scope=253,
            flags=4,
        )
    )
    assert (message.dest, message.source) == ("192.0.2.0/24", "10.0.0.2/0")
    assert (message.scope, message.flags, message.family) == (253, 4, agent_types_pb2.v4)


def test_a_neighbour_is_an_address_without_prefix() -> None:
    message = neighbor_message(
        GuestNeighbor(address="fd00::9", device="eth0", mac="02:00:00:00:00:09", state=128)
    )
    assert message.toIPAddress.address == "fd00::9"
    assert (message.toIPAddress.family, message.toIPAddress.mask) == (agent_types_pb2.v6, "")
    assert (message.device, message.lladdr, message.state) == ("eth0", "02:00:00:00:00:09", 128)
