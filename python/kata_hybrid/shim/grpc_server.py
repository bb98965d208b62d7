"""The same methods over gRPC, for a daemon that was told so at ``start`` (containerd 2.x, Task v3).

Imported only then: grpcio takes longer to load than everything else. It binds the socket itself,
since it cannot take over a listening one. The socket's folder is open to our user only.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from kata_hybrid.aio.supervisor import Supervisor
from kata_hybrid.errors import InvalidArgumentError, KataError
from kata_hybrid.ttrpc.frame import MAX_PAYLOAD_BYTES
from kata_hybrid.ttrpc.server import Method, Services
from kata_hybrid.ttrpc.status import status_of

_STATUS_BY_CODE: Final = {status.value[0]: status for status in grpc.StatusCode}
_RECENTLY_S: Final = 60.0


class GrpcServer:
    """Serves a fixed set of services on a Unix socket."""

    def __init__(self, services: Services, *, path: Path, on_ready: Callable[[], None]) -> None:
        """Serve on ``path``; ``on_ready`` is called once it accepts connections."""
        self._services = services
        self._path = path
        self._on_ready = on_ready
        self._calls = Supervisor("grpc calls")
        self._waiting: set[asyncio.Task[bytes | KataError]] = set()
        self._server: grpc.aio.Server | None = None
        self._last_call = time.monotonic()

    @property
    def connection_count(self) -> int:
        """How many calls run, or ran recently: gRPC does not tell of its connections."""
        return len(self._calls) + (time.monotonic() - self._last_call < _RECENTLY_S)

    async def start(self, _listener: None = None) -> None:
        """Bind and serve.

        Raises:
            OSError: the socket cannot be bound.
        """
        limit = MAX_PAYLOAD_BYTES
        server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
            )
        )
        for service, methods in self._services.items():
            handlers = {name: self._handler(method) for name, method in methods.items()}
            server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(service, handlers),)
            )
        try:
            server.add_insecure_port(f"unix:{self._path}")
        except RuntimeError as exc:
            raise OSError(0, str(exc), str(self._path)) from exc
        await server.start()
        self._path.chmod(0o600)
        self._server = server
        self._on_ready()

    async def close(self, *, timeout_s: float) -> None:
        """Stop accepting, let calls that change something finish within the time. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        for task in tuple(self._waiting):
            task.cancel()
        await server.stop(grace=timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                await self._calls.drained()
        except TimeoutError:
            pass
        await self._calls.close()

    def _handler(self, method: Method) -> Any:
        async def handle(payload: bytes, context: Any) -> bytes:
            self._last_call = time.monotonic()
            try:
                return await self._call(method, payload)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                code, message = status_of(error)
                await context.abort(_STATUS_BY_CODE[code], message)
                raise  # pragma: no cover - abort raises

        # Without deserializer and serializer: a malformed request gets our code, not INTERNAL.
        behaviour: Callable[[bytes, Any], Awaitable[bytes]] = handle
        return grpc.unary_unary_rpc_method_handler(behaviour)

    async def _call(self, method: Method, payload: bytes) -> bytes:
        try:
            request = method.request_type.FromString(payload)
        except DecodeError as exc:
            message = f"malformed {method.request_type.DESCRIPTOR.name}"
            raise InvalidArgumentError(message) from exc
        task = self._calls.start(_reply(method, request), name="grpc call")
        if method.ends_with_client:
            self._waiting.add(task)
            task.add_done_callback(self._waiting.discard)
            reply = await task
        else:
            # gRPC cancels the handler when its client is gone; what it changes must not stop.
            reply = await asyncio.shield(task)
        if isinstance(reply, KataError):
            raise reply
        return reply


async def _reply(method: Method, request: Any) -> bytes | KataError:
    """Return the encoded reply, or the error to answer: expected, so no failure of the task."""
    try:
        reply = await method.handler(request)
    except KataError as error:
        return error
    return reply.SerializeToString()
