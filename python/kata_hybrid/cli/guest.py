"""``kata-hybrid guest build``: make the guest's kernel and initrd."""

import argparse
import asyncio
from dataclasses import asdict
from pathlib import Path

from kata_hybrid.cli.output import Output
from kata_hybrid.guest.build import DEFAULT_CACHE_DIR, DEFAULT_OUTPUT_DIR, build_guest
from kata_hybrid.guest.manifest import MANIFEST_NAME


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser("guest", help="make the guest's kernel and initrd")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    build = actions.add_parser(
        "build",
        help="build them from Debian's cloud kernel and this package's agent",
        description="Build vmlinux, initrd.img and manifest.json. Same inputs, same bytes.",
    )
    build.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT_DIR,
        metavar="DIR",
        help="where to put them (default: %(default)s)",
    )
    build.add_argument(
        "--kernel",
        type=Path,
        metavar="FILE",
        help="another kernel: an ELF vmlinux, a bzImage or a kernel package (.deb)",
    )
    build.add_argument(
        "--modules",
        type=Path,
        metavar="DIR",
        help="lib/modules/VERSION of that kernel (default: the host's of that version, if any)",
    )
    build.add_argument("--agent", type=Path, metavar="FILE", help="another agent (static ELF)")
    build.add_argument("--init", type=Path, metavar="FILE", help="another /init (static ELF)")
    build.add_argument(
        "--cache",
        type=Path,
        default=DEFAULT_CACHE_DIR,
        metavar="DIR",
        help="where kernel packages are kept (default: %(default)s)",
    )
    build.add_argument("--json", action="store_true", help="print one JSON document")
    build.set_defaults(run=run_build)


def run_build(arguments: argparse.Namespace, output: Output) -> int:
    """Run the command."""
    with output.progress() as progress:
        manifest = asyncio.run(
            build_guest(
                arguments.output,
                kernel=arguments.kernel,
                modules=arguments.modules,
                agent=arguments.agent,
                init=arguments.init,
                cache_dir=arguments.cache,
                progress=progress.step,
            )
        )
    output.line(f"kernel {manifest.kernel_version} from {manifest.kernel_source}")
    for file in manifest.outputs:
        output.line(f"{arguments.output / file.name}  {file.size} bytes  sha256 {file.sha256}")
    output.line(f"{arguments.output / MANIFEST_NAME}")
    output.document({"output": str(arguments.output), "manifest": asdict(manifest)})
    return 0
