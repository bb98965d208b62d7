"""The network of a pod: links of a namespace, each carried over to a card of the guest's.

    new ──open──▶ open ──wire──▶ wired ──described──▶ wired      stop, from any ──▶ stopped

``open`` makes a tap beside each link, which takes a moment. ``wire`` sets ``wiring.py`` off, which
takes longer: it redirects frames between link and tap, and reads addresses and routes, while the
guest boots. ``described`` waits for it. What is left of the links when this process is killed is
undone by ``delete`` (``persist/netns.py``), so it is to be recorded after ``open``, see
:attr:`hooks`, and no longer after ``stop``.
Without a namespace there is nothing to do, and the guest has its loopback only.
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from kata_hybrid.aio.blocking import begin_in_thread, call_in_thread
from kata_hybrid.aio.process import Process, ProcessReaper
from kata_hybrid.config.model import NetworkModel
from kata_hybrid.errors import (
    FailedPreconditionError,
    InvalidStateError,
    ResourceExhaustedError,
    UnimplementedError,
)
from kata_hybrid.persist import netns
from kata_hybrid.resource.network.links import Link, read_links
from kata_hybrid.resource.network.loopback import Loopback, catch_loopback
from kata_hybrid.resource.network.tap import open_tap
from kata_hybrid.types import (
    GuestInterface,
    GuestNeighbor,
    GuestNetwork,
    GuestRoute,
    LinkHooks,
    NetworkDevice,
)

MAX_LINKS: Final = 8
_PROGRAM: Final = Path(__file__).with_name("wiring.py")
_SCAN_TIMEOUT_S: Final = 10.0
_WIRING_TIMEOUT_S: Final = 30.0
_MAX_ERROR_BYTES: Final = 1 << 16

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A link and the tap beside it."""

    link: Link
    tap: str
    tap_fd: int


