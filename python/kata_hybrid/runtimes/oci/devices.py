"""Block devices of a spec: those of the host's that a container is to have as its own.

A pod's raw volumes are devices that a rule of their own allows. A privileged container's list has
every disk of the node, allowed by one rule for all: these are the node's, and stay there. What
stays is not made in the guest either, where the same numbers are other disks.
"""

from dataclasses import dataclass
from typing import Final

from kata_hybrid.errors import InvalidSpecError
from kata_hybrid.runtimes.oci.values import as_list, as_object, as_text
from kata_hybrid.types import JsonObject

_BLOCK: Final = "b"
_MAX_NUMBER: Final = 2**32 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockNode:
    """A block device of a container's, by the host's numbers."""

    path: str
    """In the container."""
    major: int
    minor: int
    is_read_only: bool


def parse_block_nodes(linux: JsonObject) -> tuple[BlockNode, ...]:
    """Read the block devices that a container is to have, from a spec's ``linux``.

    Raises:
        InvalidSpecError: a field has the wrong type; the text names it.
    """
    access = {
        numbers: as_text(rule.get("access") or "", f"{field}.access")
        for field, rule in _entries(_resources(linux), "devices", "linux.resources.devices")
        if rule.get("allow") is True and (numbers := _numbers(rule, field)) is not None
    }
    nodes = []
    for field, entry in _entries(linux, "devices", "linux.devices"):
        numbers = _numbers(entry, field)
        if numbers in access and numbers is not None:
            path = as_text(entry.get("path") or "", f"{field}.path")
            major, minor = numbers
            is_read_only = "w" not in access[numbers]
            nodes.append(BlockNode(path=path, major=major, minor=minor, is_read_only=is_read_only))
    return tuple(nodes)


def guest_devices(
    linux: JsonObject, nodes: tuple[BlockNode, ...]
) -> tuple[list[object], list[object]]:
    """Return the devices that the guest is to make, and the rules for those that it gets as disks.

    The agent puts its own numbers in both.
    """
    passed = {(node.major, node.minor) for node in nodes}
    devices: list[object] = [
        entry
        for field, entry in _entries(linux, "devices", "linux.devices")
        if entry.get("type") != _BLOCK or _numbers(entry, field) in passed
    ]
    rules: list[object] = [
        rule
        for field, rule in _entries(_resources(linux), "devices", "linux.resources.devices")
        if _numbers(rule, field) in passed
    ]
    return devices, rules


def _resources(linux: JsonObject) -> JsonObject:
    return as_object(linux.get("resources") or {}, "linux.resources")


def _entries(section: JsonObject, key: str, field: str) -> list[tuple[str, JsonObject]]:
    items = enumerate(as_list(section.get(key) or [], field))
    return [(f"{field}[{index}]", as_object(item, f"{field}[{index}]")) for index, item in items]


def _numbers(entry: JsonObject, field: str) -> tuple[int, int] | None:
    """Return a block device's major and minor; None for what is none, or stands for several."""
    if entry.get("type") != _BLOCK:
        return None
    numbers = []
    for key in ("major", "minor"):
        value = entry.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value > _MAX_NUMBER:
            message = f"{field}.{key} must be the number of a device, is {value!r}"
            raise InvalidSpecError(message)
        if value < 0:
            return None
        numbers.append(value)
    return numbers[0], numbers[1]
