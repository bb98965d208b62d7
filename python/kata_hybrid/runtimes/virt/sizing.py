"""How large a machine a sandbox gets: what its pod or container is limited to, plus an overhead.

containerd writes the sum of a pod's limits into the annotations of its sandbox (containerd,
``pkg/cri/annotations``); a container on its own has them in ``linux.resources`` (runtime-spec,
config-linux.md). Each limit sizes only what it limits: without one, the file's default holds.
"""

import dataclasses
import logging
import os
import re
from dataclasses import dataclass
from typing import Final, TypeVar

from kata_hybrid.config.model import MIN_MEMORY_MIB, Config, HypervisorConfig
from kata_hybrid.errors import InvalidSpecError
from kata_hybrid.runtimes.oci.kind import SANDBOX, container_kind
from kata_hybrid.runtimes.oci.spec import Spec
from kata_hybrid.runtimes.oci.values import as_object
from kata_hybrid.types import JsonObject

_log = logging.getLogger(__name__)

_ANNOTATION: Final = "io.kubernetes.cri.sandbox-"
_NAMES: Final = ("cpu-quota", "cpu-period", "memory")
_WHOLE: Final = re.compile(r"-?[0-9]{1,18}")
_DEFAULT_PERIOD: Final = 100_000
"""Microseconds; the kernel's, where a spec has a quota only (sched-bwc.rst)."""
_MAX: Final = (1 << 63) - 1
_SHOWN: Final = 80
"""Characters of a wrong value that an error shows."""
_MIB: Final = 1 << 20
_Table = TypeVar("_Table", bound=HypervisorConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the containers of a sandbox may use together; None: all there is."""

    cpus: float | None = None
    memory_bytes: int | None = None


def sandbox_limits(spec: Spec) -> Limits:
    """Return the limits of the sandbox whose first container this is.

    Raises:
        InvalidSpecError: a limit is not a whole number; the text names it.
    """
    if container_kind(spec.annotations) == SANDBOX:
        prefix, values = _ANNOTATION, _annotated(spec.annotations)
    else:
        prefix, values = "linux.resources: ", _resources(spec.raw)
    quota, period, memory = (
        _whole(value, prefix + name) for name, value in zip(_NAMES, values, strict=True)
    )
    return Limits(
        cpus=quota / (period if period > 0 else _DEFAULT_PERIOD) if quota > 0 else None,
        memory_bytes=memory if memory > 0 else None,
    )


def sized(config: Config, limits: Limits) -> Config:
    """Return the configuration with machines of the size that the limits ask for."""
    if not config.runtime.is_sized_by_limits:
        if limits != Limits():
            _log.warning(
                "static_sandbox_resource_mgmt = false: machines do not grow, it has its defaults"
            )
        return config
    return dataclasses.replace(
        config,
        builtin=_sized_table(config.builtin, limits),
        qemu=_sized_table(config.qemu, limits),
    )


def _sized_table(table: _Table, limits: Limits) -> _Table:
    if limits.cpus is not None:
        vcpus = max(1.0, table.overhead_vcpus + limits.cpus)
        table = dataclasses.replace(table, default_vcpus=vcpus)
    if limits.memory_bytes is not None:
        memory = max(MIN_MEMORY_MIB, table.overhead_memory_mib - (-limits.memory_bytes // _MIB))
        table = dataclasses.replace(table, memory_mib=memory + memory % 2)
    return table


def bounded(config: Config) -> Config:
    """Return the configuration with machines that have no more memory than there may be.

    A limit or an annotation may ask for more than the host has: the guest's own tables of such a
    memory would be taken for real.
    """
    host_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _MIB
    return dataclasses.replace(
        config, builtin=_bounded(config.builtin, host_mib), qemu=_bounded(config.qemu, host_mib)
    )


def _bounded(table: _Table, host_mib: int) -> _Table:
    most = min(host_mib, table.max_memory_mib or host_mib)
    if table.memory_mib <= most:
        return table
    return dataclasses.replace(table, memory_mib=max(MIN_MEMORY_MIB, most - most % 2))


def _annotated(annotations: dict[str, str]) -> tuple[object, ...]:
    return tuple(annotations.get(_ANNOTATION + name) for name in _NAMES)


def _resources(raw: JsonObject) -> tuple[object, ...]:
    linux = as_object(raw.get("linux") or {}, "linux")
    resources = as_object(linux.get("resources") or {}, "linux.resources")
    cpu = as_object(resources.get("cpu") or {}, "linux.resources.cpu")
    memory = as_object(resources.get("memory") or {}, "linux.resources.memory")
    return cpu.get("quota"), cpu.get("period"), memory.get("limit")


def _whole(value: object, name: str) -> int:
    """Return a number of the spec's, or one that an annotation spells; nothing is 0."""
    if value is None or value == "":
        return 0
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MAX:
        return value
    message = f"{name} = {ascii(value)[:_SHOWN]} is not a whole number of 64 bits"
    raise InvalidSpecError(message)
