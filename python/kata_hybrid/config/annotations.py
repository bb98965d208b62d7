"""Annotations of a pod that change the configuration for its machine alone.

``io.katacontainers.config.<part>.<name>``, part being hypervisor, agent or runtime. Each part's
table says by ``enable_annotations`` which names its pods may use: regular expressions for the whole
name. The values are texts: each is read as the kind of its key, then checked as in a file.
"""

import dataclasses
import fnmatch
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kata_hybrid.config.foreign import FOREIGN, MOVED, ForeignKey, Table
from kata_hybrid.config.keys import TABLES
from kata_hybrid.config.model import Config, HypervisorName, QemuConfig, Section
from kata_hybrid.errors import InvalidSpecError

PREFIX: Final = "io.katacontainers.config."
_MIB: Final = 1 << 20
_UNITS: Final = {"": _MIB, "k": 1 << 10, "m": _MIB, "g": 1 << 30, "t": 1 << 40}
_SIZE: Final = re.compile(r"([0-9]{1,18}) ?(|[kmgtKMGT])(?:i?[bB])?")
_DIGITS: Final = re.compile(r"[0-9]{1,18}")
_DECIMAL: Final = re.compile(r"-?[0-9]{1,18}(?:\.[0-9]{1,18})?")
_FLAGS: Final = {"true": True, "false": False}
_SHOWN: Final = 80
"""Characters of a value that an error or a notice shows."""


@dataclass(frozen=True, slots=True)
class _Annotation:
    """Which key of its part's table it sets, and how its text is read."""

    key: str
    read: Callable[[str], object]


def _text(text: str) -> str:
    return text


def _flag(text: str) -> bool:
    if text.strip() not in _FLAGS:
        message = "true or false"
        raise ValueError(message)
    return _FLAGS[text.strip()]


def _whole(text: str) -> int:
    if not _DIGITS.fullmatch(text.strip()):
        message = "a whole number"
        raise ValueError(message)
    return int(text)


def _number(text: str) -> float:
    if not _DECIMAL.fullmatch(text.strip()):
        message = "a number"
        raise ValueError(message)
    return float(text)


def _mebibytes(text: str) -> int:
    """Read ``2048`` (MiB), ``512M``, ``2 GiB``: binary units, whole MiB."""
    size = _SIZE.fullmatch(text.strip())
    if size is None:
        message = "a size such as 2048 (MiB), 512M or 2GiB"
        raise ValueError(message)
    digits, unit = size.groups()
    return int(digits) * _UNITS[unit.lower()] // _MIB


def _arguments(text: str) -> object:
    """Read arguments separated by commas, or a list in JSON: Kata's two runtimes differ."""
    if not text.startswith("["):
        return [argument for argument in text.split(",") if argument]
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        message = "a list of texts in JSON"
        raise ValueError(message) from error


_Names = Mapping[str, _Annotation]
_HYPERVISOR: Final[_Names] = {
    **{
        name: _Annotation(name, _text)
        for name in (
            "path",
            "kernel",
            "initrd",
            "machine_type",
            "machine_accelerators",
            "cpu_features",
            "entropy_source",
            "shared_fs",
            "virtio_fs_cache",
            "virtio_fs_daemon",
            "block_device_aio",
            "kernel_params",
        )
    },
    **{
        name: _Annotation(name, _flag)
        for name in ("enable_hugepages", "reclaim_guest_freed_memory", "block_device_cache_direct")
    },
    "default_vcpus": _Annotation("default_vcpus", _number),
    "default_max_vcpus": _Annotation("default_maxvcpus", _whole),
    "default_memory": _Annotation("default_memory", _mebibytes),
    "virtio_fs_extra_args": _Annotation("virtio_fs_extra_args", _arguments),
}
_AGENT: Final[_Names] = {
    "container_pipe_size": _Annotation("container_pipe_size", _whole),
}
_RUNTIME: Final[_Names] = {
    "create_container_timeout": _Annotation("create_container_timeout", _whole),
    "hypervisor_name": _Annotation("hypervisor_name", _text),
    "agent_name": _Annotation("agent_name", _text),
    # Kata spells the same runtime with a hyphen here.
    "name": _Annotation("name", lambda text: text.replace("-", "_")),
    "disable_guest_seccomp": _Annotation("disable_guest_seccomp", _flag),
    "sandbox_cgroup_only": _Annotation("sandbox_cgroup_only", _flag),
    "internetworking_model": _Annotation("internetworking_model", _text),
}
_OTHER_NAMES: Final = {
    "blk_logical_sector_size": "block_device_logical_sector_size",
    "blk_physical_sector_size": "block_device_physical_sector_size",
    "block_device_queue_size": "queue_size",
    "block_device_num_queues": "num_queues",
    "cc_init_data": "initdata",
    "prefetch_files.list": "prefetch_list_path",
}
"""Annotations of keys that are Kata's only and have another name in the file."""


def annotated(config: Config, annotations: Mapping[str, str]) -> Config:
    """Return the configuration as a pod's annotations change it.

    Where the file leaves the choice of the monitor open, one counts for each that allows it.

    Raises:
        InvalidSpecError: an annotation is not allowed, unknown, or wrong; the text names it.
    """
    names = [name for name in annotations if name.startswith(PREFIX)]
    # The runtime's first, which may choose the monitor; else in order of their names: what a pod
    # gets does not depend on the order of a map.
    for name in sorted(names, key=lambda name: (not name.startswith(f"{PREFIX}runtime."), name)):
        part, _, rest = name.removeprefix(PREFIX).partition(".")
        tables: list[Table]
        match part:
            case "hypervisor":
                chosen = config.runtime.hypervisor_name
                monitors = tuple(HypervisorName) if chosen is None else (chosen,)
                tables = [("hypervisor", monitor.value) for monitor in monitors]
                known = _HYPERVISOR
            case "agent":
                tables, known = [("agent", "kata")], _AGENT
            case "runtime":
                tables, known = [("runtime",)], _RUNTIME
            case _:
                message = f"annotation {name}: its part is none of hypervisor, agent, runtime"
                raise InvalidSpecError(message)
        before = config.runtime.hypervisor_name
        config = _apply(
            config, tables, known.get(rest), name=name, rest=rest, text=annotations[name]
        )
        if config.runtime.hypervisor_name not in {before, *config.described}:
            message = f"annotation {name}: the configuration does not describe {annotations[name]}"
            raise InvalidSpecError(message)
    return config


