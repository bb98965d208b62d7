"""The start action as a process, with the real server behind it."""

import json
import os
import select
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.protobuf.any_pb2 import Any

from harness.shim import Shim
from kata_hybrid.protos import bootstrap_pb2, task_pb2


def cri(kind: str, sandbox_id: str) -> str:
    return json.dumps(
        {
            "annotations": {
                "io.kubernetes.cri.container-type": kind,
                "io.kubernetes.cri.sandbox-id": sandbox_id,
            }
        }
    )


def params(*, version: str = "v2.3.4", **fields: object) -> bytes:
    return bootstrap_pb2.BootstrapParams(
        instance_id="c1",
        namespace="default",
        containerd_version=version,
        **fields,  # type: ignore[arg-type]
    ).SerializeToString()


def test_it_prints_and_writes_the_plain_address(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    printed = shim.start(bundle, container_id="c1").decode()
    (sandbox,) = shim.sandboxes()
    assert printed == f"unix://{sandbox}/shim.sock"
    assert (bundle / "address").read_text() == printed


def test_the_socket_accepts_at_once_and_is_private(shim: Shim) -> None:
    shim.start(shim.bundle("c1"), container_id="c1")
    (sandbox,) = shim.sandboxes()
    path = sandbox / "shim.sock"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    assert sandbox.stat().st_mode & 0o777 == 0o700


def test_the_server_is_detached(shim: Shim) -> None:
    shim.start(shim.bundle("c1"), container_id="c1")
    pid = shim.pid()
    assert os.getsid(pid) == pid
    for fd in range(3):
        assert Path(f"/proc/{pid}/fd/{fd}").readlink() == Path("/dev/null")
    assert Path(f"/proc/{pid}/cwd").resolve() == shim.folder / "c1"
    ours = int(Path("/proc/self/oom_score_adj").read_text())
    assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == min(ours + 1, 1000)


def test_a_second_start_finds_the_first(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    first = shim.start(bundle, container_id="c1")
    pid = shim.pid()
    assert shim.start(bundle, container_id="c1") == first
    assert shim.pid() == pid


def test_a_pods_container_joins_its_sandbox(shim: Shim) -> None:
    address = shim.start(shim.bundle("pod", config=cri("sandbox", "pod")), container_id="pod")
    member = shim.bundle("c1", config=cri("container", "pod"))
    assert shim.start(member, container_id="c1") == address
    assert (member / "address").read_bytes() == address
    assert len(shim.sandboxes()) == 1


def test_a_container_without_its_sandbox_fails(shim: Shim) -> None:
    bundle = shim.bundle("c1", config=cri("container", "pod"))
    done = shim.run("start", bundle=bundle, container_id="c1")
    assert done.returncode == 1
    assert done.stdout == b""
    assert b"sandbox pod of container c1 is not running" in done.stderr
    assert not (bundle / "address").exists()


def test_a_stale_socket_is_replaced(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    first = shim.start(bundle, container_id="c1")
    shim.kill()
    assert shim.start(bundle, container_id="c1") == first
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(first.decode().removeprefix("unix://"))


def test_starts_at_once_agree_on_one_server(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: shim.start(bundle, container_id="c1"), range(6)))
    assert len(set(answers)) == 1
    assert len(shim.sandboxes()) == 1


def test_containerd_2_3_gets_a_bootstrap_result(shim: Shim) -> None:
    printed = shim.start(shim.bundle("c1"), container_id="c1", stdin=params())
    result = bootstrap_pb2.BootstrapResult.FromString(printed)
    (sandbox,) = shim.sandboxes()
    assert (result.version, result.protocol) == (3, "ttrpc")
    assert result.address == f"unix://{sandbox}/shim.sock"
    assert (shim.folder / "c1" / "address").read_text() == result.address


def test_an_older_daemons_params_get_text(shim: Shim) -> None:
    printed = shim.start(shim.bundle("c1"), container_id="c1", stdin=params(version="v2.2.1"))
    assert printed.startswith(b"unix://")


def test_a_later_start_reports_what_the_running_server_was_announced_as(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    text = shim.start(bundle, container_id="c1")
    assert shim.start(bundle, container_id="c1", stdin=params()) == text


def test_a_version_3_server_is_plain_text_to_an_older_daemon(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    result = shim.start(bundle, container_id="c1", stdin=params())
    assert shim.start(bundle, container_id="c1").startswith(b"unix://")
    assert shim.start(bundle, container_id="c1", stdin=params()) == result


@pytest.mark.parametrize("is_in_params", [False, True])
def test_options_are_kept_for_the_server(shim: Shim, is_in_params: bool) -> None:  # noqa: FBT001
    options = Any(type_url="runtimeoptions.v1.Options", value=b"\x12\x01x")
    stdin = options.SerializeToString()
    if is_in_params:
        stdin = params(extensions=[bootstrap_pb2.Extension(value=options)])
    shim.start(shim.bundle("c1"), container_id="c1", stdin=stdin)
    (sandbox,) = shim.sandboxes()
    assert Any.FromString((sandbox / "options.pb").read_bytes()) == options


def test_the_ttrpc_address_of_params_reaches_the_server(shim: Shim) -> None:
    stdin = params(containerd_ttrpc_address="/run/c.ttrpc")
    shim.start(shim.bundle("c1"), container_id="c1", stdin=stdin)
    environ = Path(f"/proc/{shim.pid()}/environ").read_bytes().split(b"\0")
    assert b"TTRPC_ADDRESS=/run/c.ttrpc" in environ


def test_grpc_is_announced_and_served(shim: Shim) -> None:
    printed = shim.start(
        shim.bundle("c1"),
        container_id="c1",
        stdin=params(),
        env={"KATA_HYBRID_PROTOCOL": "grpc"},
    )
    result = bootstrap_pb2.BootstrapResult.FromString(printed)
    assert (result.version, result.protocol) == (3, "grpc")
    with grpc.insecure_channel(f"unix:{result.address}") as channel:
        call = channel.unary_unary(
            "/containerd.task.v3.Task/Connect",
            request_serializer=task_pb2.ConnectRequest.SerializeToString,
            response_deserializer=task_pb2.ConnectResponse.FromString,
        )
        reply = call(task_pb2.ConnectRequest(id="c1"), timeout=10)
    assert reply.shim_pid == shim.pid()


def test_grpc_is_not_offered_to_a_daemon_that_cannot_be_told(shim: Shim) -> None:
    printed = shim.start(shim.bundle("c1"), container_id="c1", env={"KATA_HYBRID_PROTOCOL": "grpc"})
    assert printed.startswith(b"unix://")


def test_an_unknown_flag_is_for_the_servers_log(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    log = os.open(bundle / "log", os.O_RDONLY | os.O_NONBLOCK)
    done = shim.run("-new-thing=1", "start", bundle=bundle, container_id="c1")
    assert (done.returncode, done.stderr) == (0, b"")
    assert select.select([log], [], [], 20)[0]
    assert b'msg="unknown flags ignored"' in os.read(log, 1000)
    os.close(log)


def test_a_server_of_the_sandbox_api_needs_no_config(shim: Shim) -> None:
    bundle = shim.bundle("sb", config=None)
    assert shim.start(bundle, container_id="sb").startswith(b"unix://")


@pytest.mark.parametrize("container_id", ["a/b", "x" * 300, "..", ""])
def test_a_bad_id_is_refused_and_nothing_is_made(shim: Shim, container_id: str) -> None:
    done = shim.run("start", bundle=shim.bundle("c1"), container_id=container_id)
    assert done.returncode == 1
    assert b"-id" in done.stderr
    assert shim.sandboxes() == []


def test_a_malformed_config_is_refused_and_nothing_is_made(shim: Shim) -> None:
    done = shim.run("start", bundle=shim.bundle("c1", config="{"), container_id="c1")
    assert done.returncode == 1
    assert b"config.json is malformed" in done.stderr
    assert shim.sandboxes() == []


def test_malformed_input_is_refused_and_nothing_is_made(shim: Shim) -> None:
    done = shim.run("start", bundle=shim.bundle("c1"), container_id="c1", stdin=b"\x0a\xff")
    assert done.returncode == 1
    assert b"neither BootstrapParams nor options" in done.stderr
    assert shim.sandboxes() == []


def test_a_bundle_that_cannot_be_written_undoes_everything(shim: Shim) -> None:
    bundle = shim.bundle("c1")
    (bundle / "address").mkdir()
    done = shim.run("start", bundle=bundle, container_id="c1")
    assert done.returncode == 1
    assert shim.sandboxes() == []


def frame(method: bytes, payload: bytes) -> bytes:
    service = b"containerd.task.v2.Task"
    request = b"".join(
        bytes([number << 3 | 2, len(value)]) + value
        for number, value in ((1, service), (2, method), (3, payload))
    )
    return struct.pack(">IIBB", len(request), 1, 1, 0) + request


def test_shutdown_is_answered_and_leaves_nothing(shim: Shim) -> None:
    address = shim.start(shim.bundle("c1"), container_id="c1").decode()
    fd = os.pidfd_open(shim.pid())
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(address.removeprefix("unix://"))
        client.sendall(frame(b"Shutdown", b"\x0a\x02c1"))
        answer = client.recv(100)
        assert answer[:9] == b"\0\0\0\0\0\0\0\x01\x02"
        assert client.recv(1) == b""
    deadline = time.monotonic() + 20
    while shim.sandboxes() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert shim.sandboxes() == []
    os.close(fd)
