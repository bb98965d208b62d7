import asyncio

import pytest

from kata_hybrid.aio.ending import Ending


def test_one_end_for_all_whoever_gives_up() -> None:
    async def run() -> None:
        begun = 0
        reached, go_on = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            nonlocal begun
            begun += 1
            reached.set()
            await go_on.wait()

        ending = Ending(work, name="end")
        async with asyncio.TaskGroup() as group:
            first = group.create_task(ending())
            await reached.wait()
            first.cancel()
            second = group.create_task(ending())
            await asyncio.wait([first])
            assert first.cancelled()
            assert not second.done()
            go_on.set()
        await ending()
        assert begun == 1

    asyncio.run(run())


def test_every_caller_gets_the_failure() -> None:
    async def run() -> None:
        async def work() -> None:
            raise OSError(5, "will not")

        ending = Ending(work, name="end")
        for _ in range(2):
            with pytest.raises(OSError, match="will not"):
                await ending()

    asyncio.run(run())
