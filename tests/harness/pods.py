"""Networks for pods: a node with a bridge, and namespaces joined to it as CNI plugins leave them.

The node is a namespace too, so nothing of it is the host's. Each pod has ``eth0`` with an address
of either family and default routes by way of the node.
"""

import contextlib
import os
import secrets
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from kata_hybrid.persist import netns

_T = TypeVar("_T")
_RUN = Path("/run/netns")
_TIMEOUT_S = 30.0
_UPPER_KINDS = {"macvlan": ("mode", "bridge"), "ipvlan": ("mode", "l2"), "vlan": ("id", "7")}
"""Links that stand on another one, with the options that they take."""


class Namespace:
    """A named network namespace."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = _RUN / name

    def ip(self, *words: str) -> str:
        """Return what the program prints when it is run inside."""
        return run("ip", "-n", self.name, *words)

    def tc(self, *words: str) -> str:
        """Return what the program prints when it is run inside."""
        return run("tc", "-n", self.name, *words)

    def links(self) -> list[str]:
        """Return the names of its links."""
        lines = self.ip("-o", "link", "show").splitlines()
        return [line.split(": ")[1].partition("@")[0] for line in lines]

    def inside(self, work: Callable[[], _T]) -> _T:
        """Run ``work`` on a thread that is in it."""
        results: list[_T] = []
        errors: list[BaseException] = []

        def enter_and_work() -> None:
            try:
                with self.path.open("rb") as file:
                    netns.enter(file.fileno())
                results.append(work())
            except BaseException as error:  # noqa: BLE001 - raised again by who asked
                errors.append(error)

        thread = threading.Thread(target=enter_and_work)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def connect(self, address: str, port: int) -> socket.socket:
        """Connect from it."""
        return self.inside(lambda: socket.create_connection((address, port), timeout=_TIMEOUT_S))

    def datagrams(self, address: str, port: int) -> socket.socket:
        """Return a socket for datagrams, bound in it."""

        def bind() -> socket.socket:
            bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            bound.settimeout(_TIMEOUT_S)
            bound.bind((address, port))
            return bound

        return self.inside(bind)


class Pod(Namespace):
    """A namespace with a link to the node's bridge."""

    def __init__(self, name: str, *, number: int, mtu: int) -> None:
        super().__init__(name)
        self.mtu = mtu
        self.address = f"10.88.0.{number}"
        self.address6 = f"fd88::{number}"

    @property
    def options(self) -> tuple[str, ...]:
        """Options of ``ctr run`` that put a container into it."""
        return ("--with-ns", f"network:{self.path}")

    def add_filter(self, link: str, priority: int) -> None:
        """Add a filter that takes everything to a link's ingress, which exists."""
        place = ("dev", link, "parent", "ffff:", "protocol", "all", "prio", str(priority))
        self.tc("filter", "add", *place, "u32", "match", "u32", "0", "0", "flowid", "1:1")

    def leftovers(self) -> str:
        """Say what a sandbox left in it; nothing if all is as it was."""
        disciplines = [line for line in self.tc("qdisc", "show").splitlines() if "ingress" in line]
        taps = [name for name in self.links() if name.endswith("_kata")]
        return "\n".join([*disciplines, *taps])


class Node(Namespace):
    """A namespace with a bridge, to which pods are joined."""

    ADDRESS = "10.88.0.1"
    ADDRESS6 = "fd88::1"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._pods = contextlib.ExitStack()
        self._count = 1

    @classmethod
    @contextlib.contextmanager
    def made(cls) -> Iterator["Node"]:
        """Make one; it goes at the end, and its pods with it."""
        node = cls(f"kh-{secrets.token_hex(3)}")
        with _namespace(node.name), node._pods:
            node.ip("link", "add", "bridge", "mtu", "9000", "type", "bridge")
            node.ip("address", "add", f"{cls.ADDRESS}/24", "dev", "bridge")
            node.ip("address", "add", f"{cls.ADDRESS6}/64", "dev", "bridge", "nodad")
            node.ip("link", "set", "bridge", "up")
            yield node

    def pod(self, *, mtu: int = 1500) -> Pod:
        """Join a new namespace to the bridge."""
        self._count += 1
        pod = Pod(f"{self.name}-{self._count}", number=self._count, mtu=mtu)
        self._pods.enter_context(_namespace(pod.name))
        pod.ip("link", "set", "lo", "up")
        self.join(pod, "eth0", f"{pod.address}/24", f"{pod.address6}/64")
        pod.ip("route", "add", "default", "via", self.ADDRESS)
        pod.ip("route", "add", "default", "via", self.ADDRESS6)
        return pod

    def join(self, pod: Pod, name: str, *addresses: str) -> None:
        """Give a pod one more link."""
        ours = f"v{secrets.token_hex(4)}"
        peer = ("peer", "name", name, "mtu", str(pod.mtu), "netns", pod.name)
        self.ip("link", "add", ours, "mtu", str(pod.mtu), "type", "veth", *peer)
        self.ip("link", "set", ours, "master", "bridge", "up")
        pod.ip("link", "set", name, "up")
        for address in addresses:
            nodad = ("nodad",) if ":" in address else ()
            pod.ip("address", "add", address, "dev", name, *nodad)

    def join_upper(self, pod: Pod, name: str, kind: str, *, address: str, peer: str) -> None:
        """Give a pod a link on top of one of the node's, at whose other end is ``peer``."""
        ours, theirs = f"u{secrets.token_hex(4)}", f"u{secrets.token_hex(4)}"
        self.ip("link", "add", ours, "type", "veth", "peer", "name", theirs)
        link = ("link", "add", "link", ours, "name", name, "netns", pod.name, "type", kind)
        self.ip(*link, *_UPPER_KINDS[kind])
        end = theirs
        if kind == "vlan":
            end = "seven"
            self.ip("link", "add", "link", theirs, "name", end, "type", kind, *_UPPER_KINDS[kind])
        self.ip("address", "add", peer, "dev", end)
        for each in (ours, theirs, end):
            self.ip("link", "set", each, "up")
        pod.ip("link", "set", name, "up")
        pod.ip("address", "add", address, "dev", name)


def known_upper_kinds() -> list[str]:
    """Return the kinds that :meth:`Node.join_upper` takes and this kernel knows; none without root.

    To be asked before tests are chosen: where a kind is unknown there is no such test.
    """
    if os.geteuid() != 0:
        return []
    name = f"kh-{secrets.token_hex(3)}"
    known = []
    with _namespace(name):
        run("ip", "-n", name, "link", "add", "below", "type", "veth")
        for kind, options in _UPPER_KINDS.items():
            upper = ("link", "add", "link", "below", "name", kind, "type", kind)
            with contextlib.suppress(RuntimeError):
                run("ip", "-n", name, *upper, *options)
                known.append(kind)
    return known


def run(*words: str) -> str:
    """Run a command and return what it prints.

    Raises:
        RuntimeError: it failed; the text has what it said.
    """
    done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def _namespace(name: str) -> Iterator[None]:
    run("ip", "netns", "add", name)
    try:
        yield
    finally:
        run("ip", "netns", "delete", name)
