"""A pod's network as a guest uses it.

Lifecycle: new ──open──▶ open ──wire──▶ wired ──described──▶ wired; ``stop`` from any, repeatable.
"""

from typing import Protocol

from kata_hybrid.resource.network.loopback import Loopback
from kata_hybrid.types import GuestNetwork, LinkHooks, NetworkDevice


class Network(Protocol):
    """The host's side of a guest's network cards."""

    @property
    def hooks(self) -> LinkHooks | None:
        """What has to be undone if this process dies. Valid once open."""

    async def open(self) -> tuple[NetworkDevice, ...]:
        """Find the pod's links and say which cards stand for them.

        Raises:
            FailedPreconditionError: the namespace is gone or none, or taps cannot be made.
            UnimplementedError: a link is of a kind that cannot be carried over.
        """

    async def wire(self) -> None:
        """Begin to let frames pass; the guest may boot meanwhile.

        Raises:
            FailedPreconditionError: it cannot begin.
        """

    async def described(self, *, device_paths: tuple[str, ...]) -> GuestNetwork:
        """Wait until frames pass, and say what the agent has to set up.

        ``device_paths`` are the cards' places in the guest, in the order of the devices.

        Raises:
            FailedPreconditionError: frames do not pass; the text says why.
        """

    async def catch_loopback(self) -> Loopback | None:
        """Have the pod's loopback answered by a socket, which the caller owns.

        Returns:
            Nothing where there is no namespace.

        Raises:
            FailedPreconditionError: the host cannot do it; the text says why.
        """

    async def stop(self) -> None:
        """Give the links back as they were. Idempotent."""
