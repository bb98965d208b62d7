"""Network namespaces of pods, and the hooks on their links that steer frames to the guest.

A link of a pod has an ingress queueing discipline with a filter of ours, which redirects what
arrives to the guest's tap. The tap goes with whoever had it open; the filter stays, and would drop
everything from then on. So whoever cleans up removes it: the shim when it stops, else ``delete``,
for whose sake this imports nothing until there is something to remove. A discipline that has
somebody else's filters as well stays.
"""

# ruff: noqa: PLC0415 - see above

import posix

FILTER_PRIORITY = 0x6B48
"""By which a filter is known to be ours: ``kH``."""
_CLONE_NEWNET = 0x40000000
# linux/rtnetlink.h, linux/netlink.h, linux/pkt_sched.h, linux/if_ether.h
_RTM_DELQDISC = 37
_RTM_NEWTFILTER = 44
_RTM_DELTFILTER = 45
_RTM_GETTFILTER = 46
_NLMSG_ERROR = 2
_REQUEST_ACK = 0x5
_REQUEST_DUMP = 0x301
_INGRESS_HANDLE = 0xFFFF0000
_INGRESS_PARENT = 0xFFFFFFF1
_ALL_PROTOCOLS = 0x0300
"""ETH_P_ALL in network order."""
_HEADER = "=IHHII"
_HEADER_SIZE = 16
_NOT_THERE = frozenset({0, 2, 19, 22})
"""None, ENOENT, ENODEV, EINVAL: removed, or no such filter, discipline or link."""
_GONE = frozenset({2, 3, 20})
"""ENOENT, ESRCH, ENOTDIR: of a path that is no more."""
_TIMEOUT_S = 5
_ANSWER_BYTES = 1 << 16


def enter(fd: int) -> None:
    """Move the calling thread into a network namespace.

    Raises:
        OSError: it is none, or this is not allowed.
    """
    _call("setns", fd, _CLONE_NEWNET)


def enter_new() -> None:
    """Move the calling thread into a network namespace that is made for it.

    Raises:
        OSError: this is not allowed.
    """
    _call("unshare", _CLONE_NEWNET)


def _call(function: str, *arguments: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc[function](*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, posix.strerror(error))


def identity(fd: int) -> str:
    """Return what tells a namespace from a later one at the same path."""
    status = posix.fstat(fd)
    return f"{status.st_dev}:{status.st_ino}"


def remove_hooks(path: str, *, expected: str, links: list[str]) -> list[str]:
    """Remove our filters from links in the namespace at ``path``, and disciplines left empty.

    A namespace or a link that is gone, or is another one by now, is no error.

    Returns:
        What could not be removed, one text for each.
    """
    if not links:
        return []
    try:
        fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError as exc:
        return [] if exc.errno in _GONE else [f"network namespace {path}: {exc.strerror}"]
    try:
        if identity(fd) != expected:
            return []
        own = posix.open("/proc/thread-self/ns/net", posix.O_RDONLY | posix.O_CLOEXEC)
        try:
            enter(fd)
            try:
                return _remove_hooks(links)
            finally:
                enter(own)
        finally:
            posix.close(own)
    except OSError as exc:
        return [f"network namespace {path}: {exc.strerror or exc}"]
    finally:
        posix.close(fd)


def _remove_hooks(links: list[str]) -> list[str]:
    """Do it in the namespace of the calling thread.

    Raises:
        OSError: netlink cannot be spoken.
    """
    import socket

    problems = []
    for link in links:
        try:
            index = socket.if_nametoindex(link)
        except OSError:
            continue
        error = _remove_hook(index)
        if error not in _NOT_THERE:
            problems.append(f"let frames of {link} pass again: {posix.strerror(error)}")
    return problems


def _remove_hook(index: int) -> int:
    """Remove the filter, and the discipline unless it has others; return an errno, or 0."""
    ours = FILTER_PRIORITY << 16 | _ALL_PROTOCOLS
    error, _ = _ask(_RTM_DELTFILTER, _REQUEST_ACK, index=index, parent=_INGRESS_HANDLE, info=ours)
    if error not in _NOT_THERE:
        return error
    error, kind = _ask(_RTM_GETTFILTER, _REQUEST_DUMP, index=index, parent=_INGRESS_HANDLE)
    if error or kind == _RTM_NEWTFILTER:
        return error
    error, _ = _ask(
        *(_RTM_DELQDISC, _REQUEST_ACK),
        index=index,
        handle=_INGRESS_HANDLE,
        parent=_INGRESS_PARENT,
    )
    return error


def _ask(
    request: int, flags: int, *, index: int, parent: int, handle: int = 0, info: int = 0
) -> tuple[int, int]:
    """Send a request about a link's disciplines; return its errno and its first answer's type.

    Raises:
        OSError: netlink cannot be spoken.
    """
    import socket
    import struct

    # struct tcmsg: family, padding, ifindex, handle, parent, info.
    body = struct.pack("=B3xiIII", 0, index, handle, parent, info)
    head = struct.pack(_HEADER, _HEADER_SIZE + len(body), request, flags, 1, 0)
    # One for each, so that no answer can be taken for another's.
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(_TIMEOUT_S)
        netlink.sendall(head + body)
        answer = netlink.recv(_ANSWER_BYTES)
    (kind,) = struct.unpack_from("=H", answer, 4)
    if kind != _NLMSG_ERROR:
        return 0, kind
    # struct nlmsgerr: minus an errno, 0 for an acknowledgement.
    (status,) = struct.unpack_from("=i", answer, _HEADER_SIZE)
    return -status, kind
