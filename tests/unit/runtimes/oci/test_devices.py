import json
from typing import Any

import pytest

from kata_hybrid.errors import InvalidSpecError
from kata_hybrid.runtimes.oci.devices import BlockNode, guest_devices, parse_block_nodes
from kata_hybrid.runtimes.oci.rewrite import guest_spec
from kata_hybrid.runtimes.oci.spec import parse

VOLUME = {"path": "/dev/xvda", "type": "b", "major": 8, "minor": 16}
DISK_OF_THE_NODE = {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}
FUSE = {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}
RULE = {"allow": True, "type": "b", "major": 8, "minor": 16, "access": "rwm"}
ALL = {"allow": True, "access": "rwm"}


def linux(devices: list[Any], rules: list[Any]) -> dict[str, Any]:
    return {"devices": devices, "resources": {"devices": rules}}


def test_a_device_with_a_rule_of_its_own_is_the_containers() -> None:
    section = linux([FUSE, DISK_OF_THE_NODE, VOLUME], [ALL, RULE])
    (node,) = parse_block_nodes(section)
    assert node == BlockNode(path="/dev/xvda", major=8, minor=16, is_read_only=False)
    devices, rules = guest_devices(section, (node,))
    assert devices == [FUSE, VOLUME], "the same numbers are other disks in the guest"
    assert rules == [RULE]


@pytest.mark.parametrize(
    "rules",
    [
        [],
        [ALL],
        [{**RULE, "allow": False}],
        [{**RULE, "minor": None}],
        [{**RULE, "minor": -1}],
        [{**RULE, "type": "c"}],
        [{**RULE, "type": "a"}],
    ],
)
def test_rules_for_many_or_others_are_not_its_own(rules: list[Any]) -> None:
    section = linux([VOLUME], rules)
    assert parse_block_nodes(section) == ()
    assert guest_devices(section, ()) == ([], [])


def test_without_the_right_to_write_it_is_read_only() -> None:
    (node,) = parse_block_nodes(linux([VOLUME], [{**RULE, "access": "r"}]))
    assert node.is_read_only


@pytest.mark.parametrize(
    ("devices", "rules", "field"),
    [
        ([1], [], r"linux.devices\[0\] must be an object"),
        ([{**VOLUME, "major": "8"}], [RULE], r"linux.devices\[0\].major must be the number"),
        ([{**VOLUME, "minor": 2**32}], [RULE], r"linux.devices\[0\].minor must be the number"),
        ([{**VOLUME, "path": 1}], [RULE], r"linux.devices\[0\].path must be a string"),
        ([], [{**RULE, "access": 1}], r"linux.resources.devices\[0\].access must be a string"),
        ([], {"a": 1}, "linux.resources.devices must be an array"),
    ],
)
def test_a_wrong_field_is_named(devices: list[Any], rules: Any, field: str) -> None:
    with pytest.raises(InvalidSpecError, match=field):
        parse_block_nodes(linux(devices, rules))


def test_the_guests_spec_has_what_it_gets_as_disks() -> None:
    document = {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": {"args": ["sh"], "cwd": "/"},
        "linux": linux([FUSE, DISK_OF_THE_NODE, VOLUME], [ALL, RULE]),
    }
    spec = parse(json.dumps(document).encode())
    guest: Any = guest_spec(spec, root_path="/r", mounts=(), bundle="/b", is_seccomp_disabled=True)
    assert guest["linux"]["devices"] == [FUSE, VOLUME]
    assert guest["linux"]["resources"]["devices"] == [RULE]
    assert spec.raw == document, "the host's spec stays as it was"
