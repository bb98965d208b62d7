import asyncio
import logging

import pytest

from harness.loop import on_loop
from kata_hybrid.aio.supervisor import Supervisor


@on_loop
async def test_closing_cancels_what_runs() -> None:
    supervisor = Supervisor("test")
    task = supervisor.start(asyncio.sleep(60), name="sleeper")
    await supervisor.close()
    assert task.cancelled()
    assert len(supervisor) == 0


@on_loop
async def test_a_result_can_be_awaited() -> None:
    async with Supervisor("test") as supervisor:
        assert await supervisor.start(asyncio.sleep(0, "done"), name="quick") == "done"


async def fail() -> None:
    raise ValueError("broken")


def test_a_failure_is_logged_with_its_task(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with Supervisor("test") as supervisor:
            supervisor.start(fail(), name="failing")
            await supervisor.drained()

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    (record,) = caplog.records
    assert vars(record)["task"] == "failing"
    assert record.exc_info is not None


@on_loop
async def test_nothing_starts_after_closing() -> None:
    supervisor = Supervisor("test")
    await supervisor.close()
    with pytest.raises(RuntimeError, match="test is closed"):
        supervisor.start(asyncio.sleep(0), name="late")
