"""Malformed input on the shim's own socket: a clear error with the right code, and service goes on.

Raw ttRPC with the harness's own coder. Each test ends by asking the same shim a proper question.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.containers import Containers
from harness.wire import (
    ALREADY_EXISTS,
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    MAX_PAYLOAD,
    NOT_FOUND,
    REQUEST,
    RESOURCE_EXHAUSTED,
    TASK_V2,
    TASK_V3,
    UNIMPLEMENTED,
    ShimConnection,
    encode_any,
    encode_bytes,
    encode_frame,
    encode_request,
    encode_string,
    encode_uint,
)

_PROCESS_URL = "types.containerd.io/opencontainers/runtime-spec/1/Process"
_RESOURCES_URL = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"


@pytest.fixture
def shim(containers: Containers, running: str) -> Iterator[ShimConnection]:
    bundle = containers.containerd.bundle(running)
    # runc's shim of containerd 2.x serves version 3 only, the older one version 2 only.
    is_old = containers.is_virtual or containers.containerd.install.major == 1
    service = TASK_V2 if is_old else TASK_V3
    with ShimConnection(bundle, service=service) as connection:
        yield connection
    with ShimConnection(bundle, service=service) as connection:
        assert connection.call("State", encode_string(1, running)).code == 0
    assert containers.exec(running, "echo", "serving").text == "serving"


def test_unknown_service_is_unimplemented(shim: ShimConnection) -> None:
    assert shim.call("State", service="no.such.Service").code == UNIMPLEMENTED


def test_unknown_method_is_unimplemented(shim: ShimConnection) -> None:
    assert shim.call("Levitate").code == UNIMPLEMENTED


def test_checkpoint_is_unimplemented(vm_containers: Containers, shim: ShimConnection) -> None:
    running = vm_containers.tasks()[0].container_id
    assert shim.call("Checkpoint", encode_string(1, running)).code == UNIMPLEMENTED


def test_undecodable_message_is_an_invalid_argument(
    vm_containers: Containers, shim: ShimConnection
) -> None:
    del vm_containers  # runc's shim gives a plain error
    assert shim.call("State", b"\x0a\xff\xff\xff\xff\x0f").code == INVALID_ARGUMENT


def test_unknown_fields_are_skipped(shim: ShimConnection, running: str) -> None:
    payload = encode_string(1, running) + encode_string(900, "from the future")
    assert shim.call("State", payload).code == 0


@pytest.mark.parametrize("method", ["State", "Start", "Kill", "Wait", "Pause", "Stats", "Delete"])
def test_unknown_container_is_not_found(shim: ShimConnection, method: str) -> None:
    reply = shim.call(method, encode_string(1, "no-such-container"))
    assert (reply.code, reply.payload) == (NOT_FOUND, b"")


def test_unknown_exec_is_not_found(shim: ShimConnection, running: str) -> None:
    payload = encode_string(1, running) + encode_string(2, "no-such-exec")
    assert shim.call("State", payload).code == NOT_FOUND


def test_running_container_is_not_deleted(shim: ShimConnection, running: str) -> None:
    reply = shim.call("Delete", encode_string(1, running))
    assert reply.code in (FAILED_PRECONDITION, 2)  # runc's plain error


def test_container_id_in_use_is_refused(
    shim: ShimConnection, containers: Containers, running: str
) -> None:
    bundle = containers.containerd.bundle(running)
    payload = encode_string(1, running) + encode_string(2, str(bundle))
    reply = shim.call("Create", payload)
    # runc's shim looks at the bundle first and gives a plain error.
    assert reply.code == ALREADY_EXISTS or (not containers.is_virtual and reply.code)


@pytest.mark.parametrize(
    "identifier", ["../escape", "a/b", "/abs", ".", "..", "x" * 300, "a\0b", ""]
)
@pytest.mark.parametrize("method", ["Create", "Exec"])
def test_id_that_is_no_id_is_refused(
    vm_containers: Containers,
    shim: ShimConnection,
    running: str,
    method: str,
    identifier: str,
) -> None:
    bundle = str(vm_containers.containerd.bundle(running))
    if method == "Create":
        payload = encode_string(1, identifier) + encode_string(2, bundle)
    else:
        spec = encode_any(_PROCESS_URL, b'{"args":["true"],"cwd":"/"}')
        payload = encode_string(1, running) + encode_string(2, identifier) + encode_bytes(7, spec)
    reply = shim.call(method, payload)
    assert reply.code == INVALID_ARGUMENT
    assert len(reply.message) < 1000


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="truncated"),
        pytest.param(b"[]", id="no object"),
        pytest.param(b"\xff\xfe", id="no text"),
        pytest.param(b'{"args":"true","cwd":"/"}', id="args no list"),
        pytest.param(b'{"args":[],"cwd":"/"}', id="no args"),
        pytest.param(b'{"args":[1],"cwd":"/"}', id="number in args"),
        pytest.param(b'{"args":["true"],"cwd":"/","user":{"uid":-1}}', id="negative uid"),
        pytest.param(b'{"args":["true"],"cwd":"/","user":{"uid":4294967296}}', id="uid too large"),
        pytest.param(b"[" * 100_000, id="deep"),
    ],
)
def test_malformed_process_spec_is_an_invalid_argument(
    vm_containers: Containers, shim: ShimConnection, running: str, spec: bytes
) -> None:
    del vm_containers
    payload = (
        encode_string(1, running)
        + encode_string(2, "bad-spec")
        + encode_bytes(7, encode_any(_PROCESS_URL, spec))
    )
    assert shim.call("Exec", payload).code == INVALID_ARGUMENT


def test_process_spec_of_another_type_is_an_invalid_argument(
    vm_containers: Containers, shim: ShimConnection, running: str
) -> None:
    del vm_containers
    spec = encode_any("example.org/Unheard", b'{"args":["true"],"cwd":"/"}')
    payload = encode_string(1, running) + encode_string(2, "odd") + encode_bytes(7, spec)
    assert shim.call("Exec", payload).code == INVALID_ARGUMENT


@pytest.mark.parametrize("body", [b"", b"{", b'{"memory":7}', b'{"memory":{"limit":"much"}}'])
def test_malformed_resources_are_an_invalid_argument(
    vm_containers: Containers, shim: ShimConnection, running: str, body: bytes
) -> None:
    del vm_containers
    payload = encode_string(1, running) + encode_bytes(2, encode_any(_RESOURCES_URL, body))
    assert shim.call("Update", payload).code == INVALID_ARGUMENT


@pytest.mark.parametrize(
    "bundle",
    [
        pytest.param("", id="empty"),
        pytest.param("relative/path", id="relative"),
        pytest.param("/no/such/bundle", id="absent"),
        pytest.param("/proc/self/mem", id="no directory"),
        pytest.param("/" + "x" * 5000, id="too long"),
    ],
)
def test_bundle_that_is_none_is_refused(
    vm_containers: Containers, shim: ShimConnection, bundle: str
) -> None:
    del vm_containers
    reply = shim.call("Create", encode_string(1, "bad-bundle") + encode_string(2, bundle))
    assert reply.code in (INVALID_ARGUMENT, NOT_FOUND)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param("", id="empty"),
        pytest.param("{", id="truncated"),
        pytest.param("[]", id="no object"),
        pytest.param('{"ociVersion":"1.0.2"}', id="no process"),
        pytest.param('{"process":{"args":7}}', id="args no list"),
        pytest.param('{"process":{"args":["a"],"cwd":"/"},"mounts":{}}', id="mounts no list"),
        pytest.param('{"process":{"args":["a"],"cwd":"/"},"linux":[]}', id="linux no object"),
        pytest.param('{"process":{"args":["a"],"cwd":"/"},"annotations":[1]}', id="annotations"),
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_malformed_container_spec_is_an_invalid_argument(
    vm_containers: Containers, shim: ShimConnection, tmp_path: Path, spec: str
) -> None:
    del vm_containers
    bundle = tmp_path / "bundle"
    (bundle / "rootfs").mkdir(parents=True)
    (bundle / "config.json").write_text(spec)
    payload = encode_string(1, "bad-spec") + encode_string(2, str(bundle))
    assert shim.call("Create", payload).code == INVALID_ARGUMENT


def test_malformed_options_are_an_invalid_argument(
    vm_containers: Containers, shim: ShimConnection, running: str
) -> None:
    options = encode_any("runtimeoptions.v1.Options", b"\x12\xff\xff")
    bundle = str(vm_containers.containerd.bundle(running))
    payload = encode_string(1, "bad-options") + encode_string(2, bundle) + encode_bytes(10, options)
    assert shim.call("Create", payload).code == INVALID_ARGUMENT


def test_mount_of_an_absurd_type_is_named(
    vm_containers: Containers, shim: ShimConnection, tmp_path: Path
) -> None:
    del vm_containers
    bundle = tmp_path / "bundle"
    (bundle / "rootfs").mkdir(parents=True)
    spec = {
        "ociVersion": "1.0.2",
        "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "linux": {},
    }
    (bundle / "config.json").write_text(json.dumps(spec))
    mount = encode_string(1, "no-such-fs") + encode_string(2, "/dev/null")
    payload = encode_string(1, "bad-mount") + encode_string(2, str(bundle)) + encode_bytes(3, mount)
    reply = shim.call("Create", payload)
    assert reply.code != 0
    assert "no-such-fs" in reply.message


def test_oversized_frame_is_refused_and_the_connection_lives(
    vm_containers: Containers, shim: ShimConnection, running: str
) -> None:
    del vm_containers
    stream = shim.next_stream()
    shim.send(encode_frame(stream=stream, kind=REQUEST, payload=bytes(MAX_PAYLOAD + 1)))
    assert shim.receive(stream).code == RESOURCE_EXHAUSTED
    assert shim.call("State", encode_string(1, running)).code == 0


def test_frame_that_ends_early_closes_only_its_connection(shim: ShimConnection) -> None:
    shim.send(encode_frame(stream=1, kind=REQUEST, payload=b"short", length=1000))
    # The fixture hangs up and asks again on a new connection.


def test_header_of_all_ones_does_no_harm(shim: ShimConnection) -> None:
    shim.send(b"\xff" * 10)


def test_even_stream_is_an_invalid_argument(
    vm_containers: Containers, shim: ShimConnection, running: str
) -> None:
    del vm_containers
    request = encode_request(shim.service, "State", encode_string(1, running))
    shim.send(encode_frame(stream=2, kind=REQUEST, payload=request))
    assert shim.receive(2).code == INVALID_ARGUMENT


def test_reused_stream_is_an_invalid_argument(
    vm_containers: Containers, shim: ShimConnection, running: str
) -> None:
    del vm_containers
    request = encode_request(shim.service, "State", encode_string(1, running))
    shim.send(encode_frame(stream=5, kind=REQUEST, payload=request))
    assert shim.receive(5).code == 0
    shim.send(encode_frame(stream=3, kind=REQUEST, payload=request))
    assert shim.receive(3).code == INVALID_ARGUMENT


def test_frame_of_unknown_type_is_ignored(
    vm_containers: Containers, shim: ShimConnection, running: str
) -> None:
    del vm_containers
    shim.send(struct.pack(">IIBB", 4, 1, 77, 0) + b"oddy")
    shim.next_stream()
    assert shim.call("State", encode_string(1, running)).code == 0


def test_signal_out_of_range_is_an_invalid_argument(
    vm_containers: Containers, shim: ShimConnection, running: str
) -> None:
    del vm_containers
    payload = encode_string(1, running) + encode_uint(3, 4096)
    assert shim.call("Kill", payload).code == INVALID_ARGUMENT


def test_many_connections_at_once_are_served(
    containers: Containers, shim: ShimConnection, running: str
) -> None:
    bundle = containers.containerd.bundle(running)
    connections = [ShimConnection(bundle, service=shim.service) for _ in range(50)]
    try:
        codes = {each.call("State", encode_string(1, running)).code for each in connections}
    finally:
        for each in connections:
            with each:
                pass
    assert codes == {0}


def test_many_requests_in_flight_are_all_answered(shim: ShimConnection, running: str) -> None:
    streams = [shim.next_stream() for _ in range(100)]
    request = encode_request(shim.service, "State", encode_string(1, running))
    for stream in streams:
        shim.send(encode_frame(stream=stream, kind=REQUEST, payload=request))
    replies = [shim.receive_any() for _ in streams]
    assert sorted(reply.stream for reply in replies) == streams
    assert {reply.code for reply in replies} == {0}


@pytest.mark.newest
@pytest.mark.timeout(300)
def test_thousands_of_mounts_are_made_or_refused_and_none_is_left(
    vm_containers: Containers, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mounted")
    source = f"type=bind,src={tmp_path}/file,options=rbind:ro"
    options = [
        word for number in range(10_000) for word in ("--mount", f"{source},dst=/mnt/{number}")
    ]
    done = vm_containers.attempt("cat", "/mnt/9999", options=options, timeout_s=240)
    assert done.text == "mounted" or done.status != 0
    assert vm_containers.run("echo", "fine").text == "fine"
