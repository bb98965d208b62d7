"""Which kernel modules the guest loads at boot, and in which order.

Names and dependencies come from each module's own ``.modinfo`` section, so that a freshly unpacked
kernel package works: ``modules.dep`` is made by depmod when a package is *installed*. A wanted
module that is built into the kernel needs no file; one that is neither is an error.
"""

import asyncio
import gzip
import lzma
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kata_hybrid.errors import InternalError, InvalidArgumentError
from kata_hybrid.guest.tool import Tool, Toolbox

_ELF64_LITTLE = b"\x7fELF\x02\x01"
_SECTION_HEADER_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One module file, decompressed."""

    name: str
    relative_path: str
    """Below ``/lib/modules/<version>``, always ending in ``.ko``."""
    data: bytes
    depends: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleTree:
    """A ``lib/modules/<version>`` folder: what is in files and what is in the kernel."""

    files: Mapping[str, Path]
    """By canonical name (underscores)."""
    root: Path
    builtin: frozenset[str]


def canonical_name(name: str) -> str:
    """Name of a module as the kernel knows it: no folder, no suffix, underscores."""
    return name.rsplit("/", 1)[-1].split(".ko", 1)[0].replace("-", "_")


def scan_tree(root: Path) -> ModuleTree:
    """Index a ``lib/modules/<version>`` folder.

    Raises:
        InvalidArgumentError: it is no such folder.
    """
    kernel = root / "kernel"
    if not kernel.is_dir():
        msg = f"{root}: no kernel modules here (folder {kernel} is missing)"
        raise InvalidArgumentError(msg)
    builtin_list = root / "modules.builtin"
    builtin = builtin_list.read_text().splitlines() if builtin_list.is_file() else []
    paths = sorted(path for path in kernel.rglob("*.ko*") if path.is_file())
    return ModuleTree(
        files={canonical_name(path.name): path for path in paths},
        root=root,
        builtin=frozenset(canonical_name(line) for line in builtin),
    )


async def select_modules(
    tree: ModuleTree, *, wanted: Sequence[str], tools: Toolbox
) -> tuple[Module, ...]:
    """Read the wanted modules and all they depend on, in an order in which they can be loaded.

    Raises:
        InvalidArgumentError: a module is missing, damaged, or part of a cycle.
    """
    loaded: dict[str, Module] = {}
    for name in wanted:
        await _add(tree, canonical_name(name), loaded=loaded, path=(), tools=tools)
    return tuple(loaded.values())


async def _add(
    tree: ModuleTree,
    name: str,
    *,
    loaded: dict[str, Module],
    path: tuple[str, ...],
    tools: Toolbox,
) -> None:
    if name in loaded or name in tree.builtin:
        return
    chain = (*path, name)
    if name in path:
        msg = f"kernel modules depend on each other: {' -> '.join(chain)}"
        raise InvalidArgumentError(msg)
    file = tree.files.get(name)
    if file is None:
        needed_by = f" (needed by {path[-1]})" if path else ""
        msg = f"kernel module {name}{needed_by} is neither in {tree.root} nor built in"
        raise InvalidArgumentError(msg)
    data = await _read_module(file, tools=tools)
    depends = module_dependencies(data, name=str(file))
    for dependency in depends:
        await _add(tree, dependency, loaded=loaded, path=chain, tools=tools)
    relative = file.relative_to(tree.root)
    loaded[name] = Module(
        name=name,
        relative_path=str(relative.with_name(file.name.split(".ko", 1)[0] + ".ko")),
        data=data,
        depends=depends,
    )


async def _read_module(path: Path, *, tools: Toolbox) -> bytes:
    data = await asyncio.to_thread(path.read_bytes)
    try:
        match path.suffix:
            case ".ko":
                return data
            case ".xz":
                return lzma.decompress(data)
            case ".gz":
                return gzip.decompress(data)
            case ".zst":
                return await tools.run(Tool.ZSTD, ("-d", "-q", "-c"), data=data)
    except (OSError, EOFError, lzma.LZMAError, InternalError) as error:
        msg = f"{path}: decompress the module"
        raise InvalidArgumentError(msg) from error
    msg = f"{path}: unknown compression {path.suffix}"
    raise InvalidArgumentError(msg)


def module_dependencies(data: bytes, *, name: str) -> tuple[str, ...]:
    """Read the ``depends=`` names from a module's ``.modinfo`` section.

    Raises:
        InvalidArgumentError: not a 64-bit little-endian ELF object with that section.
    """
    try:
        fields = _modinfo(data).split(b"\0")
    except (struct.error, ValueError, IndexError) as error:
        msg = f"{name}: no kernel module"
        raise InvalidArgumentError(msg) from error
    depends: list[str] = []
    for entry in fields:
        key, _, value = entry.partition(b"=")
        if key == b"depends":
            depends.extend(canonical_name(part) for part in value.decode().split(",") if part)
    return tuple(depends)


def _modinfo(data: bytes) -> bytes:
    """Content of section ``.modinfo`` (elf(5))."""
    if not data.startswith(_ELF64_LITTLE):
        message = "not a 64-bit little-endian ELF file"
        raise ValueError(message)
    (table_offset,) = struct.unpack_from("<Q", data, 40)
    entry_bytes, count, names_index = struct.unpack_from("<HHH", data, 58)
    if entry_bytes != _SECTION_HEADER_BYTES:
        message = "unexpected section header size"
        raise ValueError(message)
    headers = [
        struct.unpack_from("<IIQQQQ", data, table_offset + i * entry_bytes) for i in range(count)
    ]
    names_offset = headers[names_index][4]
    for name_index, _type, _flags, _address, offset, size in headers:
        begin = names_offset + name_index
        if data[begin : data.index(b"\0", begin)] == b".modinfo":
            return data[offset : offset + size]
    message = "no .modinfo section"
    raise ValueError(message)
