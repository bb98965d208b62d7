"""The serving shim: one process per sandbox, started by ``start.py`` with its socket on fd 3.

    prepare the process ─▶ loop: serve, publish events, reap ─▶ (Shutdown, idle, SIGTERM) ─▶ exit
      mount namespace,                                            unlink the socket
      subreaper, limits                                           answer what is being handled
                                                                  flush events, release the sandbox
                                                                  remove the folder

This is where everything is wired together. SIGTERM, which a service manager sends to a whole unit,
never ends a machine that still has containers.
"""

# ruff: noqa: PLC0415 - imports wait until they are needed: start-up time is this folder's subject

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kata_hybrid import __version__
from kata_hybrid.aio.supervisor import Supervisor
from kata_hybrid.errors import InternalError
from kata_hybrid.observability import log
from kata_hybrid.observability.context import set_sandbox
from kata_hybrid.persist import recovery
from kata_hybrid.service.events import EventPublisher
from kata_hybrid.shim import address
from kata_hybrid.shim.args import Arguments
from kata_hybrid.shim.bootstrap import decode_any
from kata_hybrid.shim.failure import ShimError
from kata_hybrid.shim.start import GRPC_READY, LISTEN_FD
from kata_hybrid.ttrpc.server import Method, Server
from kata_hybrid.types import SandboxId

_LOG = logging.getLogger(__name__)

