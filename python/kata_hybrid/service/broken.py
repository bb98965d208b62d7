"""The task service of a shim that could not be built: every answer says why.

Without it a bad configuration would look to containerd like a crash. Deletion and shutdown work,
so that containerd can put away what it began.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from kata_hybrid import __version__
from kata_hybrid.errors import ContainerNotFoundError, InternalError, KataError
from kata_hybrid.protos import task_pb2
from kata_hybrid.ttrpc.server import Method

_ABSENT: Final[Mapping[str, type[Message]]] = {
    "State": task_pb2.StateRequest,
    "Start": task_pb2.StartRequest,
    "Delete": task_pb2.DeleteRequest,
    "Pids": task_pb2.PidsRequest,
    "Pause": task_pb2.PauseRequest,
    "Resume": task_pb2.ResumeRequest,
    "Checkpoint": task_pb2.CheckpointTaskRequest,
    "Kill": task_pb2.KillRequest,
    "Exec": task_pb2.ExecProcessRequest,
    "ResizePty": task_pb2.ResizePtyRequest,
    "CloseIO": task_pb2.CloseIORequest,
    "Update": task_pb2.UpdateTaskRequest,
    "Wait": task_pb2.WaitRequest,
    "Stats": task_pb2.StatsRequest,
}


def broken_services(error: Exception, *, on_shutdown: Callable[[], None]) -> Mapping[str, Method]:
    """Return methods that fail as ``error`` says."""
    reason: KataError
    if isinstance(error, KataError):
        reason = error
    else:
        reason = InternalError(f"{type(error).__name__}: {error}")

    async def create(_request: task_pb2.CreateTaskRequest) -> Message:
        raise reason

    async def connect(_request: task_pb2.ConnectRequest) -> Message:
        return task_pb2.ConnectResponse(shim_pid=os.getpid(), task_pid=0, version=__version__)

    async def shutdown(_request: task_pb2.ShutdownRequest) -> Message:
        on_shutdown()
        return Empty()

    methods = {name: Method(request_type=kind, handler=_absent) for name, kind in _ABSENT.items()}
    methods["Create"] = Method(request_type=task_pb2.CreateTaskRequest, handler=create)
    methods["Connect"] = Method(request_type=task_pb2.ConnectRequest, handler=connect)
    methods["Shutdown"] = Method(request_type=task_pb2.ShutdownRequest, handler=shutdown)
    return methods


async def _absent(request: Any) -> Message:
    raise ContainerNotFoundError(f"container {request.id} not found")
