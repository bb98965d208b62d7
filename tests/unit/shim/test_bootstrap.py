import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from kata_hybrid.protos import bootstrap_pb2, runtime_info_pb2, runtimeoptions_pb2, task_pb2
from kata_hybrid.shim.bootstrap import (
    PROTOCOL_EXTENSION,
    StartInput,
    decode_any,
    decode_fields,
    decode_start_input,
    encode_bootstrap_result,
    encode_delete_response,
    encode_runtime_info,
    parse_version,
)
from kata_hybrid.shim.failure import ShimError

OPTIONS_TYPE = "runtimeoptions.v1.Options"
PARAMS = bytes.fromhex("0a02633112076465 6661756c741800220676322e332e34")
OPTIONS = bytes.fromhex(
    "0a19 72756e74696d656f7074696f6e732e76312e4f7074696f6e73 120d 120b 2f6574632f782e746f6d6c"
)


def decode(data: bytes) -> StartInput:
    return decode_start_input(data, instance_id="c1", namespace="default")


def test_params_of_the_fact_sheet() -> None:
    given_input = decode(PARAMS)
    assert given_input.has_params
    assert given_input.containerd_version == "v2.3.4"
    assert given_input.takes_bootstrap_result
    assert given_input.options == b""


def test_a_bare_any_is_options() -> None:
    given_input = decode(OPTIONS)
    assert not given_input.has_params
    assert not given_input.takes_bootstrap_result
    assert given_input.options == OPTIONS
    type_url, value = decode_any(given_input.options)
    assert type_url == OPTIONS_TYPE
    assert runtimeoptions_pb2.Options.FromString(value).config_path == "/etc/x.toml"


def test_options_inside_params_are_handed_on_unchanged() -> None:
    given_input = decode(PARAMS + bytes.fromhex("422c0a2a") + OPTIONS)
    assert given_input.options == OPTIONS


def test_params_of_another_id_are_taken_for_options() -> None:
    given_input = decode_start_input(PARAMS, instance_id="c2", namespace="default")
    assert not given_input.has_params
    assert given_input.options == PARAMS


def test_empty_input_means_nothing() -> None:
    given_input = decode(b"")
    assert not given_input.has_params
    assert given_input.options == b""


def test_every_field_of_params_is_understood() -> None:
    params = bootstrap_pb2.BootstrapParams(
        instance_id="c1",
        namespace="default",
        log_level=bootstrap_pb2.DEBUG,
        containerd_version="v2.4.0-rc.1",
        containerd_ttrpc_address="/run/c.ttrpc",
        containerd_grpc_address="/run/c",
        containerd_binary="/bin/containerd",
        extensions=[
            bootstrap_pb2.Extension(value=Any(type_url=PROTOCOL_EXTENSION, value=b"gRPC")),
            bootstrap_pb2.Extension(value=Any(type_url=OPTIONS_TYPE, value=b"\x12\x01x")),
        ],
        socket_dir="/run/s",
    )
    given_input = decode(params.SerializeToString())
    assert given_input.log_level == -4
    assert given_input.ttrpc_address == "/run/c.ttrpc"
    assert given_input.protocol == "grpc"
    assert decode_any(given_input.options) == (OPTIONS_TYPE, b"\x12\x01x")


def test_an_older_daemon_gets_text() -> None:
    params = bootstrap_pb2.BootstrapParams(
        instance_id="c1", namespace="default", containerd_version="v2.2.9"
    )
    assert not decode(params.SerializeToString()).takes_bootstrap_result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v2.3.4", (2, 3)),
        ("2.10.0", (2, 10)),
        ("v2.4.0-rc.0", (2, 4)),
        ("abc", (0, 0)),
        ("", (0, 0)),
    ],
)
def test_versions(text: str, expected: tuple[int, int]) -> None:
    assert parse_version(text) == expected


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_taken_as_options(data: bytes) -> None:
    try:
        given_input = decode(data)
    except ShimError:
        return
    assert given_input.options == data


@pytest.mark.parametrize(
    "data", [b"\x0a", b"\x0a\xff\xff\xff\xff\x0f", b"\x08" + b"\xff" * 11, b"\x0b", b"\x00\x00"]
)
def test_malformed_messages_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_fields(data)


def test_bootstrap_result_of_the_fact_sheet() -> None:
    encoded = encode_bootstrap_result(3, address="unix:///run/x.sock", protocol="ttrpc")
    assert encoded == bytes.fromhex(
        "0803 1212 756e69783a2f2f2f72756e2f782e736f636b 1a05 7474727063"
    )
    assert bootstrap_pb2.BootstrapResult.FromString(encoded).protocol == "ttrpc"


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(-(10**18), 4 * 10**18))
def test_delete_response_is_the_same_as_protobufs(pid: int, status: int, time_ns: int) -> None:
    encoded = encode_delete_response(pid=pid, exit_status=status, exited_at_ns=time_ns)
    message = task_pb2.DeleteResponse.FromString(encoded)
    seconds, nanos = divmod(time_ns, 10**9)
    assert message == task_pb2.DeleteResponse(
        pid=pid, exit_status=status, exited_at=Timestamp(seconds=seconds, nanos=nanos)
    )
    assert encoded == message.SerializeToString(deterministic=True)


def test_runtime_info_is_the_same_as_protobufs() -> None:
    encoded = encode_runtime_info(
        name="n",
        version="1",
        revision="r",
        options=OPTIONS,
        features=("t", b"{}"),
        annotations={"k": "v"},
    )
    expected = runtime_info_pb2.RuntimeInfo(
        name="n",
        version=runtime_info_pb2.RuntimeVersion(version="1", revision="r"),
        options=Any.FromString(OPTIONS),
        features=Any(type_url="t", value=b"{}"),
        annotations={"k": "v"},
    )
    assert encoded == expected.SerializeToString(deterministic=True)
