"""The host's side of a guest's network card: a bridge with an address, and a tap in it."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

BRIDGE = "kh-lab"
TAP = "kh-lab-tap"
CARD = "card"
MAC = bytes.fromhex("02004b480001")
BRIDGE_ADDRESS = "10.113.71.1"
GUEST_ADDRESS = "10.113.71.2"
JUMBO_MTU = 9000


@contextmanager
def bridged_tap() -> Iterator[str]:
    """Make both, and give the tap's name; they are gone afterwards."""
    _ip("link", "add", BRIDGE, "type", "bridge")
    try:
        _ip("tuntap", "add", TAP, "mode", "tap", "vnet_hdr")
        _ip("link", "set", TAP, "master", BRIDGE, "mtu", str(JUMBO_MTU), "up")
        _ip("addr", "add", f"{BRIDGE_ADDRESS}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "mtu", str(JUMBO_MTU), "up")
        yield TAP
    finally:
        # A tap outlives its bridge.
        subprocess.run(["ip", "link", "del", TAP], check=False, timeout=30)
        _ip("link", "del", BRIDGE)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=30)
