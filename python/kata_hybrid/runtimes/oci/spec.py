"""The OCI spec of a bundle (runtime-spec, config.md and config-linux.md), read with care.

``config.json`` comes from containerd but its content comes from users. :func:`load` checks the
parts this project reads; ``agent/convert.py`` checks every other field against the message it
becomes, so a wrong type anywhere is named by its path before a machine is started.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kata_hybrid.errors import InvalidSpecError
from kata_hybrid.runtimes.oci.devices import BlockNode, parse_block_nodes
from kata_hybrid.runtimes.oci.hooks import Hooks, parse_hooks
from kata_hybrid.runtimes.oci.values import as_flag, as_list, as_object, as_text
from kata_hybrid.types import JsonObject

MAX_SPEC_BYTES: Final = 3 << 20
"""Below the 4 MiB a ttRPC message may hold, which the spec has to fit into."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecMount:
    """One entry of ``mounts``."""

    destination: str
    type: str
    source: str
    options: tuple[str, ...]

    @property
    def is_bind(self) -> bool:
        """The kernel takes a mount with either option as a bind, whatever its type says."""
        return self.type == "bind" or "bind" in self.options or "rbind" in self.options

    @property
    def is_read_only(self) -> bool:
        """Writes through it are refused."""
        return "ro" in self.options

    def to_json(self) -> JsonObject:
        """Encode as an entry of ``mounts``."""
        return {
            "destination": self.destination,
            "type": self.type,
            "source": self.source,
            "options": list(self.options),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """An OCI spec: ``raw`` is the whole document, the rest is what the host side reads of it."""

    raw: JsonObject
    root_path: str
    is_root_read_only: bool
    hostname: str
    mounts: tuple[SpecMount, ...]
    annotations: dict[str, str]
    namespaces: dict[str, str]
    """Namespace type (``pid``, ``network``, …) to its path, empty for a new one."""
    cgroups_path: str
    """``linux.cgroupsPath``; empty for none."""
    hooks: Hooks
    """Those that run on the host."""
    block_nodes: tuple[BlockNode, ...]
    """Block devices that the container is to have."""

    def state(self, *, container_id: str, bundle: Path, status: str, pid: int) -> JsonObject:
        """Describe its container as hooks are told (runtime-spec, runtime.md "State")."""
        return {
            "ociVersion": self.raw["ociVersion"],
            "id": container_id,
            "status": status,
            "pid": pid,
            "bundle": str(bundle),
            "annotations": self.annotations,
        }

    def name_servers(self) -> tuple[str, ...]:
        """Read the lines of the host file that is mounted on the container's resolv.conf."""
        for mount in self.mounts:
            if mount.destination == "/etc/resolv.conf" and mount.is_bind:
                with contextlib.suppress(OSError, UnicodeDecodeError):
                    text = Path(mount.source).read_text(encoding="utf-8")
                    return tuple(line for line in text.splitlines() if line.strip())
        return ()


def load(bundle: Path) -> Spec:
    """Read and check ``config.json`` of a bundle.

    Raises:
        InvalidSpecError: missing, too large, not JSON, or a field has the wrong type.
    """
    path = bundle / "config.json"
    try:
        size = path.stat().st_size
        if size > MAX_SPEC_BYTES:
            message = f"{path}: {size} bytes is more than the {MAX_SPEC_BYTES} a spec may have"
            raise InvalidSpecError(message)
        data = path.read_bytes()
    except OSError as exc:
        message = f"read OCI spec {path}: {exc.strerror}"
        raise InvalidSpecError(message) from exc
    return parse(data)


def parse(data: bytes) -> Spec:
    """Check an OCI spec.

    Raises:
        InvalidSpecError: not JSON, or a field has the wrong type; the text names it.
    """
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as exc:
        message = f"OCI spec is not valid JSON: {exc}"
        raise InvalidSpecError(message) from exc
    document = as_object(raw, "OCI spec")
    version = as_text(document.get("ociVersion", ""), "ociVersion")
    if not version.startswith("1."):
        message = f"ociVersion {version!r} is not supported; 1.x is"
        raise InvalidSpecError(message)
    root = as_object(document.get("root") or {}, "root")
    root_path = as_text(root.get("path", ""), "root.path")
    if not root_path:
        message = "root.path is missing from the OCI spec"
        raise InvalidSpecError(message)
    check_process(document.get("process"), "process")
    linux = as_object(document.get("linux") or {}, "linux")
    return Spec(
        raw=document,
        root_path=root_path,
        is_root_read_only=as_flag(root.get("readonly", False), "root.readonly"),
        hostname=as_text(document.get("hostname", ""), "hostname"),
        mounts=_mounts(document.get("mounts") or []),
        annotations=_text_map(document.get("annotations") or {}, "annotations"),
        namespaces=_namespaces(linux.get("namespaces") or []),
        cgroups_path=as_text(linux.get("cgroupsPath") or "", "linux.cgroupsPath"),
        hooks=parse_hooks(document.get("hooks")),
        block_nodes=parse_block_nodes(linux),
    )


def check_process(value: object, field: str) -> JsonObject:
    """Check an OCI process (of a spec or of an exec request).

    Raises:
        InvalidSpecError: it is missing, has no arguments, or a relative working folder.
    """
    process = as_object(value, field)
    arguments = as_list(process.get("args") or [], f"{field}.args")
    if not arguments:
        message = f"{field}.args must not be empty"
        raise InvalidSpecError(message)
    for index, argument in enumerate(arguments):
        as_text(argument, f"{field}.args[{index}]")
    cwd = as_text(process.get("cwd", ""), f"{field}.cwd")
    if not cwd.startswith("/"):
        message = f"{field}.cwd must be an absolute path, is {cwd!r}"
        raise InvalidSpecError(message)
    return process


def _text_map(value: object, field: str) -> dict[str, str]:
    entries = as_object(value, field)
    return {key: as_text(text, f"{field}[{key!r}]") for key, text in entries.items()}


def _mounts(value: object) -> tuple[SpecMount, ...]:
    mounts = []
    for index, item in enumerate(as_list(value, "mounts")):
        field = f"mounts[{index}]"
        entry = as_object(item, field)
        destination = as_text(entry.get("destination", ""), f"{field}.destination")
        if not destination.startswith("/"):
            message = f"{field}.destination must be an absolute path, is {destination!r}"
            raise InvalidSpecError(message)
        options = as_list(entry.get("options") or [], f"{field}.options")
        mounts.append(
            SpecMount(
                destination=destination,
                type=as_text(entry.get("type") or "", f"{field}.type"),
                source=as_text(entry.get("source") or "", f"{field}.source"),
                options=tuple(
                    as_text(option, f"{field}.options[{position}]")
                    for position, option in enumerate(options)
                ),
            )
        )
    return tuple(mounts)


def _namespaces(value: object) -> dict[str, str]:
    namespaces = {}
    for index, item in enumerate(as_list(value, "linux.namespaces")):
        field = f"linux.namespaces[{index}]"
        entry = as_object(item, field)
        kind = as_text(entry.get("type", ""), f"{field}.type")
        namespaces[kind] = as_text(entry.get("path") or "", f"{field}.path")
    return namespaces
