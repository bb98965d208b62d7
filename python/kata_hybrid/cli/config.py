"""``kata-hybrid config``: check a configuration file, or print a schema of it for editors."""

import argparse
import os
from pathlib import Path

from kata_hybrid.cli.output import Output
from kata_hybrid.config.load import load_config


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser("config", help="check configuration files, describe them")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    check = actions.add_parser("check", help="read a file and its drop-ins; say what is wrong")
    check.add_argument("file", nargs="?", type=Path, help="default: the one in force")
    check.add_argument("--json", action="store_true", help="print one JSON document")
    check.set_defaults(run=run_check)
    schema = actions.add_parser("schema", help="print a JSON Schema of the file, for editors")
    schema.set_defaults(run=run_schema, json=True)


def run_check(arguments: argparse.Namespace, output: Output) -> int:
    """Read a configuration; what is wrong with it is an error.

    Raises:
        InvalidConfigError: a file is wrong; the text says where and what.
    """
    path: Path | None = arguments.file
    environment = os.environ if path is None else {}
    config = load_config(environment=environment, option_path=path)
    files = [str(file) for file in config.files]
    output.document({"files": files, "ignored": list(config.notices)})
    output.line(f"read: {', '.join(files) or 'no file, the built-in defaults'}")
    for notice in config.notices:
        output.line(f"not implemented, ignored: {notice}")
    return 0


def run_schema(arguments: argparse.Namespace, output: Output) -> int:
    """Print the schema."""
    # Its texts are for this command alone.
    from kata_hybrid.config.reference import json_schema  # noqa: PLC0415

    del arguments
    output.document(json_schema())
    return 0
