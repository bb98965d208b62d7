"""A pod's network between our values and the agent protocol's messages (``agent.proto``)."""

from typing import Final

from kata_hybrid.protos import agent_types_pb2
from kata_hybrid.types import GuestInterface, GuestNeighbor, GuestRoute

_IFF_NOARP: Final = 0x80


def interface_message(interface: GuestInterface) -> agent_types_pb2.Interface:
    """Return the message for a network card."""
    return agent_types_pb2.Interface(
        device=interface.name,
        name=interface.name,
        IPAddresses=[_address_message(text) for text in interface.addresses],
        mtu=interface.mtu,
        hwAddr=interface.mac,
        devicePath=interface.device_path,
        raw_flags=0 if interface.has_arp else _IFF_NOARP,
    )


def route_message(route: GuestRoute) -> agent_types_pb2.Route:
    """Return the message for a route."""
    return agent_types_pb2.Route(
        dest=route.destination,
        gateway=route.gateway,
        device=route.device,
        # Kata's agent takes an address alone for a network that routes are chosen by.
        source=f"{route.source}/0" if route.source else "",
        scope=route.scope,
        family=_family(is_ipv6=route.is_ipv6),
        flags=route.flags,
        mtu=route.mtu,
    )


def neighbor_message(neighbor: GuestNeighbor) -> agent_types_pb2.ARPNeighbor:
    """Return the message for a permanent neighbour."""
    return agent_types_pb2.ARPNeighbor(
        toIPAddress=_address_message(neighbor.address),
        device=neighbor.device,
        lladdr=neighbor.mac,
        state=neighbor.state,
        flags=neighbor.flags,
    )


def _address_message(text: str) -> agent_types_pb2.IPAddress:
    """Return an address, with the length of its prefix if it has one."""
    address, _, length = text.partition("/")
    return agent_types_pb2.IPAddress(
        family=_family(is_ipv6=":" in address), address=address, mask=length
    )


def _family(*, is_ipv6: bool) -> agent_types_pb2.IPFamily:
    return agent_types_pb2.v6 if is_ipv6 else agent_types_pb2.v4