class PodNetwork:
    """What a guest has of its pod's network."""

    def __init__(
        self,
        namespace: Path | None,
        *,
        model: NetworkModel,
        reaper: ProcessReaper,
        is_own: bool = False,
    ) -> None:
        """Describe it; nothing is opened. ``is_own``: it was made for this sandbox."""
        self._is_own = is_own
        self._namespace = namespace
        self._model = model
        self._reaper = reaper
        self._fd: int | None = None
        self._endpoints: tuple[Endpoint, ...] = ()
        self._wiring: _Wiring | None = None
        self._is_stopped = False

    @property
    def hooks(self) -> LinkHooks | None:
        """What has to be undone if this process dies; ``None`` if nothing."""
        if self._fd is None or not self._endpoints or self._model is NetworkModel.NONE:
            return None
        return LinkHooks(
            namespace=str(self._namespace),
            identity=netns.identity(self._fd),
            links=tuple(endpoint.link.name for endpoint in self._endpoints),
        )

    async def open(self) -> tuple[NetworkDevice, ...]:
        """Find the links and make a tap for each.

        Raises:
            FailedPreconditionError: the namespace is gone or none, or taps cannot be made.
            UnimplementedError: a link is of a kind that cannot be carried over.
        """
        if self._namespace is None:
            return ()
        if self._fd is not None or self._is_stopped:
            subject = "pod network"
            raise InvalidStateError(subject, state="open or stopped", request="open")
        try:
            self._fd = os.open(self._namespace, os.O_RDONLY | os.O_CLOEXEC)
            if not self._is_own:
                self._refuse_the_hosts(self._fd)
            self._endpoints = await _open_inside(self._fd)
        except TimeoutError as exc:
            message = f"its links could not be read in {_SCAN_TIMEOUT_S:g} s"
            raise self._failed(message) from exc
        except OSError as exc:
            what = f"{exc.filename}: " if exc.filename not in {None, str(self._namespace)} else ""
            raise self._failed(f"{what}{exc.strerror}") from exc
        return tuple(
            NetworkDevice(
                id=endpoint.link.name,
                tap_fds=(endpoint.tap_fd,),
                mac=endpoint.link.mac,
                mtu=endpoint.link.mtu,
            )
            for endpoint in self._endpoints
        )

    def _refuse_the_hosts(self, fd: int) -> None:
        """Refuse the namespace that this process is in: its links are the node's.

        Raises:
            FailedPreconditionError: it is the one.
        """
        own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            is_own = netns.identity(fd) == netns.identity(own)
        finally:
            os.close(own)
        if is_own:
            raise self._failed("it is the host's own, whose links a guest cannot take over")

    async def wire(self) -> None:
        """Begin to redirect frames and to read what the guest has to know; see ``described``.

        Raises:
            FailedPreconditionError: the program could not be started.
        """
        if not self._endpoints or self._fd is None:
            return
        words = [
            f"{endpoint.link.name}:{'' if self._model is NetworkModel.NONE else endpoint.tap}"
            for endpoint in self._endpoints
        ]
        try:
            self._wiring = await _Wiring.start(self._reaper, self._fd, words)
        except OSError as exc:
            raise self._failed(f"start {_PROGRAM.name}: {exc.strerror}") from exc

    async def described(self, *, device_paths: tuple[str, ...]) -> GuestNetwork:
        """Wait until frames pass, and say what the agent has to set up.

        ``device_paths`` are the cards' places in the guest, in the order of the devices.

        Raises:
            FailedPreconditionError: a link could not be redirected; the text says which and why.
        """
        if self._wiring is None:
            return GuestNetwork()
        try:
            description = await self._wiring.result()
        except (TimeoutError, ValueError) as exc:
            raise self._failed(str(exc) or "not done in time") from exc
        addresses = description["addresses"]
        return GuestNetwork(
            interfaces=tuple(
                GuestInterface(
                    name=endpoint.link.name,
                    mac=endpoint.link.mac,
                    mtu=endpoint.link.mtu,
                    addresses=tuple(addresses[endpoint.link.name]),
                    device_path=path,
                    has_arp=endpoint.link.has_arp,
                )
                for endpoint, path in zip(self._endpoints, device_paths, strict=True)
            ),
            routes=tuple(GuestRoute(**entry) for entry in description["routes"]),
            neighbors=tuple(GuestNeighbor(**entry) for entry in description["neighbors"]),
        )

    async def catch_loopback(self) -> Loopback | None:
        """Have the pod's loopback answered by a socket, which the caller owns.

        Raises:
            FailedPreconditionError: the host cannot do it; the text says why.
        """
        if self._fd is None:
            return None
        catching = _begin_inside(self._fd, catch_loopback)
        try:
            async with asyncio.timeout(_SCAN_TIMEOUT_S):
                return await asyncio.shield(catching)
        except BaseException as exc:
            catching.add_done_callback(_close_loopback)
            if isinstance(exc, TimeoutError | OSError):
                reason = getattr(exc, "strerror", None) or "not done in time"
                raise self._failed(f"its loopback: {reason}") from exc
            raise

    async def stop(self) -> None:
        """Give the links back as they were, and close the taps. Idempotent."""
        self._is_stopped = True
        if self._wiring is not None:
            await self._wiring.stop()
            self._wiring = None
        hooks = self.hooks
        if hooks is not None:
            await self._unhook(hooks)
        for endpoint in self._endpoints:
            os.close(endpoint.tap_fd)
        self._endpoints = ()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    async def _unhook(self, hooks: LinkHooks) -> None:
        path = f"/proc/self/fd/{self._fd}"

        def remove() -> list[str]:
            return netns.remove_hooks(path, expected=hooks.identity, links=list(hooks.links))

        try:
            problems = await call_in_thread(remove, name="netns", timeout_s=_SCAN_TIMEOUT_S)
        except TimeoutError:
            problems = ["not done in time"]
        for problem in problems:
            extra = {"namespace": hooks.namespace, "problem": problem}
            _log.warning("pod network is not as it was", extra=extra)

    def _failed(self, reason: str) -> FailedPreconditionError:
        return FailedPreconditionError(f"network namespace {self._namespace}: {reason}")


async def _open_inside(fd: int) -> tuple[Endpoint, ...]:
    """Make the taps on a thread that is in the namespace, and ends with it.

    Raises:
        TimeoutError: it is not done in time; what it makes later is closed.
        OSError: the namespace cannot be entered or read, or a tap cannot be made.
        KataError: a link cannot be carried over.
    """

    def run(namespace_fd: int) -> tuple[Endpoint, ...]:
        netns.enter(namespace_fd)
        return _open_endpoints()

    opening = _begin_inside(fd, run)
    try:
        async with asyncio.timeout(_SCAN_TIMEOUT_S):
            return await asyncio.shield(opening)
    except BaseException:
        opening.add_done_callback(_close_unwanted)
        raise