def _apply(
    config: Config,
    tables: list[Table],
    annotation: _Annotation | None,
    *,
    name: str,
    rest: str,
    text: str,
) -> Config:
    allowing = [table for table in tables if _is_allowed(config.section(table), rest)]
    if not allowing:
        where = " or ".join(f"[{'.'.join(table)}]" for table in tables)
        message = f"annotation {name} is not allowed: {where} lacks it in enable_annotations"
        raise InvalidSpecError(message)
    key = annotation.key if annotation else _OTHER_NAMES.get(rest, rest)
    places = [MOVED.get((table, key), (table, key))[0] for table in allowing]
    having = [table for table in places if key in TABLES[table]]
    if annotation is None or not having:
        foreign = [FOREIGN[table][key] for table in allowing if key in FOREIGN[table]]
        return _ignored(config, foreign[0] if foreign else None, name=name, text=text)
    changed: list[tuple[Table, Section]] = []
    errors: list[InvalidSpecError] = []
    for table in having:
        try:
            section = _changed(config.section(table), table, annotation, name=name, text=text)
        except InvalidSpecError as error:
            errors.append(error)
        else:
            changed.append((table, section))
    # While the monitor is not chosen, what only one of them can take is for that one.
    if not changed:
        raise errors[0]
    for table, section in changed:
        config = config.with_section(table, section)
    return config


def _is_allowed(section: Section, rest: str) -> bool:
    return any(pattern.fullmatch(rest) for pattern in section.enable_annotations)


def _changed(
    section: Section, table: Table, annotation: _Annotation, *, name: str, text: str
) -> Section:
    key = TABLES[table][annotation.key]
    try:
        value = key.check(annotation.read(text))
    except ValueError as error:
        message = f"annotation {name}: {text[:_SHOWN]!r} is not {error}"
        raise InvalidSpecError(message) from error
    if isinstance(section, QemuConfig):
        _check_path(section, annotation.key, name=name, text=text)
    fields: dict[str, Any] = {key.field: value}
    old = getattr(section, key.field)
    if annotation.key == "sandbox_cgroup_only" and old and not value:
        message = (
            f"annotation {name}: only the configuration takes a machine out of its pod's cgroup"
        )
        raise InvalidSpecError(message)
    if annotation.key == "kernel_params":
        fields[key.field] = _merged_parameters(old, fields[key.field])
    elif annotation.key == "default_maxvcpus" and old:
        # The file's own stays the most; 0 would be the host's.
        fields[key.field] = min(fields[key.field] or old, old)
    elif annotation.key == "virtio_fs_extra_args":
        fields[key.field] = (*old, *fields[key.field])
    return dataclasses.replace(section, **fields)


def _check_path(table: QemuConfig, key: str, *, name: str, text: str) -> None:
    """A program or a device of the host's has to be on the list that the file has for it."""
    lists = {
        "path": ("valid_hypervisor_paths", table.valid_paths),
        "virtio_fs_daemon": ("valid_virtio_fs_daemon_paths", table.valid_virtio_fs_daemons),
        "entropy_source": ("valid_entropy_sources", table.valid_entropy_sources),
    }
    if key not in lists:
        return
    what, patterns = lists[key]
    if not any(_is_like(text, pattern) for pattern in patterns):
        message = (
            f"annotation {name}: {text[:_SHOWN]!r} is not allowed by {what} in [hypervisor.qemu]"
        )
        raise InvalidSpecError(message)


def _is_like(path: str, pattern: str) -> bool:
    """Match as glob(3) does: no wildcard stands for a slash; and nothing leads upwards."""
    names, wanted = path.split("/"), pattern.split("/")
    return (
        ".." not in names
        and len(names) == len(wanted)
        and all(map(fnmatch.fnmatchcase, names, wanted))
    )


def _merged_parameters(old: tuple[str, ...], new: tuple[str, ...]) -> tuple[str, ...]:
    """Put new kernel parameters behind the old ones that they do not replace."""
    replaced = {parameter.partition("=")[0] for parameter in new}
    return (*(each for each in old if each.partition("=")[0] not in replaced), *new)


def _as_in_a_file(text: str) -> object:
    """Read a text as the kind it looks like, where nobody knows the kind of the key."""
    stripped = text.strip()
    if stripped in _FLAGS:
        return _FLAGS[stripped]
    if stripped in {"[]", "{}"}:
        return ""
    return int(stripped) if _DIGITS.fullmatch(stripped) else stripped


def _ignored(config: Config, foreign: ForeignKey | None, *, name: str, text: str) -> Config:
    """Note an annotation that only Kata knows, unless it has to be refused."""
    if foreign is None:
        message = f"annotation {name}: unknown"
        raise InvalidSpecError(message)
    if foreign.is_harmless(_as_in_a_file(text)):
        return config
    if foreign.refusal:
        message = f"annotation {name} = {text[:_SHOWN]!r} is not implemented: {foreign.refusal}"
        raise InvalidSpecError(message)
    return dataclasses.replace(config, notices=(*config.notices, f"{name} = {text[:_SHOWN]!r}"))
