"""``config.json`` holds what users wrote: parsing and rewriting it never fails in another way."""

import contextlib
import copy
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kata_hybrid.agent import convert
from kata_hybrid.errors import InvalidSpecError
from kata_hybrid.runtimes.oci.rewrite import guest_spec
from kata_hybrid.runtimes.oci.spec import Spec, parse

VALID: dict[str, Any] = {
    "ociVersion": "1.0.2",
    "root": {"path": "rootfs"},
    "process": {"args": ["sh"], "cwd": "/"},
}
KEYS = ["process", "root", "mounts", "annotations", "hostname", "hooks", "linux", "ociVersion"]
INNER = ["args", "cwd", "path", "type", "source", "destination", "options", "namespaces"]
INNER += ["resources", "cpu", "readonly", "seccomp", "startContainer", "devices"]

texts = st.sampled_from(["/a", "a", "", "bind", "pid", "\0", "\ud800"]) | st.text(max_size=4)
scalars = st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | texts
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(INNER) | texts, inner, max_size=4),
    ),
    max_leaves=12,
)
documents = st.dictionaries(st.sampled_from(KEYS), json_values, max_size=5).map(
    lambda changes: {**VALID, **changes}
)


def checked(document: Any) -> Spec | None:
    """Return the spec if both checks before the start of a machine pass."""
    try:
        spec = parse(json.dumps(document).encode())
        convert.spec_message(spec.raw)
    except InvalidSpecError:
        return None
    return spec


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_spec_or_refused(data: bytes) -> None:
    with contextlib.suppress(InvalidSpecError):
        assert parse(data).root_path


@given(document=json_values)
def test_any_json_is_a_spec_or_refused(document: Any) -> None:
    checked(document)


@given(document=documents)
def test_what_is_accepted_is_what_was_written(document: dict[str, Any]) -> None:
    spec = checked(document)
    if spec is not None:
        assert spec.root_path == document["root"]["path"]
        assert len(spec.mounts) == len(document.get("mounts") or [])
        assert all(mount.destination.startswith("/") for mount in spec.mounts)


@given(document=documents, is_seccomp_disabled=st.booleans())
def test_what_passed_the_checks_can_be_sent_to_the_guest(
    document: dict[str, Any], *, is_seccomp_disabled: bool
) -> None:
    spec = checked(document)
    if spec is None:
        return
    before = copy.deepcopy(spec.raw)
    guest = guest_spec(
        spec,
        root_path="/guest",
        mounts=spec.mounts,
        bundle="/bundle",
        is_seccomp_disabled=is_seccomp_disabled,
    )
    message = convert.spec_message(guest)
    assert message.Root.Path == "/guest"
    assert [namespace.Path for namespace in message.Linux.Namespaces if namespace.Path] == []
    assert len(message.Linux.Namespaces) > 0
    assert list(message.Linux.Resources.Devices) == []
    assert not (is_seccomp_disabled and message.Linux.HasField("Seccomp"))
    assert spec.raw == before