def _begin_inside(fd: int, work: Callable[[int], _T]) -> "asyncio.Future[_T]":
    """Run ``work`` on a thread with a descriptor of the namespace."""
    # Its own: it may still be at it when ours is closed.
    copy = os.dup(fd)

    def run() -> _T:
        try:
            return work(copy)
        finally:
            os.close(copy)

    return begin_in_thread(run, name="netns")


def _close_loopback(catching: "asyncio.Future[Loopback]") -> None:
    if not catching.cancelled() and catching.exception() is None:
        catching.result().close()


def _close_unwanted(opening: "asyncio.Future[tuple[Endpoint, ...]]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        for endpoint in opening.result():
            os.close(endpoint.tap_fd)


def _open_endpoints() -> tuple[Endpoint, ...]:
    """Make a tap for each link of the thread's namespace.

    Raises:
        OSError: the namespace cannot be read, or a tap cannot be made.
        UnimplementedError: a link is of a kind that cannot be carried over.
        ResourceExhaustedError: there are too many.
    """
    links = read_links()
    _check_links(links)
    with contextlib.ExitStack() as opened:
        endpoints = []
        for index, link in enumerate(links):
            tap = f"tap{index}_kata"
            fd = open_tap(tap, mtu=link.mtu)
            opened.callback(os.close, fd)
            endpoints.append(Endpoint(link=link, tap=tap, tap_fd=fd))
        opened.pop_all()
    return tuple(endpoints)


def _check_links(links: tuple[Link, ...]) -> None:
    """Refuse what the guest could not have, or the agent not tell apart.

    Raises:
        UnimplementedError: a link is of a kind that cannot be carried over.
        ResourceExhaustedError: there are too many.
    """
    if len(links) > MAX_LINKS:
        message = f"{len(links)} links: a guest has at most {MAX_LINKS} network cards"
        raise ResourceExhaustedError(message)
    by_mac: dict[str, Link] = {}
    for link in links:
        if not link.name.isprintable():
            message = f"link {link.name!a}: its name is no text"
            raise UnimplementedError(message)
        if link.is_physical:
            message = f"link {link.name} is a device of the host's ({link.bus}): VFIO is needed"
            raise UnimplementedError(message)
        if not link.is_ethernet:
            message = f"link {link.name} ({link.driver or 'unknown driver'}) is not Ethernet"
            raise UnimplementedError(message)
        if (other := by_mac.setdefault(link.mac, link)) is not link:
            message = (
                f"links {other.name} and {link.name} have the same hardware address {link.mac}, by "
                "which the guest's agent finds its cards"
            )
            raise UnimplementedError(message)


class _Wiring:
    """The running program, and what it prints: to files in memory, read when it has ended."""

    def __init__(self, process: Process, *, output: int, errors: int) -> None:
        self._process = process
        self._output = output
        self._errors = errors

    @classmethod
    async def start(cls, reaper: ProcessReaper, namespace_fd: int, words: list[str]) -> "_Wiring":
        with contextlib.ExitStack() as files:
            output, errors = os.memfd_create("wiring-output"), os.memfd_create("wiring-errors")
            files.callback(os.close, output)
            files.callback(os.close, errors)
            process = await reaper.spawn(
                [
                    *(sys.executable, "-I", _PROGRAM, str(namespace_fd)),
                    *(str(netns.FILTER_PRIORITY), *words),
                ],
                name="wiring",
                stdout=output,
                stderr=errors,
                pass_fds=(namespace_fd,),
            )
            files.pop_all()
        return cls(process, output=output, errors=errors)

    async def result(self) -> dict[str, Any]:
        """Wait for its end and return what it printed.

        Raises:
            TimeoutError: it takes too long.
            ValueError: it failed; the text is what it said.
        """
        async with asyncio.timeout(_WIRING_TIMEOUT_S):
            status = await self._process.exited()
        if status != 0:
            words = os.pread(self._errors, _MAX_ERROR_BYTES, 0).decode(errors="replace").split("\n")
            raise ValueError(words[-2] if len(words) > 1 else f"{_PROGRAM.name}: status {status}")
        size = os.fstat(self._output).st_size
        description: dict[str, Any] = json.loads(os.pread(self._output, size, 0))
        return description

    async def stop(self) -> None:
        """End it now."""
        self._process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_WIRING_TIMEOUT_S):
                await self._process.exited()
        for fd in (self._output, self._errors):
            os.close(fd)