TASK_SERVICES: Final = ("containerd.task.v2.Task", "containerd.task.v3.Task")
"""The same methods and layouts under two names."""
IDLE_LIMIT_S: Final = 30.0
"""How long a shim waits for its first container."""
_OVER_LIMIT_S: Final = 10.0
"""How long one whose sandbox has come and gone waits for the Shutdown that should follow."""
_IDLE_POLL_S: Final = 2.5
_FINISH_CALLS_S: Final = 10.0
_FLUSH_EVENTS_S: Final = 5.0
_RELEASE_S: Final = 30.0
_PR_SCHED_CORE: Final = 62
_PR_SCHED_CORE_CREATE: Final = 1
_SCHED_CORE_SCOPE_PROCESS_GROUP: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ShimContext:
    """What the server was started with."""

    namespace: str
    sandbox_id: SandboxId
    container_id: str
    """The container whose ``start`` it was; the bundle is its."""
    bundle: Path
    run_dir: Path
    socket_path: Path
    containerd_address: str
    containerd_binary: str
    ttrpc_address: str
    options: tuple[str, bytes] | None
    """Runtime options: type_url and value."""
    protocol: str
    is_debug: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the server needs to know of the services it serves."""

    methods: Mapping[str, Mapping[str, Method]]
    """Those of each service, by its name."""
    is_empty: Callable[[], bool]
    """No container exists, so that exiting loses nothing."""
    is_over: Callable[[], bool]
    """No container can ever exist again, so that staying is of no use."""
    close: Callable[[], Awaitable[None]]
    """Release the sandbox: end its machine, its helpers, its mounts. Safe to repeat."""


BuildServices = Callable[[ShimContext, EventPublisher, Callable[[], None]], Services]


def build_services(
    context: ShimContext, events: EventPublisher, on_shutdown: Callable[[], None]
) -> Services:
    """Make the services and everything below them.

    ``on_shutdown`` is called by the service when the shim shall exit; it returns at once.

    Raises:
        KataError: the runtime cannot be made with these options on this host.
    """
    # Imported here so that a failure is reported to containerd, not lost with the process.
    from google.protobuf.any_pb2 import Any as AnyMessage

    from kata_hybrid.runtimes import registry
    from kata_hybrid.service import convert
    from kata_hybrid.service.sandbox import SERVICE_NAME, SandboxService
    from kata_hybrid.service.task import PublishingSink, TaskService

    type_url, value = context.options or ("", b"")
    built = registry.build_runtime(
        sandbox_id=context.sandbox_id,
        namespace=context.namespace,
        run_dir=context.run_dir,
        config_path=convert.config_path(AnyMessage(type_url=type_url, value=value)),
        sink=PublishingSink(events),
    )
    runtime = built.runtime
    tasks = TaskService(runtime, on_shutdown=on_shutdown).methods()
    sandbox = SandboxService(built.sandbox, on_shutdown=on_shutdown).methods()
    return Services(
        methods={**dict.fromkeys(TASK_SERVICES, tasks), SERVICE_NAME: sandbox},
        is_empty=lambda: runtime.is_empty,
        is_over=lambda: runtime.is_over,
        close=runtime.close,
    )


def serve(arguments: Arguments) -> int:
    """Be the server until it is told to exit.

    Returns:
        The exit status.
    """
    os.umask(0o022)
    is_child = not arguments.socket
    log.configure(fifo=Path("log") if is_child else None, is_debug=arguments.is_debug)
    if arguments.unknown:
        _LOG.warning("unknown flags ignored", extra={"flags": " ".join(arguments.unknown)})
    try:
        context = read_context(arguments)
        set_sandbox(context.sandbox_id)
        listener = _listener(arguments, context)
    except (ShimError, OSError):
        _LOG.exception("cannot serve")
        return 1
    build: BuildServices = build_services
    try:
        prepare_process()
    except (ImportError, OSError) as exc:
        build = _failing(exc)
    try:
        asyncio.run(run(context, listener, build=build))
    except Exception:  # noqa: BLE001 - the top of the process
        _LOG.critical("the shim failed", exc_info=True)
        return 1
    finally:
        remove_run_dir(context.run_dir)
    _LOG.info("shim exits")
    return 0


def read_context(arguments: Arguments) -> ShimContext:
    """Collect what ``start`` handed over.

    Raises:
        ShimError: it is incomplete.
        OSError: the options cannot be read.
    """
    arguments.require_identity()
    sandbox_id = address.environment(address.ENV_SANDBOX_ID) or arguments.id
    run_dir = address.environment(address.ENV_SANDBOX_DIR)
    if arguments.socket:
        # Run by hand on a socket of the caller's choice: nothing was prepared.
        run_dir = address.sandbox_dir(
            arguments.address, namespace=arguments.namespace, group=sandbox_id
        )
        address.make_dirs(run_dir)
    if not run_dir:
        raise ShimError(f"{address.ENV_SANDBOX_DIR} is not set: use the start action, or -socket")
    if os.path.dirname(run_dir) != address.sandboxes_dir():  # noqa: PTH120 - a text compare
        raise ShimError(f"{run_dir} is not below {address.sandboxes_dir()}")
    options = address.read_file(f"{run_dir}/{address.OPTIONS_FILE}")
    try:
        parsed = decode_any(options) if options else None
    except ValueError as exc:
        raise ShimError(f"runtime options are no protobuf Any: {exc}") from exc
    return ShimContext(
        namespace=arguments.namespace,
        sandbox_id=SandboxId(sandbox_id),
        container_id=arguments.id,
        bundle=Path.cwd(),
        run_dir=Path(run_dir),
        socket_path=Path(arguments.socket or f"{run_dir}/{address.SOCKET}").absolute(),
        containerd_address=arguments.address,
        containerd_binary=arguments.publish_binary,
        ttrpc_address=address.environment("TTRPC_ADDRESS"),
        options=parsed,
        protocol=address.environment(address.ENV_PROTOCOL) or "ttrpc",
        is_debug=arguments.is_debug,
    )


def prepare_process() -> None:
    """Set up what must be set before the first thread and the first child.

    Raises:
        OSError: the kernel refused something essential.
    """
    for number in (signal.SIGPIPE, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _close_inherited()
    from kata_hybrid._native import host

    host.enter_private_mount_namespace()
    host.set_child_subreaper()
    host.set_thread_name("kata-hybrid")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if address.environment("SCHED_CORE"):
        _own_core()


async def run(
    context: ShimContext,
    listener: socket.socket | None,
    *,
    build: BuildServices = build_services,
    idle_limit_s: float = IDLE_LIMIT_S,
) -> None:
    """Serve until told to exit, then leave in order."""
    exiting = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_loop_error)
    async with Supervisor("shim") as supervisor:
        events = EventPublisher(context.ttrpc_address, namespace=context.namespace)
        services = _build(build, context, events=events, on_shutdown=exiting.set)
        _handle_signals(loop, services, exiting)
        server = _make_server(context, services)
        await server.start(listener)
        _LOG.info(
            "shim serves",
            extra={
                "version": __version__,
                "pid": os.getpid(),
                "protocol": context.protocol,
                "namespace": context.namespace,
            },
        )
        # Everything imported so far lives as long as the process: keep the collector off it.
        gc.collect()
        gc.freeze()
        supervisor.start(
            _exit_when_idle(services, exiting=exiting, limit_s=idle_limit_s), name="idle"
        )
        try:
            await exiting.wait()
        finally:
            _LOG.debug("leaving")
            with contextlib.suppress(FileNotFoundError):
                context.socket_path.unlink()
            await server.close(timeout_s=_FINISH_CALLS_S)
            try:
                async with asyncio.timeout(_RELEASE_S):
                    await services.close()
            except TimeoutError:
                _LOG.error("the sandbox was not released in time", extra={"limit_s": _RELEASE_S})
            finally:
                await events.flush(_FLUSH_EVENTS_S)
                await events.close()


def remove_run_dir(run_dir: Path) -> None:
    """Remove the sandbox's folder, unless another shim listens in it already."""
    try:
        lock = address.SandboxLock()
    except OSError:
        _LOG.exception("cannot lock the run directory")
        return
    try:
        if (run_dir / address.SOCKET).exists():
            return
        # The record is of this process and of what it has released; it kills nobody now.
        problems = recovery.clean_up(os.fspath(run_dir))
        for problem in problems + recovery.sweep(os.fspath(run_dir.parent)):
            _LOG.warning("left behind", extra={"problem": problem})
    finally:
        lock.release()


