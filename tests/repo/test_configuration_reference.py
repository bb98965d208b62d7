"""The reference page and the schema for editors are what the model says."""

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest

from configuration_reference import PAGE, SCHEMA, page, schema
from kata_hybrid.config.keys import TABLES
from kata_hybrid.config.load import read_config
from kata_hybrid.config.reference import MEANINGS, json_schema
from kata_hybrid.errors import InvalidConfigError


def test_every_key_has_a_meaning() -> None:
    assert {table: set(keys) for table, keys in MEANINGS.items()} == {
        table: set(keys) for table, keys in TABLES.items()
    }


def test_the_page_and_the_schema_are_up_to_date() -> None:
    regenerate = "run: python scripts/configuration_reference.py"
    assert PAGE.read_text() == page(PAGE.read_text()), regenerate
    assert SCHEMA.read_text() == schema(), regenerate


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[hypervisor.builtin]\ndefault_vcpus = -1.5\nkernel = '/k'\nenable_annotations = ['a.*']",
        "[hypervisor.dragonball]\nshared_fs = 'inline-virtio-fs'\ndefault_memory = 512",
        "[hypervisor.qemu]\npath = ''\nvirtio_fs_cache = 'none'",
        "[agent.kata]\nserver_port = 1\n[runtime]\nhypervisor_name = 'dragonball'",
        "[hypervisor.builtin]\ndefault_memory = 64",
        "[hypervisor.builtin]\ndefault_memory = '512'",
        "[hypervisor.builtin]\ndefault_vcpus = 5000",
        "[hypervisor.qemu]\nkernel = 'relative'",
        "[hypervisor.qemu]\nvirtio_fs_extra_args = 'word'",
        "[agent.kata]\nlog_port = 0",
        "[runtime]\nlog_level = 'loud'",
        "[runtime]\nenable_debug = 1",
    ],
)
def test_it_takes_what_the_loader_takes(text: str, tmp_path: Path) -> None:
    path = tmp_path / "configuration.toml"
    path.write_text(text)
    validator = jsonschema.Draft202012Validator(json_schema())
    is_valid = validator.is_valid(json.loads(json.dumps(tomllib.loads(text))))
    try:
        read_config(path)
    except InvalidConfigError:
        assert not is_valid
    else:
        assert is_valid
