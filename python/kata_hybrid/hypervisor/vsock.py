"""How the guest's vsock is reached: the host's vhost-vsock, or one that ends in this process.

``/dev/vhost-vsock`` needs a CID nobody else on the host has; the kernel is the judge, so random
ones are tried. The built-in monitor's device, and our vhost-user back end for a QEMU on a host
without that device, show the guest's ports as one Unix socket (hybrid vsock) in the run directory.
"""

import errno
import fcntl
import os
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kata_hybrid.errors import ResourceExhaustedError, VmmError

AGENT_SOCKET = "agent.sock"
"""In the run directory: the guest's vsock ports behind one Unix socket (hybrid vsock)."""
VHOST_VSOCK_DEVICE = Path("/dev/vhost-vsock")
USER_GUEST_CID = 3
"""Guests whose vsock ends in this process share no CID space: each can have the first free one."""
_VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60
"""_IOW(VHOST_VIRTIO, 0x60, __u64), linux/vhost.h."""
_FIRST_CID = 3
_LAST_CID = 0xFFFFFFFE
"""VMADDR_CID_ANY is the number after it."""
_ATTEMPTS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelVsock:
    """vsock by the host's vhost-vsock; ``vhost_fd`` is inherited."""

    vhost_fd: int
    guest_cid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UserVsock:
    """vsock by a vhost-user back end that listens on ``socket_path``."""

    socket_path: Path


def hybrid_address(run_dir: Path) -> str:
    """Return where the ports of a guest are reached whose vsock ends in this process."""
    return f"hvsock://{run_dir / AGENT_SOCKET}"


def free_hybrid_path(run_dir: Path) -> Path:
    """Return the path of that socket, with nothing there: the folder is one sandbox's alone.

    A shim that was killed may have left one.
    """
    path = run_dir / AGENT_SOCKET
    path.unlink(missing_ok=True)
    return path


class VsockBackend(Protocol):
    """A running vhost-user-vsock back end."""

    def close(self) -> None:
        """Stop serving and remove both sockets. Idempotent."""


class VsockBackendFactory(Protocol):
    """Starts a vhost-user-vsock back end."""

    def __call__(self, *, socket_path: str, hybrid_path: str, guest_cid: int) -> VsockBackend:
        """Listen on both paths; return when QEMU may connect.

        Raises:
            OSError: a path cannot be bound.
        """


def open_kernel_vsock(device: Path = VHOST_VSOCK_DEVICE) -> KernelVsock:
    """Open vhost-vsock and claim a free CID. The caller closes ``vhost_fd``.

    Raises:
        VmmError: the device cannot be opened or used.
        ResourceExhaustedError: no free CID was found.
    """
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        msg = f"open {device}"
        raise VmmError(msg, os.strerror(error.errno or 0)) from error
    try:
        return KernelVsock(vhost_fd=fd, guest_cid=_claim_cid(fd, device=device))
    except BaseException:
        os.close(fd)
        raise


def _claim_cid(fd: int, *, device: Path) -> int:
    for _ in range(_ATTEMPTS):
        cid = _FIRST_CID + secrets.randbelow(_LAST_CID - _FIRST_CID + 1)
        try:
            fcntl.ioctl(fd, _VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", cid))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            msg = f"set guest CID on {device}"
            raise VmmError(msg, os.strerror(error.errno or 0)) from error
        return cid
    msg = f"no free vsock CID after {_ATTEMPTS} tries"
    raise ResourceExhaustedError(msg)
