"""``kata-hybrid env``: the configuration in force and what it was read from."""

import argparse
import dataclasses
import os
import platform
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from kata_hybrid import __version__
from kata_hybrid.cli.output import Output
from kata_hybrid.config.load import CONFIG_FILE_VARIABLE, load_config
from kata_hybrid.config.model import HypervisorName
from kata_hybrid.errors import InvalidArgumentError
from kata_hybrid.guest.manifest import MANIFEST_NAME, read_manifest

RUN_DIR_VARIABLE = "KATA_HYBRID_RUN_DIR"
DEFAULT_RUN_DIR = "/run/kata-hybrid"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser("env", help="show the configuration in force")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Run the command."""
    del arguments
    config = load_config(environment=os.environ)
    chosen = config.runtime.hypervisor_name or HypervisorName.BUILTIN
    document = {
        "version": __version__,
        "python": platform.python_version(),
        "host_kernel": platform.release(),
        "run_dir": os.environ.get(RUN_DIR_VARIABLE, DEFAULT_RUN_DIR),
        "configuration": [str(path) for path in config.files],
        "guest": _guest(config.hypervisor(chosen).kernel.parent),
        "hypervisor": {name.value: _plain(config.hypervisor(name)) for name in HypervisorName},
        "agent": {"kata": _plain(config.agent)},
        "runtime": _plain(config.runtime),
    }
    output.document(document)
    source = ", ".join(document["configuration"]) or f"built-in defaults ({CONFIG_FILE_VARIABLE}=)"
    output.line(f"configuration = {source}")
    for name, value in _flatten("", document):
        if name != "configuration":
            output.line(f"{name} = {value}")
    return 0


def _guest(folder: Path) -> dict[str, str]:
    try:
        manifest = read_manifest(folder / MANIFEST_NAME)
    except FileNotFoundError:
        return {"kernel_version": "", "kernel_source": "", "state": "not built"}
    except (OSError, InvalidArgumentError) as error:
        return {"kernel_version": "", "kernel_source": "", "state": str(error)}
    return {
        "kernel_version": manifest.kernel_version,
        "kernel_source": manifest.kernel_source,
        "state": "built",
    }


def _plain(section: object) -> dict[str, object]:
    if not dataclasses.is_dataclass(section):
        return {}
    return {
        field.name: _plain_value(getattr(section, field.name))
        for field in dataclasses.fields(section)
    }


def _plain_value(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, re.Pattern):
        return value.pattern
    return [_plain_value(entry) for entry in value] if isinstance(value, tuple) else value


def _flatten(prefix: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, list):
        yield prefix, " ".join(str(entry) for entry in value)
    else:
        yield prefix, "" if value is None else str(value)
