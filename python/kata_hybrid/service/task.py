"""The task service: containerd's 17 calls, each translated, checked and passed to the runtime.

Task v2 and v3 differ only in the service's name, so one table serves both, over ttRPC and gRPC.
Nothing is decided here but when the shim may go: once Shutdown was asked for and no container is
left, whichever comes last.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from kata_hybrid import __version__
from kata_hybrid.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    UnimplementedError,
)
from kata_hybrid.observability.context import log_context
from kata_hybrid.protos import runc_options_pb2, task_pb2
from kata_hybrid.runtimes.base import CreateRequest, Runtime, TaskEvent
from kata_hybrid.service import convert
from kata_hybrid.service.metrics import is_cgroup_v2_host, metrics
from kata_hybrid.ttrpc.server import Method
from kata_hybrid.types import Stdio

SERVICE_NAMES: Final = ("containerd.task.v2.Task", "containerd.task.v3.Task")
_PROCESS_DETAILS: Final = "containerd.runc.v1.ProcessDetails"
_MAX_SIGNAL: Final = 64


class Publisher(Protocol):
    """Where events go (``service/events.py``)."""

    def publish(self, topic: str, message: Message) -> None:
        """Queue an event. Never blocks."""


class PublishingSink:
    """Gives a runtime's events to the publisher, in the order they are emitted."""

    def __init__(self, publisher: Publisher) -> None:
        """Publish through ``publisher``."""
        self._publisher = publisher

    def emit(self, event: TaskEvent) -> None:
        """Queue ``event``."""
        topic, message = convert.event_message(event)
        self._publisher.publish(topic, message)


