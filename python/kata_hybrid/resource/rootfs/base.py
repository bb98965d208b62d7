"""A container's root file system, from the mounts containerd lists to a path in the guest."""

from typing import Protocol

from kata_hybrid.types import GuestStorage


class Rootfs(Protocol):
    """Acquired by the constructor of its kind; released by :meth:`release`."""

    @property
    def guest_path(self) -> str:
        """Where the guest finds it (``root.path`` of the guest's spec)."""

    @property
    def storages(self) -> tuple[GuestStorage, ...]:
        """What the agent has to mount first."""

    def release(self) -> None:
        """Give back what was acquired. Idempotent."""
