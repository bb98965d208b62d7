"""``kata-hybrid version``."""

import argparse
import platform

from kata_hybrid import __version__
from kata_hybrid.cli.output import Output


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser("version", help="print the version")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Run the command."""
    del arguments
    output.line(f"kata-hybrid {__version__}")
    output.document({"version": __version__, "python": platform.python_version()})
    return 0
