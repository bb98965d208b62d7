import os
from pathlib import Path

import pytest

from harness.loop import on_loop
from kata_hybrid.errors import NotFoundError
from kata_hybrid.runtimes.base import TaskEvent
from kata_hybrid.runtimes.registry import build_runtime
from kata_hybrid.runtimes.virt.sandbox import VirtSandbox
from kata_hybrid.types import ContainerId, SandboxId


class Sink:
    """Takes events."""

    def __init__(self) -> None:
        self.events: list[TaskEvent] = []

    def emit(self, event: TaskEvent) -> None:
        self.events.append(event)


@on_loop
async def test_a_runtime_is_made_without_starting_anything(tmp_path: Path) -> None:
    sink = Sink()
    built = build_runtime(
        sandbox_id=SandboxId("s"),
        namespace="k8s",
        run_dir=tmp_path,
        config_path=None,
        sink=sink,
    )
    runtime = built.runtime
    assert isinstance(runtime, VirtSandbox)
    with pytest.raises(NotFoundError):
        built.sandbox.status()
    assert runtime.is_empty
    assert runtime.task_pid(ContainerId("c1")) == 0
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - instantly done
    await runtime.close()
    assert sink.events == []
