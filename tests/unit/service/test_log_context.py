"""What a call logs says which container and exec it is about."""

import asyncio
from typing import Any

from kata_hybrid.observability.context import current_fields
from kata_hybrid.protos import task_pb2
from kata_hybrid.service.task import TaskService


class Spy:
    """A runtime that only notes the log context it is called in."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    async def wait(self, *_: object) -> Any:
        self.seen = current_fields()
        raise asyncio.CancelledError

    def task_pid(self, _: object) -> int:
        self.seen = current_fields()
        return 0


def call(method: str, request: object) -> dict[str, str]:
    spy = Spy()
    service = TaskService(spy, on_shutdown=lambda: None)  # type: ignore[arg-type]

    async def handle() -> None:
        try:
            await service.methods()[method].handler(request)
        except asyncio.CancelledError:
            return
        finally:
            assert current_fields() == {}

    asyncio.run(handle())
    return spy.seen


def test_a_call_names_its_container() -> None:
    assert call("Connect", task_pb2.ConnectRequest(id="c1")) == {"container": "c1"}


def test_a_call_for_an_exec_names_it_too() -> None:
    request = task_pb2.WaitRequest(id="c1", exec_id="e1")
    assert call("Wait", request) == {"container": "c1", "exec": "e1"}
