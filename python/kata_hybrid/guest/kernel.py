"""Where the guest kernel comes from: Debian's cloud kernel package, or a file of the user's.

The package is fetched with apt-get (which checks its signature chain), kept in a cache folder and
unpacked in a scratch folder of the caller; nothing is installed. A file may be an ELF ``vmlinux``,
a bzImage or a kernel package.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kata_hybrid.errors import FailedPreconditionError, InternalError, InvalidArgumentError
from kata_hybrid.guest.bzimage import extract_vmlinux, is_elf, parse_bzimage, vmlinux_version
from kata_hybrid.guest.manifest import FileDigest, digest_file
from kata_hybrid.guest.tool import Tool, Toolbox, find_tool

Progress = Callable[[str], None]
"""Told each step of the build as it begins."""

META_PACKAGE = "linux-image-cloud-amd64"
_PACKAGE_NAME = re.compile(r"linux-image-\d[\w.+~-]*-cloud-amd64")
_HOST_MODULES = Path("/lib/modules")
_APT_TIMEOUT_S = 600.0
_UNPACK_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSource:
    """A kernel ready to be put into a guest."""

    vmlinux: bytes
    version: str
    source: str
    modules: Path | None
    """Its ``lib/modules/<version>``; None if it has none and must have all it needs built in."""
    inputs: tuple[FileDigest, ...]


async def kernel_from_debian(
    cache_dir: Path, *, scratch: Path, progress: Progress, tools: Toolbox
) -> KernelSource:
    """Fetch Debian's current cloud kernel (or take it from the cache).

    ``scratch`` is an empty folder below ``cache_dir`` that outlives the use of the result.

    Raises:
        FailedPreconditionError: no apt here, or apt does not know the package.
        InternalError: a tool failed.
        OSError: the cache cannot be written.
    """
    package = await _resolve_package(tools)
    archive = _cached(cache_dir, package=package)
    if archive is None:
        progress(f"fetch {package}")
        await tools.run(
            Tool.APT_GET, ("-q", "download", package), timeout_s=_APT_TIMEOUT_S, cwd=scratch
        )
        fetched = _cached(scratch, package=package)
        if fetched is None:
            msg = f"apt-get download {package}: left no package in {scratch}"
            raise InternalError(msg)
        # Only whole downloads reach the cache.
        archive = await asyncio.to_thread(fetched.rename, cache_dir / fetched.name)
    return await _kernel_from_package(archive, scratch=scratch, progress=progress, tools=tools)


async def kernel_from_file(
    path: Path, *, modules: Path | None, scratch: Path, progress: Progress, tools: Toolbox
) -> KernelSource:
    """Take the user's kernel.

    ``modules`` is its ``lib/modules/<version>`` folder; without one, the host's of that version is
    used if it exists. ``scratch`` is an empty folder that outlives the use of the result.

    Raises:
        InvalidArgumentError: the file is no kernel.
        OSError: it cannot be read.
    """
    if path.suffix == ".deb":
        return await _kernel_from_package(path, scratch=scratch, progress=progress, tools=tools)
    digest = digest_file(path)
    vmlinux, version = await _load_vmlinux(path, progress=progress, tools=tools)
    folder = modules or _HOST_MODULES / version
    if modules is None and not (folder / "kernel").is_dir():
        progress(f"no modules for {version}: the kernel must have virtio built in")
        return KernelSource(
            vmlinux=vmlinux, version=version, source=path.name, modules=None, inputs=(digest,)
        )
    return KernelSource(
        vmlinux=vmlinux, version=version, source=path.name, modules=folder, inputs=(digest,)
    )


async def _resolve_package(tools: Toolbox) -> str:
    if find_tool(Tool.APT_GET) is None or find_tool(Tool.DPKG_DEB) is None:
        msg = (
            "no apt-get and dpkg-deb here to fetch Debian's cloud kernel with: give a kernel "
            "(vmlinux, bzImage or .deb) with --kernel, and its lib/modules/VERSION with --modules"
        )
        raise FailedPreconditionError(msg)
    depends = await tools.run(Tool.APT_CACHE, ("depends", META_PACKAGE), timeout_s=_APT_TIMEOUT_S)
    found = _PACKAGE_NAME.search(depends.decode("utf-8", "replace"))
    if found is None:
        msg = (
            f"apt knows no package {META_PACKAGE}: run apt-get update on Debian 12 or later, or "
            "give a kernel with --kernel"
        )
        raise FailedPreconditionError(msg)
    return found.group()


def _cached(cache_dir: Path, *, package: str) -> Path | None:
    found = sorted(cache_dir.glob(f"{package}_*.deb"), key=lambda path: path.stat().st_mtime_ns)
    return found[-1] if found else None


async def _kernel_from_package(
    archive: Path, *, scratch: Path, progress: Progress, tools: Toolbox
) -> KernelSource:
    progress(f"unpack {archive.name}")
    digest = digest_file(archive)
    tree = scratch / "package"
    await tools.run(
        Tool.DPKG_DEB, ("--extract", str(archive), str(tree)), timeout_s=_UNPACK_TIMEOUT_S
    )
    images = sorted((tree / "boot").glob("vmlinu[xz]-*"))
    if len(images) != 1:
        msg = f"{archive.name}: holds {len(images)} kernels, not one"
        raise InvalidArgumentError(msg)
    vmlinux, version = await _load_vmlinux(images[0], progress=progress, tools=tools)
    modules = tree / "lib/modules" / version
    if not modules.is_dir():
        modules = tree / "usr/lib/modules" / version
    return KernelSource(
        vmlinux=vmlinux, version=version, source=archive.stem, modules=modules, inputs=(digest,)
    )


async def _load_vmlinux(path: Path, *, progress: Progress, tools: Toolbox) -> tuple[bytes, str]:
    image = await asyncio.to_thread(path.read_bytes)
    if is_elf(path):
        return image, vmlinux_version(image, name=path.name)
    bzimage = parse_bzimage(image, name=path.name)
    progress(f"extract vmlinux from {path.name} ({bzimage.payload_format.name.lower()})")
    vmlinux = await extract_vmlinux(bzimage, name=path.name, tools=tools)
    return vmlinux, vmlinux_version(vmlinux, name=path.name)
