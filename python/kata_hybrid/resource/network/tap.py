"""A tap in the network namespace that the calling thread is in: the host's end of a guest's card.

Not persistent: it goes when its last descriptor is closed, however that comes about.
"""

import contextlib
import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import Final

_CLONE_DEVICE: Final = "/dev/net/tun"
# linux/if_tun.h, linux/sockios.h, linux/if.h
_TUNSETIFF: Final = 0x400454CA
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFMTU: Final = 0x8922
_IFF_UP: Final = 0x1


def open_tap(name: str, *, mtu: int) -> int:
    """Make a tap with one queue, bring it up, and return its descriptor, which is the caller's.

    Raises:
        OSError: the host has no taps, forbids them, or has one of this name in use; the file name
            is the tap's, or the device's that is missing.
    """
    fd = os.open(_CLONE_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _set_up(fd, name, mtu=mtu)
    except BaseException as exc:
        os.close(fd)
        if isinstance(exc, OSError):
            raise OSError(exc.errno, os.strerror(exc.errno or 0), name) from exc
        raise
    return fd


def _set_up(fd: int, name: str, *, mtu: int) -> None:
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("=16sH22x", name.encode(), flags))
    # Frames pass through it; it is nobody's address, and says nothing of its own.
    with contextlib.suppress(OSError):
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        request = struct.pack("=16si20x", name.encode(), mtu)
        fcntl.ioctl(query.fileno(), _SIOCSIFMTU, request)
        request = struct.pack("=16s24x", name.encode())
        answer = fcntl.ioctl(query.fileno(), _SIOCGIFFLAGS, request)
        (flags,) = struct.unpack_from("=H", answer, 16)
        request = struct.pack("=16sH22x", name.encode(), flags | _IFF_UP)
        fcntl.ioctl(query.fileno(), _SIOCSIFFLAGS, request)