class TaskService:
    """One sandbox's task service."""

    def __init__(self, runtime: Runtime, *, on_shutdown: Callable[[], None]) -> None:
        """Serve ``runtime``; ``on_shutdown`` is called once, when the shim may end."""
        self._runtime = runtime
        self._on_shutdown = on_shutdown
        self._is_shutdown_asked = False
        self._is_v2_host = is_cgroup_v2_host()

    def methods(self) -> Mapping[str, Method]:
        """Return the table to register under each of :data:`SERVICE_NAMES`."""
        # Nobody would ever learn of a container whose creator is gone: its creation is undone.
        ending = {"Wait", "Create"}
        handlers: dict[str, tuple[type[Message], Callable[[Any], Any]]] = {
            "State": (task_pb2.StateRequest, self.state),
            "Create": (task_pb2.CreateTaskRequest, self.create),
            "Start": (task_pb2.StartRequest, self.start),
            "Delete": (task_pb2.DeleteRequest, self.delete),
            "Pids": (task_pb2.PidsRequest, self.pids),
            "Pause": (task_pb2.PauseRequest, self.pause),
            "Resume": (task_pb2.ResumeRequest, self.resume),
            "Checkpoint": (task_pb2.CheckpointTaskRequest, self.checkpoint),
            "Kill": (task_pb2.KillRequest, self.kill),
            "Exec": (task_pb2.ExecProcessRequest, self.exec),
            "ResizePty": (task_pb2.ResizePtyRequest, self.resize_pty),
            "CloseIO": (task_pb2.CloseIORequest, self.close_io),
            "Update": (task_pb2.UpdateTaskRequest, self.update),
            "Wait": (task_pb2.WaitRequest, self.wait),
            "Stats": (task_pb2.StatsRequest, self.stats),
            "Connect": (task_pb2.ConnectRequest, self.connect),
            "Shutdown": (task_pb2.ShutdownRequest, self.shutdown),
        }
        return {
            name: Method(
                request_type=kind,
                handler=_with_log_context(handler),
                ends_with_client=name in ending,
            )
            for name, (kind, handler) in handlers.items()
        }

    async def create(self, request: task_pb2.CreateTaskRequest) -> task_pb2.CreateTaskResponse:
        """Create a container; the first one starts the machine."""
        container_id = convert.container_id(request.id)
        if request.checkpoint or request.parent_checkpoint:
            message = f"container {container_id}: restoring a checkpoint is not implemented"
            raise UnimplementedError(message)
        bundle = Path(request.bundle)
        if not bundle.is_absolute() or "\0" in request.bundle:
            message = f"bundle must be an absolute path, is {request.bundle!r}"
            raise InvalidArgumentError(message)
        given = CreateRequest(
            container_id=container_id,
            bundle=bundle,
            rootfs=convert.mounts(list(request.rootfs)),
            stdio=_stdio(request),
            config_path=convert.config_path(request.options),
        )
        try:
            pid = await self._runtime.create(given)
        except UnimplementedError as exc:
            # containerd 2 takes that code for "no such method" and asks again in an older protocol,
            # of a sandbox that has failed by then (core/runtime/v2/shim.go, Create).
            raise FailedPreconditionError(str(exc)) from exc
        return task_pb2.CreateTaskResponse(pid=pid)

    async def start(self, request: task_pb2.StartRequest) -> task_pb2.StartResponse:
        """Start a container or an exec."""
        pid = await self._runtime.start(
            convert.container_id(request.id), convert.exec_id(request.exec_id)
        )
        return task_pb2.StartResponse(pid=pid)

    async def delete(self, request: task_pb2.DeleteRequest) -> task_pb2.DeleteResponse:
        """Forget a container or an exec that does not run."""
        pid, ended = await self._runtime.delete(
            convert.container_id(request.id), convert.exec_id(request.exec_id)
        )
        self._end_if_possible()
        return task_pb2.DeleteResponse(
            pid=pid,
            exit_status=ended.status,
            exited_at=convert.timestamp(ended.exited_at_ns),
        )

    async def state(self, request: task_pb2.StateRequest) -> task_pb2.StateResponse:
        """Describe a process, from memory."""
        state = self._runtime.state(
            convert.container_id(request.id), convert.exec_id(request.exec_id)
        )
        response = task_pb2.StateResponse(
            id=state.container_id,
            bundle=state.bundle,
            pid=state.pid,
            status=state.status.name,
            stdin=state.stdio.stdin,
            stdout=state.stdio.stdout,
            stderr=state.stdio.stderr,
            terminal=state.stdio.terminal,
            exec_id=state.exec_id or "",
        )
        if state.exit is not None:
            response.exit_status = state.exit.status
            response.exited_at.CopyFrom(convert.timestamp(state.exit.exited_at_ns))
        return response

    async def pids(self, request: task_pb2.PidsRequest) -> task_pb2.PidsResponse:
        """List a container's processes: the machine's pid for each, as the guest's mean nothing."""
        container_id = convert.container_id(request.id)
        execs = self._runtime.execs(container_id)
        pid = self._runtime.task_pid(container_id)
        processes = [task_pb2.ProcessInfo(pid=pid)]
        for exec_id in execs:
            details = runc_options_pb2.ProcessDetails(exec_id=exec_id).SerializeToString()
            info = AnyMessage(type_url=_PROCESS_DETAILS, value=details)
            processes.append(task_pb2.ProcessInfo(pid=pid, info=info))
        return task_pb2.PidsResponse(processes=processes)

    async def pause(self, request: task_pb2.PauseRequest) -> Empty:
        """Freeze a container."""
        await self._runtime.pause(convert.container_id(request.id))
        return Empty()

    async def resume(self, request: task_pb2.ResumeRequest) -> Empty:
        """Thaw a container."""
        await self._runtime.resume(convert.container_id(request.id))
        return Empty()

    async def checkpoint(self, _request: task_pb2.CheckpointTaskRequest) -> Empty:
        """Refuse: a container in a machine is not checkpointed by itself."""
        message = "checkpoint is not implemented"
        raise UnimplementedError(message)

    async def kill(self, request: task_pb2.KillRequest) -> Empty:
        """Signal a process, or all of a container's."""
        if request.signal > _MAX_SIGNAL:
            message = f"signal {request.signal} is not a Linux signal (0 to {_MAX_SIGNAL})"
            raise InvalidArgumentError(message)
        await self._runtime.kill(
            convert.container_id(request.id),
            convert.exec_id(request.exec_id),
            signal=request.signal,
            is_all=request.all,
        )
        return Empty()

    async def exec(self, request: task_pb2.ExecProcessRequest) -> Empty:
        """Register an exec."""
        exec_id = convert.exec_id(request.exec_id)
        if exec_id is None:
            message = "exec id is empty"
            raise InvalidArgumentError(message)
        await self._runtime.exec(
            convert.container_id(request.id),
            exec_id,
            process=convert.json_any(request.spec, type_url=convert.OCI_PROCESS_URL),
            stdio=_stdio(request),
        )
        return Empty()

    async def resize_pty(self, request: task_pb2.ResizePtyRequest) -> Empty:
        """Set a terminal's size."""
        await self._runtime.resize(
            convert.container_id(request.id),
            convert.exec_id(request.exec_id),
            rows=request.height,
            columns=request.width,
        )
        return Empty()

    async def close_io(self, request: task_pb2.CloseIORequest) -> Empty:
        """Let stdin end after what was written."""
        if request.stdin:
            await self._runtime.close_stdin(
                convert.container_id(request.id), convert.exec_id(request.exec_id)
            )
        return Empty()

    async def update(self, request: task_pb2.UpdateTaskRequest) -> Empty:
        """Change a container's limits."""
        await self._runtime.update(
            convert.container_id(request.id),
            resources=convert.json_any(request.resources, type_url=convert.OCI_RESOURCES_URL),
        )
        return Empty()

    async def wait(self, request: task_pb2.WaitRequest) -> task_pb2.WaitResponse:
        """Wait for a process to end."""
        ended = await self._runtime.wait(
            convert.container_id(request.id), convert.exec_id(request.exec_id)
        )
        return task_pb2.WaitResponse(
            exit_status=ended.status, exited_at=convert.timestamp(ended.exited_at_ns)
        )

    async def stats(self, request: task_pb2.StatsRequest) -> task_pb2.StatsResponse:
        """Read a container's resource use."""
        stats = await self._runtime.stats(convert.container_id(request.id))
        return task_pb2.StatsResponse(stats=metrics(stats, is_v2=self._is_v2_host))

    async def connect(self, request: task_pb2.ConnectRequest) -> task_pb2.ConnectResponse:
        """Say who serves; a container that is not there has pid 0."""
        return task_pb2.ConnectResponse(
            shim_pid=os.getpid(),
            task_pid=self._runtime.task_pid(convert.container_id(request.id)),
            version=__version__,
        )

    async def shutdown(self, _request: task_pb2.ShutdownRequest) -> Empty:
        """End the shim, or remember to as soon as the last container is deleted."""
        self._is_shutdown_asked = True
        self._end_if_possible()
        return Empty()

    def _end_if_possible(self) -> None:
        if self._is_shutdown_asked and self._runtime.is_empty:
            self._on_shutdown()


def _with_log_context(handler: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Have what a handler, and every task it starts, logs say which process it is about."""

    async def handle(request: Any) -> Any:
        with log_context(container=request.id, exec_id=getattr(request, "exec_id", "")):
            return await handler(request)

    return handle


def _stdio(request: task_pb2.CreateTaskRequest | task_pb2.ExecProcessRequest) -> Stdio:
    return Stdio(
        stdin=request.stdin,
        stdout=request.stdout,
        stderr=request.stderr,
        terminal=request.terminal,
    )