def _build(
    build: BuildServices,
    context: ShimContext,
    *,
    events: EventPublisher,
    on_shutdown: Callable[[], None],
) -> Services:
    """Build the services; if that fails, ones that tell containerd why."""
    try:
        return build(context, events, on_shutdown)
    except Exception as exc:  # noqa: BLE001 - becomes the answer to Create
        _LOG.exception("cannot build the services")
        from kata_hybrid.service.broken import broken_services

        methods = dict.fromkeys(TASK_SERVICES, broken_services(exc, on_shutdown=on_shutdown))
        return Services(
            methods=methods, is_empty=lambda: True, is_over=lambda: False, close=_nothing
        )


def _failing(error: Exception) -> BuildServices:
    """Return a builder that fails: containerd shall be told, not find a closed connection."""

    def build(*_: object) -> Services:
        message = f"prepare the shim process: {error}"
        raise InternalError(message) from error

    return build


def _make_server(context: ShimContext, services: Services) -> Any:
    """Return a server of the protocol that was announced."""
    if context.protocol != "grpc":
        return Server(services.methods)
    from kata_hybrid.shim.grpc_server import GrpcServer

    return GrpcServer(services.methods, path=context.socket_path, on_ready=_tell_ready)


def _listener(arguments: Arguments, context: ShimContext) -> socket.socket | None:
    """Return the listening socket; nothing for gRPC, which makes its own."""
    if context.protocol == "grpc":
        os.set_inheritable(LISTEN_FD, False)  # noqa: FBT003 - positional only
        return None
    if arguments.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(os.fspath(context.socket_path))
        listener.listen()
        return listener
    listener = socket.socket(fileno=LISTEN_FD)
    listener.set_inheritable(False)
    return listener


def _tell_ready() -> None:
    """Tell ``start`` that the gRPC server listens."""
    with contextlib.suppress(OSError):
        os.write(LISTEN_FD, GRPC_READY)
        os.close(LISTEN_FD)


def _handle_signals(
    loop: asyncio.AbstractEventLoop, services: Services, exiting: asyncio.Event
) -> None:
    def end(name: str) -> None:
        if services.is_empty():
            _LOG.info("leaving on a signal", extra={"signal": name})
            exiting.set()
        else:
            _LOG.warning("signal ignored: containers are running", extra={"signal": name})

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number.name)
    loop.add_signal_handler(signal.SIGUSR1, _log_stacks)


def _log_stacks() -> None:
    """Log what every task and thread is doing."""
    for task in asyncio.all_tasks():
        frames = [f"{frame.f_code.co_qualname}:{frame.f_lineno}" for frame in task.get_stack()]
        _LOG.info("task", extra={"task": task.get_name(), "stack": " < ".join(frames)})
    for thread, top in sys._current_frames().items():  # noqa: SLF001 - documented, for debugging
        frames = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_stack(top)]
        _LOG.info("thread", extra={"thread_id": thread, "stack": " > ".join(frames)})


async def _exit_when_idle(services: Services, *, exiting: asyncio.Event, limit_s: float) -> None:
    """Leave when there has been no container for a while, whoever is still connected.

    containerd creates right after ``start`` and ends a shim it knows by a Shutdown. One that was
    restarted in between may keep a connection and never use it.
    """
    loop = asyncio.get_running_loop()
    idle_since = loop.time()
    while True:
        await asyncio.sleep(min(_IDLE_POLL_S, limit_s / 4))
        if not services.is_empty():
            idle_since = loop.time()
        elif loop.time() - idle_since >= (
            min(limit_s, _OVER_LIMIT_S) if services.is_over() else limit_s
        ):
            _LOG.warning("of no use any more: leaving", extra={"after_s": limit_s})
            exiting.set()
            return


def _close_inherited() -> None:
    """Close what a careless parent left open above our own descriptor."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        if int(name) > LISTEN_FD:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _own_core() -> None:
    """Give this process and its children a core scheduling cookie of their own."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    status = libc.prctl(
        _PR_SCHED_CORE, _PR_SCHED_CORE_CREATE, 0, _SCHED_CORE_SCOPE_PROCESS_GROUP, 0
    )
    if status != 0:
        _LOG.warning("no core scheduling", extra={"reason": os.strerror(ctypes.get_errno())})


def _log_loop_error(_: asyncio.AbstractEventLoop, problem: dict[str, Any]) -> None:
    _LOG.error(
        "unhandled error",
        extra={"where": problem.get("message")},
        exc_info=problem.get("exception"),
    )


async def _nothing() -> None:
    """Release nothing."""
