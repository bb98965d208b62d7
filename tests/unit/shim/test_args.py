import pytest

from kata_hybrid.shim.args import check_id, parse
from kata_hybrid.shim.failure import ShimError


def test_containerds_command_line() -> None:
    line = (
        "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd "
        "-id c1 -debug -bundle /b delete"
    )
    arguments = parse(line.split())
    assert arguments.namespace == "k8s.io"
    assert arguments.address == "/run/c.sock"
    assert arguments.publish_binary == "/usr/bin/containerd"
    assert arguments.id == "c1"
    assert arguments.is_debug
    assert arguments.bundle == "/b"
    assert arguments.action == "delete"


@pytest.mark.parametrize("word", ["-id=c1", "--id=c1"])
def test_a_value_after_an_equals_sign(word: str) -> None:
    assert parse([word, "start"]).id == "c1"


def test_two_dashes_and_a_value() -> None:
    assert parse(["--id", "c1", "start"]).id == "c1"


def test_an_empty_address_is_a_value() -> None:
    arguments = parse(["-address", "", "-id", "c1", "start"])
    assert (arguments.address, arguments.id, arguments.action) == ("", "c1", "start")


@pytest.mark.parametrize(("word", "expected"), [("-debug=true", True), ("-debug=0", False)])
def test_a_boolean_takes_a_value_only_after_an_equals_sign(word: str, expected: bool) -> None:  # noqa: FBT001
    arguments = parse([word, "start"])
    assert (arguments.is_debug, arguments.action) == (expected, "start")


def test_a_bad_boolean_is_refused() -> None:
    with pytest.raises(ShimError, match="invalid boolean value 'maybe' for -debug"):
        parse(["-debug=maybe"])


def test_a_missing_value_is_refused() -> None:
    with pytest.raises(ShimError, match="flag needs an argument: -id"):
        parse(["-id"])


def test_flags_after_the_action_are_its_arguments() -> None:
    assert parse(["start", "-id", "c1"]).id == ""


def test_an_unknown_flag_is_kept_not_refused() -> None:
    arguments = parse(["-new-thing=1", "-id", "c1", "start"])
    assert arguments.unknown == ["-new-thing=1"]
    assert arguments.action == "start"


@pytest.mark.parametrize("word", ["-v", "--v", "-version", "--version"])
def test_every_spelling_of_version(word: str) -> None:
    assert parse([word]).is_version


@pytest.mark.parametrize("value", ["c1", "a", "x_y.z-9", "0" * 64, "A" * 76])
def test_ids_containerd_gives_are_accepted(value: str) -> None:
    check_id(value, what="-id")


@pytest.mark.parametrize(
    "value", ["", "a/b", "../x", "-x", "x-", ".", "a b", "a\0b", "é", "x" * 300, "a\n"]
)
def test_other_ids_are_refused(value: str) -> None:
    with pytest.raises(ShimError, match="-id"):
        check_id(value, what="-id")


def test_a_namespace_is_required() -> None:
    with pytest.raises(ShimError, match="namespace cannot be empty"):
        parse(["-id", "c1", "start"]).require_identity()
