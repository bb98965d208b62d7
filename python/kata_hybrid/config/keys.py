"""The keys of ``configuration.toml``: for each its table, the field it fills, and its check.

A check takes the TOML value and returns ours, or raises ``ValueError`` with what was expected; what
it takes is also said in JSON Schema, for editors (``reference.py``).
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from kata_hybrid.config.model import (
    MAX_BUILTIN_MEMORY_MIB,
    MAX_MEMORY_MIB,
    MIN_MEMORY_MIB,
    BlockEngine,
    EmptyDirMode,
    HypervisorName,
    LogLevel,
    NetworkModel,
)
from kata_hybrid.types import FolderCache

Schema = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Check:
    """Takes a TOML value and returns ours."""

    convert: Callable[[object], object]
    schema: Schema
    """What is taken, in the words of JSON Schema."""

    def __call__(self, value: object) -> object:
        """Return our value.

        Raises:
            ValueError: it is none that is taken; the text is what is.
        """
        return self.convert(value)


_MAX_U32 = 2**32 - 1
_MAX_VCPUS = 1024
_PARAMETER = re.compile(r'(?:"[^"]*"|[^\s"])+')


@dataclass(frozen=True, slots=True)
class Key:
    """Where a key's value goes, and how it is checked."""

    field: str
    check: Check


def _to_boolean(value: object) -> bool:
    if not isinstance(value, bool):
        message = "true or false"
        raise ValueError(message)  # noqa: TRY004 - one kind of error for every check
    return value


def _integer(minimum: int, maximum: int) -> Check:
    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            message = f"a whole number from {minimum} to {maximum}"
            raise ValueError(message)
        return value

    return Check(check, {"type": "integer", "minimum": minimum, "maximum": maximum})


def _number(minimum: float, maximum: float, expected: str) -> Check:
    def check(value: object) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # Also false for what is not a number (NaN).
        if not is_number or not minimum <= value <= maximum:  # type: ignore[operator]
            raise ValueError(expected)
        return float(value)  # type: ignore[arg-type]

    limits = {"minimum": minimum} if minimum > -sys.float_info.max else {}
    return Check(check, {"type": "number", **limits, "maximum": maximum})


