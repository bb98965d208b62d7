"""What each key of ``configuration.toml`` means, for people and their editors.

Makes the tables of the reference page, whose prose is written by hand
(``scripts/configuration_reference.py`` puts them in), and a JSON Schema. Keys, defaults and what is
taken come from ``keys.py`` and ``model.py``. Imported by nothing that runs containers.
"""

import json
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Final

from kata_hybrid.config.keys import TABLE_ALIASES, TABLES, Key
from kata_hybrid.config.model import Config

Table = tuple[str, ...]
_DRAFT: Final = "https://json-schema.org/draft/2020-12/schema"

MEANINGS: Final[Mapping[Table, Mapping[str, str]]] = {
    ("hypervisor", "builtin"): {
        "kernel": "the guest's kernel",
        "initrd": "its initial file system, with the agent",
        "kernel_params": "appended to the guest kernel's command line; the last of two wins",
        "default_vcpus": "processors, at most 32; below 0: all of the host's",
        "default_maxvcpus": (
            "most processors of a machine, whatever annotations and limits ask (an annotation"
            " can lower it); 0: what the host has"
        ),
        "default_memory": (
            "MiB of memory, up to 1048576; taken from the host as the guest touches it, "
            "unless it is huge pages"
        ),
        "default_maxmemory": (
            "MiB; most memory of a machine, whatever annotations and limits ask; 0: what the "
            "host has, which is the most in any case"
        ),
        "overhead_vcpus": "processors a machine has besides what its containers are limited to",
        "overhead_memory": "MiB of memory a machine has besides what its containers are limited to",
        "enable_hugepages": (
            "memory of 2 MiB pages from the host's pool, taken at the start; `default_memory`"
            " has to be even"
        ),
        "shared_fs": (
            "how host folders reach the guest; `inline-virtio-fs` is the same: no daemon serves it"
        ),
        "virtio_fs_cache": (
            "`never`, `auto` or `always`; with `never`, kernels before 6.6 refuse to map "
            "files shared"
        ),
        "block_device_aio": (
            "who does the I/O of disks: `io_uring`, where it is allowed, or `threads` (the "
            "machine's I/O thread)"
        ),
        "block_device_cache_direct": "disks bypass the host's page cache",
        "disk_rate_limiter_bw_max_rate": (
            "bits that each disk may read and write in a second; 0: no limit"
        ),
        "disk_rate_limiter_bw_one_time_burst": "bits on top of that, once",
        "disk_rate_limiter_ops_max_rate": (
            "requests that each disk may serve in a second; 0: no limit"
        ),
        "disk_rate_limiter_ops_one_time_burst": "requests on top of that, once",
        "reclaim_guest_freed_memory": (
            "the guest reports memory it no longer uses, and the host takes it back"
        ),
        "enable_debug": "the kernel's messages on the console",
        "enable_annotations": (
            "names below `io.katacontainers.config.hypervisor.` that pods may use: regular "
            "expressions for the whole name"
        ),
    },
    ("hypervisor", "qemu"): {
        "path": "the QEMU program; empty: looked for in `PATH` and the usual places",
        "valid_hypervisor_paths": (
            "patterns (`*`, `?`, `[…]`, none of which stands for a slash) of programs that "
            "the annotation `path` may name; never one with `..`"
        ),
        "kernel": "the guest's kernel",
        "initrd": "its initial file system, with the agent",
        "machine_type": "the machine; only `q35`",
        "machine_accelerators": (
            "appended to the machine's options; `accel=kvm` or `accel=tcg` skips the choice "
            "by probing"
        ),
        "cpu_features": "appended to the CPU model, such as `pmu=off`",
        "kernel_params": "appended to the guest kernel's command line; the last of two wins",
        "default_vcpus": "processors; below 0: all of the host's",
        "default_maxvcpus": (
            "most processors of a machine, whatever annotations and limits ask (an annotation"
            " can lower it); 0: what the host has"
        ),
        "default_memory": "MiB of memory; taken from the host as the guest touches it",
        "default_maxmemory": (
            "MiB; most memory of a machine, whatever annotations and limits ask; 0: what the "
            "host has, which is the most in any case"
        ),
        "overhead_vcpus": "processors a machine has besides what its containers are limited to",
        "overhead_memory": "MiB of memory a machine has besides what its containers are limited to",
        "entropy_source": "what feeds the guest's random number device",
        "valid_entropy_sources": "the same for the annotation `entropy_source`",
        "shared_fs": "how host folders reach the guest; only `virtio-fs`",
        "virtio_fs_daemon": "the virtiofsd program (QEMU's or the Rust one); empty: looked for",
        "valid_virtio_fs_daemon_paths": "the same for the annotation `virtio_fs_daemon`",
        "virtio_fs_cache": (
            "`never`, `auto` or `always`; with `never`, kernels before 6.6 refuse to map "
            "files shared"
        ),
        "virtio_fs_extra_args": "more arguments for virtiofsd",
        "enable_debug": "the kernel's messages on the console, virtiofsd's debug log",
        "enable_annotations": (
            "names below `io.katacontainers.config.hypervisor.` that pods may use: regular "
            "expressions for the whole name"
        ),
    },
    ("agent", "kata"): {
        "enable_debug": "the agent logs its debug messages",
        "debug_console_enabled": "a shell on vsock port 1026, if the guest's image has one",
        "server_port": "the agent's vsock port",
        "log_port": "the vsock port of its log",
        "reconnect_timeout_ms": "how long a guest may take to boot and answer; at least 10000",
        "create_container_timeout": "seconds; the deadline of every request that has one",
        "health_check_request_timeout_ms": "the deadline of a health check",
        "container_pipe_size": "bytes of a container's pipes in the guest; 0: the kernel's default",
        "enable_annotations": "names below `io.katacontainers.config.agent.` that pods may use",
    },
    ("runtime",): {
        "hypervisor_name": "`builtin` (or `dragonball`) or `qemu`",
        "agent_name": "which `[agent.…]` table counts",
        "name": "the runtime",
        "enable_debug": "the shim logs debug messages",
        "log_level": "`trace`, `debug`, `info`, `warn`, `error`, `critical`",
        "disable_guest_seccomp": "leave seccomp profiles out of the guest's containers",
        "internetworking_model": (
            "how a link of the pod is joined to the guest's card: `tcfilter` redirects all "
            "frames; `none` makes the card and leaves the rest to somebody else"
        ),
        "enable_annotations": "names below `io.katacontainers.config.runtime.` that pods may use",
        "emptydir_mode": (
            "what an `emptyDir` on disk is in the guest: `shared-fs`, the host's folder; "
            "`block-plain`, a disk in it, which its containers share (needs e2fsprogs)"
        ),
        "sandbox_cgroup_only": (
            "the machine and all that serves it are in the pod's cgroup (see below); `false`:"
            " they stay where containerd is"
        ),
        "static_sandbox_resource_mgmt": (
            "a machine is as large as the limits of its pod or container ask (see below); "
            "`false`: as the defaults say"
        ),
    },
}
"""For each table its keys, in the order of the page."""


