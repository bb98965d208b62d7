"""Ids and payloads of requests: nothing but our own error comes out, and ids are safe in paths."""

import json
from pathlib import PurePosixPath
from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage
from hypothesis import given
from hypothesis import strategies as st

from kata_hybrid.errors import InvalidArgumentError, InvalidIdError
from kata_hybrid.service import convert

safe = st.text(
    st.sampled_from("abcXYZ0189_.-"), min_size=1, max_size=convert._MAX_ID_LENGTH
).filter(lambda text: text[0].isalnum())


@given(text=safe)
def test_safe_ids_are_accepted_as_they_are(text: str) -> None:
    assert convert.container_id(text) == text
    assert convert.exec_id(text) == text


@given(text=st.text(max_size=400) | st.binary(max_size=20).map(lambda data: data.decode("latin-1")))
def test_an_id_is_one_plain_file_name_or_refused(text: str) -> None:
    try:
        accepted = convert.container_id(text)
    except InvalidIdError:
        return
    assert PurePosixPath("/run", accepted).parent == PurePosixPath("/run")
    assert accepted not in {".", ".."}
    assert accepted.isascii()
    assert accepted.isprintable()
    assert len(accepted) <= 76


@given(text=st.text(max_size=400))
def test_exec_ids_are_held_to_the_same(text: str) -> None:
    def accepts(check: Any) -> bool:
        try:
            check(text)
        except InvalidIdError:
            return False
        return True

    assert accepts(convert.exec_id) is (text == "" or accepts(convert.container_id))


@given(value=st.dictionaries(st.text(), st.none() | st.integers() | st.text(), max_size=4))
def test_json_objects_are_decoded(value: dict[str, Any]) -> None:
    packed = AnyMessage(type_url=convert.OCI_PROCESS_URL, value=json.dumps(value).encode())
    assert convert.json_any(packed, type_url=convert.OCI_PROCESS_URL) == value


@given(data=st.binary(max_size=64), url=st.sampled_from([convert.OCI_PROCESS_URL, "", "other"]))
def test_any_payload_is_an_object_or_refused(data: bytes, url: str) -> None:
    packed = AnyMessage(type_url=url, value=data)
    try:
        decoded = convert.json_any(packed, type_url=convert.OCI_PROCESS_URL)
    except InvalidArgumentError:
        return
    assert url == convert.OCI_PROCESS_URL
    assert isinstance(decoded, dict)


@given(data=st.binary(max_size=64))
def test_any_options_are_read_or_refused(data: bytes) -> None:
    packed = AnyMessage(type_url="runtimeoptions.v1.Options", value=data)
    try:
        path = convert.config_path(packed)
    except InvalidArgumentError:
        return
    assert path is None or "\0" not in str(path)


@given(time_ns=st.integers(0, 2**62))
def test_a_timestamp_loses_nothing(time_ns: int) -> None:
    assert convert.timestamp(time_ns).ToNanoseconds() == time_ns
