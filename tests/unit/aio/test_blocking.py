import asyncio
import threading
from collections.abc import Iterator

import pytest

from harness.loop import on_loop
from kata_hybrid.aio.blocking import call_in_thread


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@on_loop
async def test_the_result_comes_from_a_thread_of_that_name() -> None:
    name = await call_in_thread(
        lambda: threading.current_thread().name, name="worker", timeout_s=10
    )
    assert name == "worker"


@on_loop
async def test_what_the_work_raises_is_raised_here() -> None:
    def fail() -> None:
        raise PermissionError(13, "no", "/dev/kvm")

    with pytest.raises(PermissionError) as caught:
        await call_in_thread(fail, name="worker", timeout_s=10)
    assert caught.value.filename == "/dev/kvm"


def test_work_that_takes_too_long_is_given_up(gate: threading.Event) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            await call_in_thread(gate.wait, name="worker", timeout_s=0.01)

    asyncio.run(main())


def test_the_loop_goes_on_meanwhile(gate: threading.Event) -> None:
    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            call = group.create_task(call_in_thread(gate.wait, name="worker", timeout_s=10))
            await asyncio.sleep(0)
            gate.set()
        assert call.result()

    asyncio.run(main())


def test_a_loop_that_ended_first_is_not_missed(gate: threading.Event) -> None:
    threads: list[threading.Thread] = []

    def work() -> None:
        threads.append(threading.current_thread())
        gate.wait()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await call_in_thread(work, name="worker", timeout_s=0.01)

    asyncio.run(main())
    gate.set()
    threads[0].join(10)
    assert not threads[0].is_alive()
