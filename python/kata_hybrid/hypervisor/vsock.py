"""How the guest's vsock is reached: the host's vhost-vsock, or a back end of ours over vhost-user.

``/dev/vhost-vsock`` needs a CID nobody else on the host has; the kernel is the judge, so random
ones are tried. Without that device QEMU speaks vhost-user to a back end in this process, which
shows the guest's ports as one Unix socket (hybrid vsock) in the run directory.
"""

import errno
import fcntl
import os
import secrets
import struct
from pathlib import Path
from typing import Protocol

from kata_hybrid.errors import ResourceExhaustedError, VmmError
from kata_hybrid.hypervisor.qemu_command import KernelVsock

VHOST_VSOCK_DEVICE = Path("/dev/vhost-vsock")
USER_GUEST_CID = 3
"""No two guests behind vhost-user share a CID space, so each can have the first free one."""
_VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60
"""_IOW(VHOST_VIRTIO, 0x60, __u64), linux/vhost.h."""
_FIRST_CID = 3
_LAST_CID = 0xFFFFFFFE
"""VMADDR_CID_ANY is the number after it."""
_ATTEMPTS = 50


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
