"""Between our values and the agent protocol's messages: the only place in the shim that knows both.

OCI documents are converted by walking the message descriptors: a JSON key belongs to the field of
the same name, case ignored, which is how the protocol's authors named them. So each wrong type
anywhere in a spec is found here and named by its path. Keys the protocol has no field for are
left out, as by every runtime that speaks it.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeAlias

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from kata_hybrid.errors import InvalidSpecError
from kata_hybrid.protos import agent_pb2, agent_types_pb2, oci_pb2
from kata_hybrid.types import (
    BlockIoEntry,
    ContainerStats,
    CpuStats,
    GuestDetails,
    GuestDevice,
    GuestStorage,
    HugetlbStats,
    JsonObject,
    MemoryEntry,
    MemoryStats,
)

_Field: TypeAlias = Any
"""A field descriptor: protobuf's implementations each have a class of their own for it."""
_RENAMED: Final = {("grpc.Spec", "ociversion"): "version"}
_INTEGER_RANGES: Final = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}


def spec_message(spec: JsonObject) -> oci_pb2.Spec:
    """Convert an OCI spec.

    Raises:
        InvalidSpecError: a field has the wrong type or is out of range; the text names it.
    """
    message = oci_pb2.Spec()
    _fill(message, spec, "")
    return message


def process_message(process: JsonObject) -> oci_pb2.Process:
    """Convert an OCI process.

    Raises:
        InvalidSpecError: as for :func:`spec_message`.
    """
    message = oci_pb2.Process()
    _fill(message, process, "process.")
    return message


def resources_message(resources: JsonObject) -> oci_pb2.LinuxResources:
    """Convert OCI LinuxResources.

    Raises:
        InvalidSpecError: as for :func:`spec_message`.
    """
    message = oci_pb2.LinuxResources()
    _fill(message, resources, "resources.")
    return message


def storage_messages(storages: Iterable[GuestStorage]) -> list[agent_pb2.Storage]:
    """Convert what the agent has to mount."""
    return [
        agent_pb2.Storage(
            driver=storage.driver,
            driver_options=storage.driver_options,
            source=storage.source,
            fstype=storage.fstype,
            options=storage.options,
            mount_point=storage.mount_point,
            shared=storage.is_shared,
            fs_group=_group_message(storage),
        )
        for storage in storages
    ]


def _group_message(storage: GuestStorage) -> agent_pb2.FSGroup | None:
    if storage.group_id is None:
        return None
    policy = (
        agent_types_pb2.OnRootMismatch if storage.is_group_kept_if_right else agent_types_pb2.Always
    )
    return agent_pb2.FSGroup(group_id=storage.group_id, group_change_policy=policy)


def device_messages(devices: Iterable[GuestDevice]) -> list[agent_pb2.Device]:
    """Convert the disks that a container has as devices."""
    return [
        agent_pb2.Device(
            # One names a node of the guest's, the others a place on a bus.
            **{"vm_path" if device.driver == "mmioblk" else "id": device.source},
            type=device.driver,
            container_path=device.container_path,
        )
        for device in devices
    ]


def guest_details(reply: agent_pb2.GuestDetailsResponse) -> GuestDetails:
    """Convert what the agent says of itself."""
    agent = reply.agent_details
    return GuestDetails(
        agent_version=agent.version,
        storage_handlers=tuple(agent.storage_handlers),
        extra_features=frozenset(agent.extra_features),
        supports_seccomp=agent.supports_seccomp,
        memory_block_bytes=reply.mem_block_size_bytes,
    )


def container_stats(reply: agent_pb2.StatsContainerResponse) -> ContainerStats:
    """Convert a container's statistics; what the guest left out is zero."""
    stats = reply.cgroup_stats
    cpu, memory, block_io = stats.cpu_stats, stats.memory_stats, stats.blkio_stats
    return ContainerStats(
        cpu=CpuStats(
            total_ns=cpu.cpu_usage.total_usage,
            user_ns=cpu.cpu_usage.usage_in_usermode,
            kernel_ns=cpu.cpu_usage.usage_in_kernelmode,
            per_cpu_ns=tuple(cpu.cpu_usage.percpu_usage),
            periods=cpu.throttling_data.periods,
            throttled_periods=cpu.throttling_data.throttled_periods,
            throttled_ns=cpu.throttling_data.throttled_time,
        ),
        memory=MemoryStats(
            usage=_memory_entry(memory.usage),
            swap=_memory_entry(memory.swap_usage),
            kernel=_memory_entry(memory.kernel_usage),
            raw=dict(memory.stats),
        ),
        pids_current=stats.pids_stats.current,
        pids_limit=stats.pids_stats.limit,
        block_io=tuple(
            BlockIoEntry(major=entry.major, minor=entry.minor, op=entry.op, value=entry.value)
            for entry in block_io.io_service_bytes_recursive
        ),
        hugetlb=tuple(
            HugetlbStats(
                page_size=size, usage=page.usage, max_usage=page.max_usage, failcnt=page.failcnt
            )
            for size, page in sorted(stats.hugetlb_stats.items())
        ),
    )


def _memory_entry(data: agent_pb2.MemoryData) -> MemoryEntry:
    return MemoryEntry(
        usage=data.usage, max_usage=data.max_usage, failcnt=data.failcnt, limit=data.limit
    )


def _fill(message: Message, value: object, path: str) -> None:
    """Set the fields of ``message`` from a JSON object; ``path`` ends in a dot unless empty."""
    if not isinstance(value, Mapping):
        raise _wrong(path.rstrip(".") or "OCI spec", "an object", value)
    fields = {field.name.lower(): field for field in message.DESCRIPTOR.fields}
    for key, item in value.items():
        name = key.lower()
        field = fields.get(_RENAMED.get((message.DESCRIPTOR.full_name, name), name))
        if field is not None and item is not None:
            _set(message, field, item, f"{path}{key}")


def _set(message: Message, field: _Field, value: object, path: str) -> None:
    element: Descriptor | None = field.message_type
    if element is not None and element.GetOptions().map_entry:
        if not isinstance(value, Mapping):
            raise _wrong(path, "an object", value)
        target = getattr(message, field.name)
        for key, item in value.items():
            place = f"{path}[{key!r}]"
            name = _scalar(element.fields_by_name["key"], key, place)
            target[name] = _scalar(element.fields_by_name["value"], item, place)
    elif field.is_repeated:
        if not isinstance(value, list):
            raise _wrong(path, "an array", value)
        target = getattr(message, field.name)
        for index, item in enumerate(value):
            place = f"{path}[{index}]"
            if element is None:
                target.append(_scalar(field, item, place))
            else:
                _fill(target.add(), item, f"{place}.")
    elif element is not None:
        target = getattr(message, field.name)
        target.SetInParent()
        _fill(target, value, f"{path}.")
    else:
        setattr(message, field.name, _scalar(field, value, path))


def _scalar(field: _Field, value: object, path: str) -> object:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if not isinstance(value, str):
            raise _wrong(path, "a string", value)
        try:
            value.encode()
        except UnicodeEncodeError as exc:
            message = f"{path} is not valid Unicode"
            raise InvalidSpecError(message) from exc
        return value
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        if not isinstance(value, bool):
            raise _wrong(path, "true or false", value)
        return value
    low, high = _INTEGER_RANGES[kind]
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(path, "an integer", value)
    if not low <= value <= high:
        message = f"{path} must be from {low} to {high}, is {value}"
        raise InvalidSpecError(message)
    return value


def _wrong(path: str, expected: str, value: object) -> InvalidSpecError:
    return InvalidSpecError(f"{path} must be {expected}, is {type(value).__name__}")
