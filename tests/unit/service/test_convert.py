from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

from kata_hybrid.errors import InvalidArgumentError, InvalidIdError
from kata_hybrid.protos import containerd_events_pb2 as events_pb2
from kata_hybrid.protos import containerd_types_pb2, runtimeoptions_pb2
from kata_hybrid.runtimes.base import (
    ExecAdded,
    ExecStarted,
    TaskCreated,
    TaskDeleted,
    TaskEvent,
    TaskExited,
    TaskOom,
    TaskPaused,
    TaskResumed,
    TaskStarted,
)
from kata_hybrid.service import convert
from kata_hybrid.types import ContainerId, ExecId, ExitInfo, Mount, Stdio

C1 = ContainerId("c1")
E1 = ExecId("e1")
URL = convert.OCI_PROCESS_URL
ENDED = ExitInfo(status=137, exited_at_ns=1_700_000_000_123_456_789)
WHEN = convert.timestamp(ENDED.exited_at_ns)


@pytest.mark.parametrize("text", ["a", "A-b_c.d", "0", "a" * 76])
def test_ids_of_containerd_are_accepted(text: str) -> None:
    assert convert.container_id(text) == text
    assert convert.exec_id(text) == text


@pytest.mark.parametrize(
    "text", [".", "..", "-a", "_a", "a/b", "/a", "../a", "a b", "a\n", "a\0", "ä", "a%2f", "a+b"]
)
def test_ids_that_have_no_place_in_a_path_are_refused(text: str) -> None:
    with pytest.raises(InvalidIdError, match=r"container id .* must be letters, digits"):
        convert.container_id(text)
    with pytest.raises(InvalidIdError, match=r"exec id .* must be letters, digits"):
        convert.exec_id(text)


def test_a_long_id_is_refused_without_being_repeated_whole() -> None:
    with pytest.raises(InvalidIdError, match="has 300 characters; 76 are allowed") as caught:
        convert.container_id("a" * 300)
    assert len(str(caught.value)) < 120


def test_an_empty_container_id_is_refused() -> None:
    with pytest.raises(InvalidIdError):
        convert.container_id("")


def test_an_empty_exec_id_is_the_containers_own_process() -> None:
    assert convert.exec_id("") is None


def test_mounts_are_converted() -> None:
    entry = containerd_types_pb2.Mount(
        type="overlay", source="overlay", target="/t", options=["a", "b"]
    )
    assert convert.mounts([entry]) == (
        Mount(type="overlay", source="overlay", target="/t", options=("a", "b")),
    )


def options(data: bytes, *, url: str = "runtimeoptions.v1.Options") -> AnyMessage:
    return AnyMessage(type_url=url, value=data)


CONFIG = runtimeoptions_pb2.Options(config_path="/etc/kata.toml").SerializeToString()


@pytest.mark.parametrize(
    "url", ["runtimeoptions.v1.Options", "types.googleapis.com/runtimeoptions.v1.Options"]
)
def test_our_options_name_a_configuration(url: str) -> None:
    assert convert.config_path(options(CONFIG, url=url)) == Path("/etc/kata.toml")


@pytest.mark.parametrize(
    "value", [options(CONFIG, url="containerd.runc.v1.Options"), options(b""), AnyMessage()]
)
def test_other_options_or_none_name_no_configuration(value: AnyMessage) -> None:
    assert convert.config_path(value) is None


def test_broken_options_are_refused() -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"runtimeoptions\.v1\.Options cannot be decoded"
    ):
        convert.config_path(options(b"\xff\xff\xff"))


def test_a_configuration_that_can_be_no_path_is_refused() -> None:
    value = runtimeoptions_pb2.Options(config_path="/etc/a\0b").SerializeToString()
    with pytest.raises(InvalidArgumentError, match="can be no path"):
        convert.config_path(options(value))


def test_json_is_decoded() -> None:
    value = AnyMessage(type_url=URL, value=b'{"args": ["sh"]}')
    assert convert.json_any(value, type_url=URL) == {"args": ["sh"]}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (AnyMessage(), f"expected {URL}, got nothing"),
        (AnyMessage(type_url="x/y", value=b"{}"), f"expected {URL}, got x/y"),
        (AnyMessage(type_url=URL, value=b"{"), "is not valid JSON"),
        (AnyMessage(type_url=URL, value=b"\xff"), "is not valid JSON"),
        (AnyMessage(type_url=URL, value=b"[" * 100_000), "is not valid JSON"),
        (AnyMessage(type_url=URL, value=b"[]"), "must be a JSON object, is list"),
    ],
)
def test_what_is_no_json_object_of_the_type_is_refused(value: AnyMessage, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        convert.json_any(value, type_url=URL)


def test_time_is_split_into_seconds_and_nanoseconds() -> None:
    assert (WHEN.seconds, WHEN.nanos) == (1_700_000_000, 123_456_789)


@pytest.mark.parametrize(
    ("event", "topic", "message"),
    [
        (
            TaskCreated(
                container_id=C1,
                bundle="/b",
                rootfs=(Mount(type="bind", source="/s", options=("ro",)),),
                stdio=Stdio(stdin="/0", stdout="/1", stderr="/2", terminal=True),
                pid=7,
            ),
            "/tasks/create",
            events_pb2.TaskCreate(
                container_id="c1",
                bundle="/b",
                rootfs=[containerd_types_pb2.Mount(type="bind", source="/s", options=["ro"])],
                io=events_pb2.TaskIO(stdin="/0", stdout="/1", stderr="/2", terminal=True),
                pid=7,
            ),
        ),
        (
            TaskStarted(container_id=C1, pid=7),
            "/tasks/start",
            events_pb2.TaskStart(container_id="c1", pid=7),
        ),
        (
            TaskExited(container_id=C1, exec_id=None, pid=7, exit=ENDED),
            "/tasks/exit",
            events_pb2.TaskExit(container_id="c1", id="c1", pid=7, exit_status=137, exited_at=WHEN),
        ),
        (
            TaskExited(container_id=C1, exec_id=E1, pid=7, exit=ENDED),
            "/tasks/exit",
            events_pb2.TaskExit(container_id="c1", id="e1", pid=7, exit_status=137, exited_at=WHEN),
        ),
        (
            TaskDeleted(container_id=C1, pid=7, exit=ENDED),
            "/tasks/delete",
            events_pb2.TaskDelete(container_id="c1", pid=7, exit_status=137, exited_at=WHEN),
        ),
        (TaskOom(container_id=C1), "/tasks/oom", events_pb2.TaskOOM(container_id="c1")),
        (
            ExecAdded(container_id=C1, exec_id=E1),
            "/tasks/exec-added",
            events_pb2.TaskExecAdded(container_id="c1", exec_id="e1"),
        ),
        (
            ExecStarted(container_id=C1, exec_id=E1, pid=7),
            "/tasks/exec-started",
            events_pb2.TaskExecStarted(container_id="c1", exec_id="e1", pid=7),
        ),
        (TaskPaused(container_id=C1), "/tasks/paused", events_pb2.TaskPaused(container_id="c1")),
        (
            TaskResumed(container_id=C1),
            "/tasks/resumed",
            events_pb2.TaskResumed(container_id="c1"),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_events_become_containerds(event: TaskEvent, topic: str, message: Message) -> None:
    assert convert.event_message(event) == (topic, message)
