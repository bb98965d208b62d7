"""A program: steer a pod's links to taps and say what a guest has to know of them.

    python -I wiring.py NAMESPACE-FD PRIORITY [LINK:TAP]...

Enters the namespace, redirects what arrives on each link to its tap and the other way round (for a
``LINK:`` without a tap it does not) by filters of this priority, and prints one JSON object:
``addresses`` by link, ``routes``, ``neighbors``, in the fields of ``types.GuestRoute`` and
``types.GuestNeighbor``. Any failure is one line on standard error and status 1.

A process of its own since the library takes a quarter of a second and 13 MiB to load: here it does
so beside the guest's boot, and is gone after it. Imports nothing of the package.
"""

import errno
import ipaddress
import json
import os
import socket
import sys
import time
from typing import Any, Final

from pyroute2.iproute.linux import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netns import setns

_INGRESS_PARENT: Final = 0xFFFF0000
_ALL_PROTOCOLS: Final = 0x0003
_EVERYTHING: Final = ["0x0/0x0+0"]
_MAIN_TABLE: Final = 254
_PROTOCOL_KERNEL: Final = 2
_UNICAST: Final = 1
_PERMANENT: Final = 0x80
_NEXT_HOP_ON_LINK: Final = 4
_BUSY_TRIES: Final = 5
_BUSY_PAUSE_S: Final = 0.01


class WiringError(Exception):
    """Something cannot be done; the text says what and why."""


def main(words: list[str]) -> int:
    """Do it; return the exit status."""
    namespace, priority, *pairs = words
    taps = dict(pair.split(":", 1) for pair in pairs)
    try:
        setns(int(namespace))
        with IPRoute() as netlink:  # type: ignore[no-untyped-call]
            for link, tap in taps.items():
                if tap:
                    _redirect(netlink, link, tap, priority=int(priority))
                    _redirect(netlink, tap, link, priority=int(priority))
            sys.stdout.write(json.dumps(_describe(netlink, set(taps))) + "\n")
    except NetlinkError as error:
        sys.stderr.write(f"read addresses and routes: {os.strerror(error.code)}\n")
        return 1
    except (OSError, WiringError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _redirect(netlink: Any, source: str, target: str, *, priority: int) -> None:
    """Send whatever arrives on one link out through another.

    Raises:
        WiringError: one is gone, the first has somebody else's filters, or the kernel refuses.
    """
    source_index, target_index = _index(source), _index(target)
    try:
        if not _add_ingress(netlink, source_index):
            _clear_ingress(netlink, source, source_index, priority=priority)
        _add_redirect(netlink, source_index, target_index, priority=priority)
    except NetlinkError as error:
        message = f"redirect {source} to {target}: {os.strerror(error.code)}"
        raise WiringError(message) from error


def _add_ingress(netlink: Any, index: int) -> bool:
    """Return whether it is new."""
    for attempt in range(1, _BUSY_TRIES + 1):
        try:
            netlink.tc("add", "ingress", index)
            break
        except NetlinkError as error:
            if error.code == errno.EEXIST:
                return False
            if error.code != errno.EBUSY or attempt == _BUSY_TRIES:
                raise
            # Somebody else is at it, a plugin of the pod's network perhaps.
            time.sleep(_BUSY_PAUSE_S * attempt)
    return True


def _clear_ingress(netlink: Any, link: str, index: int, *, priority: int) -> None:
    """Take what a sandbox left that could not clean up; leave what is somebody else's.

    Raises:
        WiringError: there are other filters, which would see frames before us or not at all.
    """
    filters = netlink.get_filters(index=index, parent=_INGRESS_PARENT)
    priorities = {entry["info"] >> 16 for entry in filters}
    if priorities - {priority}:
        message = f"link {link} has filters of somebody else's at its ingress"
        raise WiringError(message)
    if priorities:
        arguments = {"parent": _INGRESS_PARENT, "protocol": _ALL_PROTOCOLS, "prio": priority}
        netlink.tc("del-filter", None, index, **arguments)


def _add_redirect(netlink: Any, source: int, target: int, *, priority: int) -> None:
    redirect = {
        "kind": "mirred",
        "direction": "egress",
        "action": "redirect",
        "ifindex": target,
    }
    netlink.tc(
        "add-filter",
        "u32",
        source,
        parent=_INGRESS_PARENT,
        protocol=_ALL_PROTOCOLS,
        prio=priority,
        target=0x10000,
        keys=_EVERYTHING,
        action=redirect,
    )


def _index(link: str) -> int:
    try:
        return socket.if_nametoindex(link)
    except OSError as error:
        message = f"link {link} is gone"
        raise WiringError(message) from error


def _describe(netlink: Any, links: set[str]) -> dict[str, Any]:
    names = {_index(link): link for link in links}
    addresses: dict[str, list[str]] = {link: [] for link in links}
    for entry in netlink.get_addr():
        address = entry.get_attr("IFA_LOCAL") or entry.get_attr("IFA_ADDRESS")
        # The guest's kernel makes its own of IPv6's.
        if entry["index"] in names and not _is_made_by_the_kernel(address):
            addresses[names[entry["index"]]].append(f"{address}/{entry['prefixlen']}")
    return {
        "addresses": addresses,
        "routes": _routes(netlink, names),
        "neighbors": [
            {
                "address": entry.get_attr("NDA_DST"),
                "device": names[entry["ifindex"]],
                "mac": entry.get_attr("NDA_LLADDR"),
                "state": entry["state"],
                "flags": entry["flags"],
            }
            for entry in netlink.get_neighbours()
            if entry["ifindex"] in names
            and entry["state"] & _PERMANENT
            and entry.get_attr("NDA_LLADDR")
        ],
    }


def _is_made_by_the_kernel(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return isinstance(parsed, ipaddress.IPv6Address) and parsed.is_link_local


def _routes(netlink: Any, names: dict[int, str]) -> list[dict[str, Any]]:
    """Return the routes through the links; of several to one destination the preferred one.

    The agent's protocol has no metric.
    """
    chosen: dict[tuple[bool, str], tuple[int, dict[str, Any]]] = {}
    for entry in netlink.get_routes():
        route = _route(entry, names)
        if route is None:
            continue
        metric = entry.get_attr("RTA_PRIORITY") or 0
        key = (route["is_ipv6"], route["destination"])
        if key not in chosen or metric < chosen[key][0]:
            chosen[key] = (metric, route)
    return [route for _, route in chosen.values()]


def _route(entry: Any, names: dict[int, str]) -> dict[str, Any] | None:
    """Return a route that somebody set, through one of the links; else nothing."""
    is_wanted = (
        entry["table"] == _MAIN_TABLE
        and entry["type"] == _UNICAST
        and entry["proto"] != _PROTOCOL_KERNEL
        and entry.get_attr("RTA_OIF") in names
    )
    if not is_wanted:
        return None
    destination = entry.get_attr("RTA_DST")
    metrics = entry.get_attr("RTA_METRICS")
    return {
        "destination": f"{destination}/{entry['dst_len']}" if destination else "",
        "gateway": entry.get_attr("RTA_GATEWAY") or "",
        "device": names[entry.get_attr("RTA_OIF")],
        "source": entry.get_attr("RTA_PREFSRC") or "",
        "scope": entry["scope"],
        # What the kernel has to say of the next hop's state is no business of a new route's.
        "flags": entry["flags"] & _NEXT_HOP_ON_LINK,
        "mtu": (metrics.get_attr("RTAX_MTU") if metrics else None) or 0,
        "is_ipv6": entry["family"] == socket.AF_INET6,
    }


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    # Not by way of the library's threads.
    os._exit(status)
