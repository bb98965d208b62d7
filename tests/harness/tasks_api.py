"""The part of containerd's Tasks service that ``ctr`` has no command for.

``containerd.services.tasks.v1.Tasks/Update`` over gRPC on the daemon's socket. The request is two
fields, encoded here; the resources are JSON in an Any, as every client sends them.
"""

import json

import grpc

from harness.daemon import Containerd
from harness.wire import encode_any, encode_bytes, encode_string

_RESOURCES_URL = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"


def update_resources(
    containerd: Containerd,
    container_id: str,
    resources: dict[str, object],
    *,
    timeout_s: float = 20,
) -> None:
    """Change the resources of a running task.

    Raises:
        grpc.RpcError: containerd or the shim refused.
    """
    request = encode_string(1, container_id) + encode_bytes(
        2, encode_any(_RESOURCES_URL, json.dumps(resources).encode())
    )
    with grpc.insecure_channel(f"unix://{containerd.address}") as channel:
        call = channel.unary_unary(
            "/containerd.services.tasks.v1.Tasks/Update",
            request_serializer=bytes,
            response_deserializer=bytes,
        )
        call(
            request,
            timeout=timeout_s,
            metadata=(("containerd-namespace", containerd.namespace),),
        )
