"""Build a guest: kernel, initrd and manifest, the same bytes from the same inputs.

Called by ``kata-hybrid guest build`` and by tests; no running shim comes here. Outputs are written
to memory first and replaced one by one, the manifest last: a guest whose manifest matches is whole.

Runs the reaper of child processes itself, so it belongs on the main thread of a program of its own.
"""

import asyncio
import importlib.resources
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kata_hybrid import __version__
from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.errors import FailedPreconditionError, InvalidArgumentError
from kata_hybrid.guest.initrd import BOOT_MODULES, make_initrd
from kata_hybrid.guest.kernel import (
    KernelSource,
    Progress,
    kernel_from_debian,
    kernel_from_file,
)
from kata_hybrid.guest.manifest import (
    MANIFEST_NAME,
    SCHEMA,
    FileDigest,
    Manifest,
    digest_bytes,
)
from kata_hybrid.guest.modules import Module, scan_tree, select_modules
from kata_hybrid.guest.tool import Toolbox
from kata_hybrid.persist import atomic

KERNEL_NAME = "vmlinux"
INITRD_NAME = "initrd.img"
DEFAULT_OUTPUT_DIR = Path("/usr/share/kata-hybrid/guest")
DEFAULT_CACHE_DIR = Path("/var/cache/kata-hybrid")
_ELF_MAGIC = b"\x7fELF"
_FILE_MODE = 0o644


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestPrograms:
    """The two programs every guest has."""

    init: Path
    agent: Path


def bundled_programs() -> GuestPrograms:
    """Find the programs this package was installed with; they may be absent."""
    folder = Path(str(importlib.resources.files("kata_hybrid.guest").joinpath("bin")))
    return GuestPrograms(init=folder / "guest-init", agent=folder / "kata-agent")


async def build_guest(
    output_dir: Path,
    *,
    kernel: Path | None = None,
    modules: Path | None = None,
    agent: Path | None = None,
    init: Path | None = None,
    cache_dir: Path = DEFAULT_CACHE_DIR,
    progress: Progress,
) -> Manifest:
    """Make ``vmlinux``, ``initrd.img`` and ``manifest.json`` in ``output_dir``.

    ``kernel`` replaces Debian's cloud kernel, ``agent`` and ``init`` the programs of this package.

    Raises:
        FailedPreconditionError: a program or tool is not there; the text says how to get it.
        InvalidArgumentError: an input is not what it should be.
        InternalError: a tool failed.
        OSError: a file cannot be read or written.
    """
    bundled = bundled_programs()
    agent_bytes = _read_program(agent or bundled.agent, option="--agent")
    init_bytes = _read_program(init or bundled.init, option="--init")
    cache_dir.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240 - a program of its own
    reaper = ProcessReaper()
    try:
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".unpack-") as scratch:
            tools = Toolbox(reaper)
            source = await (
                kernel_from_debian(cache_dir, scratch=Path(scratch), progress=progress, tools=tools)
                if kernel is None
                else kernel_from_file(
                    kernel, modules=modules, scratch=Path(scratch), progress=progress, tools=tools
                )
            )
            progress("make the initrd")
            chosen = await _choose_modules(source, tools=tools)
    finally:
        reaper.close()
    initrd = make_initrd(
        init=init_bytes, agent=agent_bytes, kernel_version=source.version, modules=chosen
    )
    manifest = Manifest(
        schema=SCHEMA,
        builder_version=__version__,
        command=_command(kernel=kernel, modules=modules, agent=agent, init=init),
        kernel_version=source.version,
        kernel_source=source.source,
        modules=tuple(module.name for module in chosen),
        inputs=_sorted_digests(
            *source.inputs,
            digest_bytes("kata-agent", agent_bytes),
            digest_bytes("guest-init", init_bytes),
        ),
        outputs=_sorted_digests(
            digest_bytes(KERNEL_NAME, source.vmlinux), digest_bytes(INITRD_NAME, initrd)
        ),
    )
    progress(f"write {output_dir}")
    await asyncio.to_thread(_write, output_dir, source.vmlinux, initrd, manifest)
    return manifest


async def _choose_modules(source: KernelSource, *, tools: Toolbox) -> tuple[Module, ...]:
    if source.modules is None:
        return ()
    return await select_modules(scan_tree(source.modules), wanted=BOOT_MODULES, tools=tools)


def _read_program(path: Path, *, option: str) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        msg = f"{path} is not there: build the package (make wheel) or name another with {option}"
        raise FailedPreconditionError(msg) from error
    if not data.startswith(_ELF_MAGIC):
        msg = f"{path}: {option} must name a static ELF program"
        raise InvalidArgumentError(msg)
    return data


def _sorted_digests(*digests: FileDigest) -> tuple[FileDigest, ...]:
    return tuple(sorted(digests, key=lambda digest: digest.name))


def _command(**options: Path | None) -> str:
    words = ["kata-hybrid", "guest", "build"]
    for name, value in options.items():
        if value is not None:
            words.extend((f"--{name}", str(value)))
    return shlex.join(words)


def _write(output_dir: Path, vmlinux: bytes, initrd: bytes, manifest: Manifest) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    atomic.replace(output_dir / KERNEL_NAME, vmlinux, mode=_FILE_MODE)
    atomic.replace(output_dir / INITRD_NAME, initrd, mode=_FILE_MODE)
    atomic.replace(output_dir / MANIFEST_NAME, manifest.to_json().encode(), mode=_FILE_MODE)
