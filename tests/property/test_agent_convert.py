"""OCI documents from users: whatever is in them, they convert or the field is named."""

import copy
import json
import re
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from kata_hybrid.agent import convert
from kata_hybrid.errors import InvalidSpecError
from kata_hybrid.protos import oci_pb2

SPEC: dict[str, Any] = {
    "ociVersion": "1.0.2",
    "hostname": "box",
    "root": {"path": "rootfs", "readonly": True},
    "process": {
        "terminal": True,
        "consoleSize": {"height": 24, "width": 80},
        "user": {"uid": 1000, "gid": 100, "additionalGids": [5]},
        "args": ["sh"],
        "env": ["A=1"],
        "cwd": "/",
        "capabilities": {"bounding": ["CAP_KILL"]},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 2, "soft": 1}],
        "oomScoreAdj": -500,
    },
    "mounts": [{"destination": "/p", "type": "proc", "source": "p", "options": ["ro"]}],
    "hooks": {"startContainer": [{"path": "/h", "args": ["a"], "timeout": 1}]},
    "annotations": {"key": "value"},
    "linux": {
        "uidMappings": [{"hostID": 1, "containerID": 2, "size": 3}],
        "sysctl": {"a": "1"},
        "namespaces": [{"type": "pid", "path": ""}],
        "devices": [{"path": "/d", "type": "c", "major": 1, "minor": 3, "fileMode": 438}],
        "resources": {
            "devices": [{"allow": False, "access": "rwm"}],
            "memory": {"limit": -1, "swappiness": 1},
            "cpu": {"shares": 1024, "quota": -1, "cpus": "0"},
            "pids": {"limit": 1},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 9}],
            "blockIO": {"weightDevice": [{"major": 1, "minor": 1, "weight": 1}]},
        },
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{"names": ["read"], "action": "A", "errnoRet": 0, "args": [{"index": 0}]}],
        },
        "maskedPaths": ["/proc/kcore"],
    },
}

# Integers as large as JSON may hold them, and characters that are no Unicode: JSON can write both.
texts = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=8)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**31, 2**32, 2**63, 2**64, -(2**63) - 1, 10**4000]),
    st.floats(),
    texts,
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)


def places(value: Any) -> list[tuple[str | int, ...]]:
    """Return the way to every value inside a document."""
    found: list[tuple[str | int, ...]] = [()]
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in entries:
        inner = places(item) if isinstance(item, dict | list) else [()]
        found += [(key, *way) for way in inner]
    return found


PLACES = [place for place in places(SPEC) if place]


def changed(place: tuple[str | int, ...], value: Any) -> Any:
    document: Any = copy.deepcopy(SPEC)
    *way, last = place
    inner = document
    for key in way:
        inner = inner[key]
    inner[last] = value
    return document


@example(place=("annotations",), value={"\ud800": "x"})
@example(place=("annotations", "key"), value="\ud800")
@example(place=("linux", "sysctl"), value={"a": None})
@given(place=st.sampled_from(PLACES), value=json_values)
def test_any_value_at_any_key_converts_or_is_named(
    place: tuple[str | int, ...], value: Any
) -> None:
    try:
        message = convert.spec_message(changed(place, value))
    except InvalidSpecError as exc:
        text = str(exc)
        assert text.startswith(str(place[0])), text
        assert re.search(r" (must be|is not valid) ", text), text
    else:
        message.SerializeToString()


@given(document=st.dictionaries(texts | st.sampled_from(sorted(SPEC)), json_values, max_size=6))
def test_any_document_converts_or_is_refused(document: dict[str, Any]) -> None:
    for convert_one in (convert.spec_message, convert.process_message, convert.resources_message):
        try:
            message = convert_one(document)
        except InvalidSpecError:
            continue
        else:
            message.SerializeToString()


@given(
    key=st.sampled_from(sorted(SPEC)),
    change=st.sampled_from([str.lower, str.upper, str.title, str.swapcase]),
)
def test_the_case_of_a_key_does_not_matter(key: str, change: Any) -> None:
    document = {change(name) if name == key else name: item for name, item in SPEC.items()}
    assert convert.spec_message(document) == convert.spec_message(SPEC)


@given(extra=st.dictionaries(texts.map("x-".__add__), json_values, max_size=4))
def test_unknown_keys_change_nothing(extra: dict[str, Any]) -> None:
    assert convert.spec_message({**extra, **SPEC}) == convert.spec_message(SPEC)


def test_a_document_from_the_wire_is_the_same() -> None:
    message = convert.spec_message(json.loads(json.dumps(SPEC)))
    assert oci_pb2.Spec.FromString(message.SerializeToString()) == convert.spec_message(SPEC)