def markdown_table(table: Table) -> str:
    """Return the rows of a table of the page."""
    rows = ["| Key | Default | Meaning |", "|---|---|---|"]
    for name, meaning in MEANINGS[table].items():
        rows.append(f"| `{name}` | {_shown_default(table, TABLES[table][name])} | {meaning} |")
    return "\n".join(rows)


def json_schema() -> dict[str, object]:
    """Return a JSON Schema of the file (draft 2020-12); keys that are ignored are allowed."""
    tables = {table: _properties(table) for table in TABLES}
    tables |= {alias: tables[table] for alias, table in TABLE_ALIASES.items()}
    tree: dict[str, object] = {}
    for table, properties in tables.items():
        *parents, name = table
        place = tree
        for parent in parents:
            inner: dict[str, object] = {}
            place = place.setdefault(parent, {"type": "object", "properties": inner})["properties"]  # type: ignore[index]
        place[name] = {"type": "object", "properties": properties}
    return {
        "$schema": _DRAFT,
        "title": "configuration.toml of Kata Hybrid",
        "type": "object",
        "properties": tree,
    }


def _properties(table: Table) -> dict[str, object]:
    return {
        name: {
            "description": MEANINGS[table][name],
            **key.check.schema,
            **_schema_default(table, key),
        }
        for name, key in TABLES[table].items()
    }


def _default(table: Table, key: Key) -> object:
    """Return a key's default as TOML would say it; None where there is none."""
    value = getattr(Config().section(table), key.field)
    is_text = key.check.schema.get("type") == "string"
    if value is None and is_text:
        return ""
    return _plain(value, is_text=is_text)


def _plain(value: object, *, is_text: bool) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, re.Pattern):
        return value.pattern
    if isinstance(value, tuple):
        texts = [_plain(each, is_text=is_text) for each in value]
        return " ".join(map(str, texts)) if is_text else texts
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _schema_default(table: Table, key: Key) -> dict[str, object]:
    default = _default(table, key)
    return {} if default is None else {"default": default}


def _shown_default(table: Table, key: Key) -> str:
    default = _default(table, key)
    # A string, a number and a list are the same in JSON and in TOML.
    return "see above" if default is None else f"`{json.dumps(default)}`"
