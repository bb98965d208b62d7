import json
import re
from pathlib import Path
from typing import Any

import pytest

from kata_hybrid.errors import InvalidSpecError
from kata_hybrid.runtimes.oci.spec import MAX_SPEC_BYTES, SpecMount, check_process, load, parse

PROCESS = {"args": ["sh"], "cwd": "/"}
SPEC: dict[str, Any] = {"ociVersion": "1.0.2", "root": {"path": "rootfs"}, "process": PROCESS}


def parsed(**changes: Any) -> Any:
    return parse(json.dumps({**SPEC, **changes}).encode())


def test_the_smallest_spec_is_read() -> None:
    spec = parse(json.dumps(SPEC).encode())
    assert (spec.root_path, spec.is_root_read_only, spec.hostname) == ("rootfs", False, "")
    assert (spec.mounts, spec.annotations, spec.namespaces) == ((), {}, {})
    assert spec.raw == SPEC


def test_what_the_host_reads_is_read() -> None:
    spec = parsed(
        root={"path": "/r", "readonly": True},
        hostname="box",
        annotations={"a": "b"},
        linux={"namespaces": [{"type": "pid"}, {"type": "network", "path": "/ns"}]},
        mounts=[{"destination": "/d", "type": "bind", "source": "/s", "options": ["ro"]}],
    )
    assert (spec.root_path, spec.is_root_read_only, spec.hostname) == ("/r", True, "box")
    assert spec.annotations == {"a": "b"}
    assert spec.namespaces == {"pid": "", "network": "/ns"}
    assert spec.mounts == (SpecMount(destination="/d", type="bind", source="/s", options=("ro",)),)


@pytest.mark.parametrize(
    ("kind", "options", "is_bind"),
    [
        ("bind", (), True),
        ("none", ("rbind",), True),
        ("", ("bind", "ro"), True),
        ("tmpfs", ("nosuid",), False),
    ],
)
def test_a_mount_is_a_bind_by_type_or_option(
    kind: str, options: tuple[str, ...], *, is_bind: bool
) -> None:
    mount = SpecMount(destination="/d", type=kind, source="/s", options=options)
    assert mount.is_bind is is_bind


def test_a_mount_is_written_as_it_was_read() -> None:
    entry = {"destination": "/d", "type": "bind", "source": "/s", "options": ["ro", "rbind"]}
    assert parsed(mounts=[entry]).mounts[0].to_json() == entry


@pytest.mark.parametrize("key", ["linux", "mounts", "annotations"])
def test_null_is_as_if_absent(key: str) -> None:
    spec = parsed(**{key: None})
    assert (spec.mounts, spec.annotations, spec.namespaces) == ((), {}, {})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ociVersion": "2.0.0"}, "ociVersion '2.0.0' is not supported; 1.x is"),
        ({"ociVersion": 1}, "ociVersion must be a string, is int"),
        ({"root": None}, "root.path is missing"),
        ({"root": {"path": ""}}, "root.path is missing"),
        ({"root": []}, "root.path is missing"),
        ({"root": "/"}, "root must be an object, is str"),
        ({"root": {"path": "r", "readonly": "yes"}}, "root.readonly must be true or false, is str"),
        ({"root": {"path": "a\0b"}}, "root.path holds a NUL character"),
        ({"process": None}, "process must be an object, is NoneType"),
        ({"process": {**PROCESS, "args": []}}, "process.args must not be empty"),
        ({"process": {**PROCESS, "args": ["a", 1]}}, "process.args[1] must be a string, is int"),
        ({"process": {**PROCESS, "args": ["a\0"]}}, "process.args[0] holds a NUL character"),
        ({"process": {**PROCESS, "cwd": "etc"}}, "process.cwd must be an absolute path, is 'etc'"),
        ({"hostname": []}, "hostname must be a string, is list"),
        ({"annotations": {"a": 1}}, "annotations['a'] must be a string, is int"),
        ({"mounts": {"a": 1}}, "mounts must be an array, is dict"),
        ({"mounts": ["x"]}, "mounts[0] must be an object, is str"),
        ({"mounts": [{"destination": "d"}]}, "mounts[0].destination must be an absolute path"),
        ({"mounts": [{"destination": "/d", "type": 1}]}, "mounts[0].type must be a string"),
        (
            {"mounts": [{"destination": "/d", "options": ["ro", 1]}]},
            "mounts[0].options[1] must be a string, is int",
        ),
        ({"linux": {"namespaces": [{"type": None}]}}, "linux.namespaces[0].type must be a string"),
        ({"linux": 1}, "linux must be an object, is int"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidSpecError, match=re.escape(text)):
        parsed(**changes)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5000])
def test_what_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidSpecError, match="is not valid JSON"):
        parse(data)


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(InvalidSpecError, match="OCI spec must be an object, is list"):
        parse(b"[]")


def test_a_lone_process_is_named_as_the_caller_says() -> None:
    with pytest.raises(InvalidSpecError, match=r"^exec\.args must not be empty"):
        check_process({"cwd": "/"}, "exec")


def test_the_spec_of_a_bundle_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SPEC))
    assert load(tmp_path).raw == SPEC


def test_a_bundle_without_spec_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpecError, match=f"read OCI spec {tmp_path}/config.json: No such"):
        load(tmp_path)


def test_a_spec_that_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InvalidSpecError, match=f"{tmp_path}/config.json: Is a directory"):
        load(tmp_path)


def test_a_spec_too_large_for_one_message_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(bytes(MAX_SPEC_BYTES + 1))
    with pytest.raises(InvalidSpecError, match=f"is more than the {MAX_SPEC_BYTES}"):
        load(tmp_path)
