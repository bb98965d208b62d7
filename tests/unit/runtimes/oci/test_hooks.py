"""Hooks are real programs, run as the spec says."""

import asyncio
import contextlib
import errno
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from harness.deadline import wait_until
from harness.loop import on_loop
from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.errors import FailedPreconditionError, InvalidSpecError
from kata_hybrid.persist.recovery import start_ticks
from kata_hybrid.runtimes.oci.hooks import Hook, HookRunner, parse_hooks

_STATE = {"ociVersion": "1.0.2", "id": "c", "pid": 7}


@contextlib.asynccontextmanager
async def runner() -> AsyncIterator[HookRunner]:
    reaper = ProcessReaper()
    try:
        async with asyncio.timeout(20):
            yield HookRunner(reaper)
    finally:
        reaper.close()


def shell(script: str, **fields: Any) -> dict[str, Any]:
    return {"path": "/bin/sh", "args": ["sh", "-c", script], **fields}


@on_loop
async def test_a_hook_has_the_state_its_arguments_and_its_environment_alone(
    tmp_path: Path,
) -> None:
    script = f'cat >"{tmp_path}/state"; env >"{tmp_path}/env"; echo "$0" >"{tmp_path}/name"'
    hook = {"path": "/bin/sh", "args": ["sh", "-c", script, "me"], "env": ["A=b=c", "EMPTY="]}
    async with runner() as hooks:
        await hooks.create(parse_hooks({"createRuntime": [hook]}), _STATE)
    assert json.loads((tmp_path / "state").read_text()) == _STATE
    environment = set((tmp_path / "env").read_text().split("\n"))
    assert {"A=b=c", "EMPTY="} <= environment
    assert not any(line.startswith(("HOME=", "PATH=/")) for line in environment)
    assert (tmp_path / "name").read_text() == "me\n"


@on_loop
async def test_they_run_in_order_until_one_of_the_creations_fails(tmp_path: Path) -> None:
    def say(word: str) -> dict[str, Any]:
        return shell(f'echo {word} >>"{tmp_path}/said"')

    document = {
        "createContainer": [say("4"), shell("echo because >&2; exit 3"), say("never")],
        "createRuntime": [say("3")],
        "prestart": [say("1"), say("2")],
    }
    async with runner() as hooks:
        with pytest.raises(FailedPreconditionError, match=r"createContainer hook /bin/sh: .* 3: b"):
            await hooks.create(parse_hooks(document), _STATE)
    assert (tmp_path / "said").read_text().split() == ["1", "2", "3", "4"]


@on_loop
async def test_what_fails_after_the_start_or_the_end_is_told_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = {
        point: [{"path": "/nowhere/hook"}, shell(f'echo {point} >>"{tmp_path}/said"')]
        for point in ("poststart", "poststop")
    }
    async with runner() as hooks:
        await hooks.started(parse_hooks(document), _STATE)
        await hooks.deleted(parse_hooks(document), _STATE)
    assert (tmp_path / "said").read_text().split() == ["poststart", "poststop"]
    errors = [record.__dict__["error"] for record in caplog.records]
    assert errors == [
        f"{point} hook /nowhere/hook: No such file or directory"
        for point in ("poststart", "poststop")
    ]


@on_loop
async def test_one_that_does_not_end_is_killed_with_what_it_started(tmp_path: Path) -> None:
    hook = shell(f'sleep 1000 & echo $! >"{tmp_path}/pid"; wait', timeout=1)
    async with runner() as hooks:
        with pytest.raises(FailedPreconditionError, match="not ended in 1 s"):
            await hooks.create(parse_hooks({"prestart": [hook]}), _STATE)
        pid = int((tmp_path / "pid").read_text())
        await asyncio.to_thread(
            wait_until, lambda: start_ticks(pid) is None, what="its end", timeout_s=10
        )


@on_loop
async def test_one_that_is_killed_is_named_with_the_signal() -> None:
    async with runner() as hooks:
        with pytest.raises(FailedPreconditionError, match=f"{-signal.SIGTERM}"):
            await hooks.create(parse_hooks({"prestart": [shell("kill $$")]}), _STATE)


@on_loop
async def test_of_much_output_the_end_is_told() -> None:
    script = "for n in $(seq 100000); do echo $n; done; echo because; exit 1"
    async with runner() as hooks:
        with pytest.raises(FailedPreconditionError, match=r"because$") as failure:
            await hooks.create(parse_hooks({"prestart": [shell(script)]}), _STATE)
    assert len(str(failure.value)) < 5000


@on_loop
async def test_what_a_hook_leaves_behind_is_not_waited_for(tmp_path: Path) -> None:
    script = f'sleep 1000 & echo $! >"{tmp_path}/pid"; echo because; exit 1'
    async with runner() as hooks:
        with pytest.raises(FailedPreconditionError, match="because"):
            await hooks.create(parse_hooks({"prestart": [shell(script)]}), _STATE)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


@on_loop
async def test_descriptors_that_have_run_out_are_a_failure_like_others(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptors(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "memfd_create", no_descriptors)
    async with runner() as hooks:
        await hooks.deleted(parse_hooks({"poststop": [shell("true")]}), _STATE)
    assert "Too many open files" in caplog.records[0].__dict__["error"]


def test_fields_left_out_have_their_defaults() -> None:
    assert parse_hooks(None) == {}
    assert parse_hooks({"startContainer": [{"path": "relative"}], "poststop": None}) == {}
    assert parse_hooks({"poststop": [{"path": "/a", "timeout": 7200}]}) == {
        "poststop": (Hook(path="/a", args=("/a",), env={}, timeout_s=3600),)
    }


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ([1], "hooks must be an object"),
        ({"prestart": {"path": "/a"}}, "hooks.prestart must be an array"),
        ({"prestart": ["/a"]}, r"hooks.prestart\[0\] must be an object"),
        ({"prestart": [{}]}, r"hooks.prestart\[0\].path must be absolute"),
        ({"poststop": [{"path": "/a"}, {"path": "a"}]}, r"poststop\[1\].path must be absolute"),
        ({"prestart": [{"path": "/a", "args": [1]}]}, r"prestart\[0\].args\[0\] must be a string"),
        ({"prestart": [{"path": "/a", "env": "A=b"}]}, r"prestart\[0\].env must be an array"),
        ({"prestart": [{"path": "/a", "env": ["A=b", "=c"]}]}, r"env\[1\] '=c' has no name"),
        ({"prestart": [{"path": "/a\0"}]}, "NUL"),
        ({"prestart": [{"path": "/a", "timeout": 0}]}, "above 0, is 0"),
        ({"prestart": [{"path": "/a", "timeout": True}]}, "above 0, is True"),
        ({"prestart": [{"path": "/a", "timeout": "5"}]}, "above 0, is '5'"),
    ],
)
def test_a_wrong_field_is_named(document: object, field: str) -> None:
    with pytest.raises(InvalidSpecError, match=field):
        parse_hooks(document)