def _to_text(value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        message = "a text without NUL characters"
        raise ValueError(message)
    return value


def _to_path(value: object) -> Path:
    if not isinstance(value, str) or "\0" in value or not value.startswith("/"):
        message = "an absolute path"
        raise ValueError(message)
    return Path(value)


def _to_optional_path(value: object) -> Path | None:
    return None if value == "" else _to_path(value)


def _to_texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        message = "a list of texts"
        raise ValueError(message)  # noqa: TRY004 - one kind of error for every check
    return tuple(_to_text(entry) for entry in value)


def _to_patterns(value: object) -> tuple[re.Pattern[str], ...]:
    try:
        return tuple(re.compile(text) for text in _to_texts(value))
    except (re.error, OverflowError, RecursionError) as error:
        message = f"a list of regular expressions: {error}"
        raise ValueError(message) from error


def _to_kernel_params(value: object) -> tuple[str, ...]:
    """Split at blanks outside double quotes, as the kernel does; the quotes stay."""
    text = _to_text(value)
    if text.count('"') % 2:
        message = "a list of kernel parameters with closed quotes"
        raise ValueError(message)
    return tuple(_PARAMETER.findall(text))


def _choice(*allowed: str, aliases: Mapping[str, str] | None = None) -> Check:
    def check(value: object) -> str:
        known = (aliases or {}).get(value, value) if isinstance(value, str) else None
        if known not in allowed:
            message = f"one of {', '.join(allowed)}"
            raise ValueError(message)
        return str(known)

    return Check(check, {"enum": [*allowed, *(aliases or {})]})


def _enum(kind: type[Enum], *, aliases: Mapping[str, str] | None = None) -> Check:
    choose = _choice(*(str(member.value) for member in kind), aliases=aliases)
    return Check(lambda value: kind(choose(value)), choose.schema)


_PATH_SCHEMA = {"type": "string", "pattern": "^/"}
_TEXTS_SCHEMA = {"type": "array", "items": {"type": "string"}}
_boolean = Check(_to_boolean, {"type": "boolean"})
_text = Check(_to_text, {"type": "string"})
_texts = Check(_to_texts, _TEXTS_SCHEMA)
_patterns = Check(_to_patterns, {"type": "array", "items": {"type": "string", "format": "regex"}})
_kernel_params = Check(_to_kernel_params, {"type": "string"})
_absolute_path = Check(_to_path, _PATH_SCHEMA)
_optional_path = Check(_to_optional_path, {**_PATH_SCHEMA, "pattern": "^(/|$)"})
_PORT = _integer(1, _MAX_U32 - 1)
_MILLISECONDS = _integer(1, 24 * 3600 * 1000)
_RATE = _integer(0, 2**63 - 1)

_HYPERVISOR_KEYS: Mapping[str, Key] = {
    "kernel": Key("kernel", _absolute_path),
    "initrd": Key("initrd", _absolute_path),
    "kernel_params": Key("kernel_params", _kernel_params),
    "default_vcpus": Key(
        "default_vcpus",
        _number(
            -sys.float_info.max,
            _MAX_VCPUS,
            f"a number of at most {_MAX_VCPUS} (below 0: all of the host's)",
        ),
    ),
    "default_maxvcpus": Key("max_vcpus", _integer(0, _MAX_VCPUS)),
    "default_maxmemory": Key("max_memory_mib", _integer(0, MAX_MEMORY_MIB)),
    "overhead_vcpus": Key(
        "overhead_vcpus", _number(0.0, _MAX_VCPUS, f"a number from 0 to {_MAX_VCPUS}")
    ),
    "overhead_memory": Key("overhead_memory_mib", _integer(0, MAX_MEMORY_MIB)),
    "virtio_fs_cache": Key(
        "virtio_fs_cache", _enum(FolderCache, aliases={"": "never", "none": "never"})
    ),
    "enable_debug": Key("enable_debug", _boolean),
    "enable_annotations": Key("enable_annotations", _patterns),
}

BUILTIN_KEYS: Mapping[str, Key] = {
    **_HYPERVISOR_KEYS,
    "default_memory": Key("memory_mib", _integer(MIN_MEMORY_MIB, MAX_BUILTIN_MEMORY_MIB)),
    "enable_hugepages": Key("enable_hugepages", _boolean),
    "shared_fs": Key(
        "shared_fs",
        _choice("virtio-fs", aliases={"": "virtio-fs", "inline-virtio-fs": "virtio-fs"}),
    ),
    "block_device_aio": Key("block_engine", _enum(BlockEngine, aliases={"": "io_uring"})),
    "block_device_cache_direct": Key("is_block_direct", _boolean),
    "disk_rate_limiter_bw_max_rate": Key("disk_bandwidth_bits", _RATE),
    "disk_rate_limiter_bw_one_time_burst": Key("disk_bandwidth_burst_bits", _RATE),
    "disk_rate_limiter_ops_max_rate": Key("disk_operations", _RATE),
    "disk_rate_limiter_ops_one_time_burst": Key("disk_operations_burst", _RATE),
    "reclaim_guest_freed_memory": Key("reclaim_guest_freed_memory", _boolean),
}

QEMU_KEYS: Mapping[str, Key] = {
    **_HYPERVISOR_KEYS,
    "path": Key("path", _optional_path),
    "valid_hypervisor_paths": Key("valid_paths", _texts),
    "valid_virtio_fs_daemon_paths": Key("valid_virtio_fs_daemons", _texts),
    "valid_entropy_sources": Key("valid_entropy_sources", _texts),
    "machine_type": Key("machine_type", _choice("q35", aliases={"": "q35"})),
    "machine_accelerators": Key("machine_accelerators", _text),
    "cpu_features": Key("cpu_features", _text),
    "default_memory": Key("memory_mib", _integer(MIN_MEMORY_MIB, MAX_MEMORY_MIB)),
    "entropy_source": Key("entropy_source", _absolute_path),
    "shared_fs": Key("shared_fs", _choice("virtio-fs", aliases={"": "virtio-fs"})),
    "virtio_fs_daemon": Key("virtio_fs_daemon", _optional_path),
    "virtio_fs_extra_args": Key("virtio_fs_extra_args", _texts),
}

AGENT_KEYS: Mapping[str, Key] = {
    "enable_debug": Key("enable_debug", _boolean),
    "debug_console_enabled": Key("debug_console_enabled", _boolean),
    "server_port": Key("server_port", _PORT),
    "log_port": Key("log_port", _PORT),
    "reconnect_timeout_ms": Key("reconnect_timeout_ms", _MILLISECONDS),
    "create_container_timeout": Key("request_timeout_s", _integer(1, 24 * 3600)),
    "health_check_request_timeout_ms": Key("health_check_request_timeout_ms", _MILLISECONDS),
    "container_pipe_size": Key("container_pipe_size", _integer(0, 1 << 30)),
    "enable_annotations": Key("enable_annotations", _patterns),
}

RUNTIME_KEYS: Mapping[str, Key] = {
    "hypervisor_name": Key(
        "hypervisor_name", _enum(HypervisorName, aliases={"dragonball": "builtin"})
    ),
    "agent_name": Key("agent_name", _choice("kata")),
    "name": Key("name", _choice("virt_container")),
    "enable_debug": Key("enable_debug", _boolean),
    "log_level": Key("log_level", _enum(LogLevel)),
    "disable_guest_seccomp": Key("disable_guest_seccomp", _boolean),
    "enable_annotations": Key("enable_annotations", _patterns),
    "emptydir_mode": Key("empty_dir_mode", _enum(EmptyDirMode, aliases={"": "shared-fs"})),
    "sandbox_cgroup_only": Key("sandbox_cgroup_only", _boolean),
    "static_sandbox_resource_mgmt": Key("is_sized_by_limits", _boolean),
    "internetworking_model": Key("network_model", _enum(NetworkModel, aliases={"": "tcfilter"})),
}

TABLES: Mapping[tuple[str, ...], Mapping[str, Key]] = {
    ("hypervisor", "builtin"): BUILTIN_KEYS,
    ("hypervisor", "qemu"): QEMU_KEYS,
    ("agent", "kata"): AGENT_KEYS,
    ("runtime",): RUNTIME_KEYS,
}

TABLE_ALIASES: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("hypervisor", "dragonball"): ("hypervisor", "builtin"),
}
"""Kata's names of tables that are ours by another: its monitor in the runtime's process."""
