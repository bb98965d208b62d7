"""The links of the network namespace that the calling thread is in, by ioctls alone.

Enough to give the guest its cards before it boots: names, hardware addresses, MTUs, drivers. What
needs netlink (addresses, routes) is asked for while the guest boots, by another program
(``wiring.py``). Structures: linux/if.h, linux/ethtool.h; netdevice(7).
"""

import array
import errno
import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SIOCGIFCONF: Final = 0x8912
_SIOCGIFFLAGS: Final = 0x8913
_SIOCGIFMTU: Final = 0x8921
_SIOCGIFHWADDR: Final = 0x8927
_SIOCETHTOOL: Final = 0x8946
_ETHTOOL_GDRVINFO: Final = 3
_DRVINFO_BYTES: Final = 196
_DRIVER: Final = slice(4, 36)
_BUS: Final = slice(100, 132)
_REQUEST_BYTES: Final = 40
_NAME_BYTES: Final = 16
_IFF_LOOPBACK: Final = 0x8
_IFF_NOARP: Final = 0x80
_ARPHRD_ETHER: Final = 1
_PCI_PARTS: Final = 3
_IPV6_TABLE: Final = Path("/proc/thread-self/net/if_inet6")


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One link of a pod."""

    name: str
    mac: str
    mtu: int
    driver: str
    """As ethtool names it, such as ``veth``; empty if it does not say."""
    bus: str
    """Where the device is, a PCI address for hardware."""
    is_ethernet: bool
    has_arp: bool

    @property
    def is_physical(self) -> bool:
        """It is a PCI device."""
        return len(self.bus.split(":")) == _PCI_PARTS


def read_links() -> tuple[Link, ...]:
    """Return the links that have an address, without loopback, in the order of their numbers.

    A name that is no UTF-8 keeps its bytes as Python's file names do.

    Raises:
        OSError: the namespace cannot be read.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        fd = query.fileno()
        addressed = _names_with_ipv4(fd) | _names_with_ipv6()
        links = []
        for _, name in sorted(socket.if_nameindex()):
            if os.fsencode(name) not in addressed:
                continue
            try:
                link = _read_link(fd, name)
            except OSError as exc:
                if exc.errno != errno.ENODEV:
                    raise
                continue  # It went while we looked: then it is none of the pod's.
            if link is not None:
                links.append(link)
    return tuple(links)


def _read_link(fd: int, name: str) -> Link | None:
    (flags,) = struct.unpack_from("=H", _ask(fd, _SIOCGIFFLAGS, name), _NAME_BYTES)
    if flags & _IFF_LOOPBACK:
        return None
    (mtu,) = struct.unpack_from("=i", _ask(fd, _SIOCGIFMTU, name), _NAME_BYTES)
    hardware = _ask(fd, _SIOCGIFHWADDR, name)
    (kind,) = struct.unpack_from("=H", hardware, _NAME_BYTES)
    driver, bus = _driver(fd, name)
    return Link(
        name=name,
        mac=hardware[18:24].hex(":"),
        mtu=mtu,
        driver=driver,
        bus=bus,
        is_ethernet=kind == _ARPHRD_ETHER,
        has_arp=not flags & _IFF_NOARP,
    )


def _ask(fd: int, request: int, name: str) -> bytes:
    """Ask for something that fits into a ``struct ifreq``."""
    return fcntl.ioctl(fd, request, struct.pack("=16s24x", os.fsencode(name)))


def _names_with_ipv4(fd: int) -> set[bytes]:
    """Return the links that IPv4 addresses are of; an address may have a label, ``eth0:1``."""
    # As much as there is, for a table that may grow between the two calls.
    (size,) = struct.unpack_from("=i", fcntl.ioctl(fd, _SIOCGIFCONF, struct.pack("=i4xQ", 0, 0)))
    while True:
        room = size + 16 * _REQUEST_BYTES
        table = array.array("B", bytes(room))
        address, _ = table.buffer_info()
        answer = fcntl.ioctl(fd, _SIOCGIFCONF, struct.pack("=i4xQ", room, address))
        (size,) = struct.unpack_from("=i", answer)
        if size <= room - _REQUEST_BYTES:
            data = table.tobytes()[:size]
            names = (data[at : at + _NAME_BYTES] for at in range(0, size, _REQUEST_BYTES))
            return {name.partition(b"\0")[0].partition(b":")[0] for name in names}


def _names_with_ipv6() -> set[bytes]:
    try:
        table = _IPV6_TABLE.read_bytes()
    except FileNotFoundError:
        return set()  # a kernel without IPv6
    return {line.rpartition(b" ")[2] for line in table.split(b"\n") if line}


def _driver(fd: int, name: str) -> tuple[str, str]:
    """Return a link's driver and bus address, empty where it has none."""
    answer = array.array("B", struct.pack("=I", _ETHTOOL_GDRVINFO).ljust(_DRVINFO_BYTES, b"\0"))
    address, _ = answer.buffer_info()
    try:
        fcntl.ioctl(fd, _SIOCETHTOOL, struct.pack("=16sQ16x", os.fsencode(name), address))
    except OSError:
        return "", ""
    data = answer.tobytes()
    return _text(data[_DRIVER]), _text(data[_BUS])


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("ascii", "replace")
