"""The containers of a sandbox, by their ids: reserved, there, released and gone.

    reserve ──▶ add ──▶ release ──▶ discard

An id is taken from the moment somebody asks for it. A release is done once and to its end, whoever
asks for it and gives up: what a container holds on the host and in the guest is given back, then
its last hooks run.
"""

import contextlib
from collections.abc import Iterator

from kata_hybrid.aio.ending import Ending
from kata_hybrid.errors import ContainerExistsError, ContainerNotFoundError
from kata_hybrid.runtimes.oci.hooks import HostHooks
from kata_hybrid.runtimes.virt.container import Container
from kata_hybrid.runtimes.virt.exits import KILLED_STATUS, Exits
from kata_hybrid.runtimes.virt.guest import Guest
from kata_hybrid.types import ContainerId


class Containers:
    """Those of one sandbox."""

    def __init__(self, *, exits: Exits, hooks: HostHooks) -> None:
        """There are none yet."""
        self._exits = exits
        self._hooks = hooks
        self._containers: dict[ContainerId, Container] = {}
        self._reserved: set[ContainerId] = set()
        self._endings: dict[Container, Ending] = {}

    def __contains__(self, container_id: object) -> bool:
        """Whether there is one of this id."""
        return container_id in self._containers

    @property
    def ids(self) -> tuple[ContainerId, ...]:
        """Of those that are there."""
        return tuple(self._containers)

    @property
    def all(self) -> tuple[Container, ...]:
        """Those that are there now."""
        return tuple(self._containers.values())

    @property
    def is_empty(self) -> bool:
        """No container is there or on its way."""
        return not self._containers and not self._reserved

    def find(self, container_id: ContainerId) -> Container:
        """Return a container.

        Raises:
            ContainerNotFoundError: there is none of this id.
        """
        try:
            return self._containers[container_id]
        except KeyError:
            message = f"container {container_id} not found"
            raise ContainerNotFoundError(message) from None

    @contextlib.contextmanager
    def reserve(self, container_id: ContainerId) -> Iterator[None]:
        """Keep an id for a container that is being created.

        Raises:
            ContainerExistsError: it is taken.
        """
        if container_id in self._containers or container_id in self._reserved:
            message = f"container {container_id} already exists"
            raise ContainerExistsError(message)
        self._reserved.add(container_id)
        try:
            yield
        finally:
            self._reserved.discard(container_id)

    def add(self, container: Container) -> None:
        """Have a container that was created."""
        self._containers[container.id] = container

    def discard(self, container: Container) -> None:
        """Have it no more, or not after all."""
        self._endings.pop(container, None)
        if self._containers.get(container.id) is container:
            del self._containers[container.id]

    async def release(self, container: Container, guest: Guest | None) -> None:
        """Give back what it holds, then run its last hooks. Idempotent."""

        async def work() -> None:
            if guest is not None:
                await container.remove(guest.agent)
            await self._exits.end_execs(container)
            for process in container.execs.values():
                # Registered and never started: wake who waits for it.
                process.end(KILLED_STATUS)
            container.release()
            await self._hooks.deleted(container.spec.hooks, container.state("stopped", pid=0))

        if container not in self._endings:
            self._endings[container] = Ending(work, name=f"end of container {container.id}")
        await self._endings[container]()
