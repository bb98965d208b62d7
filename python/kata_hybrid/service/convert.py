"""Between containerd's messages and our values. The type URLs of section 3 of shim v2 are here."""

import json
import re
from pathlib import Path
from typing import Final

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from kata_hybrid.errors import InvalidArgumentError, InvalidIdError
from kata_hybrid.protos import containerd_events_pb2 as events_pb2
from kata_hybrid.protos import containerd_types_pb2, runtimeoptions_pb2
from kata_hybrid.runtimes.base import (
    ExecAdded,
    ExecStarted,
    TaskCreated,
    TaskDeleted,
    TaskEvent,
    TaskExited,
    TaskOom,
    TaskPaused,
    TaskResumed,
    TaskStarted,
)
from kata_hybrid.types import ContainerId, ExecId, JsonObject, Mount, Stdio

OCI_PROCESS_URL: Final = "types.containerd.io/opencontainers/runtime-spec/1/Process"
OCI_RESOURCES_URL: Final = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
_RUNTIME_OPTIONS: Final = "runtimeoptions.v1.Options"
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_MAX_ID_LENGTH: Final = 76
"""containerd's own limit (pkg/identifiers)."""
_NS: Final = 1_000_000_000


def container_id(text: str) -> ContainerId:
    """Check a container id.

    Raises:
        InvalidIdError: empty, too long, or with a character that has no place in a path.
    """
    return ContainerId(_checked_id(text, "container id"))


def exec_id(text: str) -> ExecId | None:
    """Check an exec id; empty means the container's own process.

    Raises:
        InvalidIdError: too long, or with a character that has no place in a path.
    """
    return ExecId(_checked_id(text, "exec id")) if text else None


def _checked_id(text: str, what: str) -> str:
    shown = text if len(text) <= _MAX_ID_LENGTH else f"{text[:32]}…"
    if len(text) > _MAX_ID_LENGTH:
        message = f"{what} {shown!r} has {len(text)} characters; {_MAX_ID_LENGTH} are allowed"
        raise InvalidIdError(message)
    if not _ID.fullmatch(text):
        message = f"{what} {shown!r} must be letters, digits, '_', '.', '-', not '.' first"
        raise InvalidIdError(message)
    return text


def mounts(entries: list[containerd_types_pb2.Mount]) -> tuple[Mount, ...]:
    """Convert a root file system's mounts."""
    return tuple(
        Mount(
            type=entry.type,
            source=entry.source,
            target=entry.target,
            options=tuple(entry.options),
        )
        for entry in entries
    )


def config_path(options: AnyMessage) -> Path | None:
    """Return the configuration file named by runtime options.

    Options meant for another runtime are ignored, as clients send runc's to everybody.

    Raises:
        InvalidArgumentError: they are ours but cannot be decoded, or name what is no path.
    """
    if options.type_url.rpartition("/")[2] != _RUNTIME_OPTIONS:
        return None
    try:
        decoded = runtimeoptions_pb2.Options.FromString(options.value)
    except DecodeError as exc:
        message = f"runtime options of type {options.type_url} cannot be decoded"
        raise InvalidArgumentError(message) from exc
    if "\0" in decoded.config_path:
        message = f"configuration file {decoded.config_path!r} can be no path"
        raise InvalidArgumentError(message)
    return Path(decoded.config_path) if decoded.config_path else None


def json_any(value: AnyMessage, *, type_url: str) -> JsonObject:
    """Decode an Any that holds JSON.

    Raises:
        InvalidArgumentError: it is of another type, or is no JSON object.
    """
    if value.type_url != type_url:
        message = f"expected {type_url}, got {value.type_url or 'nothing'}"
        raise InvalidArgumentError(message)
    try:
        decoded = json.loads(value.value)
    except (ValueError, RecursionError) as exc:
        message = f"{type_url} is not valid JSON: {exc}"
        raise InvalidArgumentError(message) from exc
    if not isinstance(decoded, dict):
        message = f"{type_url} must be a JSON object, is {type(decoded).__name__}"
        raise InvalidArgumentError(message)
    return decoded


def timestamp(time_ns: int) -> Timestamp:
    """Convert UTC nanoseconds since the epoch."""
    return Timestamp(seconds=time_ns // _NS, nanos=time_ns % _NS)


def event_message(event: TaskEvent) -> tuple[str, Message]:  # noqa: PLR0911 - one for each kind
    """Return the topic and the message of an event."""
    match event:
        case TaskCreated():
            return "/tasks/create", events_pb2.TaskCreate(
                container_id=event.container_id,
                bundle=event.bundle,
                rootfs=[_mount_message(mount) for mount in event.rootfs],
                io=_stdio_message(event.stdio),
                pid=event.pid,
            )
        case TaskStarted():
            return "/tasks/start", events_pb2.TaskStart(
                container_id=event.container_id, pid=event.pid
            )
        case TaskExited():
            return "/tasks/exit", events_pb2.TaskExit(
                container_id=event.container_id,
                id=event.exec_id or event.container_id,
                pid=event.pid,
                exit_status=event.exit.status,
                exited_at=timestamp(event.exit.exited_at_ns),
            )
        case TaskDeleted():
            return "/tasks/delete", events_pb2.TaskDelete(
                container_id=event.container_id,
                pid=event.pid,
                exit_status=event.exit.status,
                exited_at=timestamp(event.exit.exited_at_ns),
            )
        case TaskOom():
            return "/tasks/oom", events_pb2.TaskOOM(container_id=event.container_id)
        case ExecAdded():
            return "/tasks/exec-added", events_pb2.TaskExecAdded(
                container_id=event.container_id, exec_id=event.exec_id
            )
        case ExecStarted():
            return "/tasks/exec-started", events_pb2.TaskExecStarted(
                container_id=event.container_id, exec_id=event.exec_id, pid=event.pid
            )
        case TaskPaused():
            return "/tasks/paused", events_pb2.TaskPaused(container_id=event.container_id)
        case TaskResumed():
            return "/tasks/resumed", events_pb2.TaskResumed(container_id=event.container_id)


def _mount_message(mount: Mount) -> containerd_types_pb2.Mount:
    return containerd_types_pb2.Mount(
        type=mount.type, source=mount.source, target=mount.target, options=mount.options
    )


def _stdio_message(stdio: Stdio) -> events_pb2.TaskIO:
    return events_pb2.TaskIO(
        stdin=stdio.stdin, stdout=stdio.stdout, stderr=stdio.stderr, terminal=stdio.terminal
    )
