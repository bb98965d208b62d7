import asyncio
import lzma
import struct
from pathlib import Path

import pytest

from kata_hybrid.aio.process import ProcessReaper
from kata_hybrid.errors import InvalidArgumentError
from kata_hybrid.guest.modules import (
    Module,
    canonical_name,
    module_dependencies,
    scan_tree,
    select_modules,
)
from kata_hybrid.guest.tool import Toolbox


def module_file(*, depends: str) -> bytes:
    """An ELF object with nothing but a .modinfo section."""
    modinfo = b"license=GPL\0depends=" + depends.encode() + b"\0name=x\0"
    names = b"\0.modinfo\0.shstrtab\0"
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    modinfo_at = 64
    names_at = modinfo_at + len(modinfo)
    sections_at = names_at + len(names)
    header += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, sections_at, 0, 64, 0, 0, 64, 3, 2)
    sections = bytes(64)
    for name, at, size in ((1, modinfo_at, len(modinfo)), (10, names_at, len(names))):
        sections += struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, at, size, 0, 0, 1, 0)
    return header + modinfo + names + sections


def make_tree(root: Path, modules: dict[str, str], *, builtin: tuple[str, ...] = ()) -> Path:
    folder = root / "kernel/drivers"
    folder.mkdir(parents=True)
    for name, depends in modules.items():
        data = module_file(depends=depends)
        (folder / name).write_bytes(lzma.compress(data) if name.endswith(".xz") else data)
    (root / "modules.builtin").write_text("".join(f"kernel/lib/{name}.ko\n" for name in builtin))
    return root


def select(root: Path, *wanted: str) -> tuple[Module, ...]:
    async def run() -> tuple[Module, ...]:
        reaper = ProcessReaper()
        try:
            return await select_modules(scan_tree(root), wanted=wanted, tools=Toolbox(reaper))
        finally:
            reaper.close()

    return asyncio.run(run())


def test_dependencies_are_loaded_before_what_needs_them(tmp_path: Path) -> None:
    make_tree(
        tmp_path,
        {"virtio_pci.ko": "virtio,virtio_ring", "virtio.ko": "virtio_ring", "virtio_ring.ko": ""},
    )
    assert [module.name for module in select(tmp_path, "virtio_pci")] == [
        "virtio_ring",
        "virtio",
        "virtio_pci",
    ]


def test_a_shared_dependency_is_loaded_once(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a.ko": "base", "b.ko": "base", "base.ko": ""})
    assert [module.name for module in select(tmp_path, "a", "b")] == ["base", "a", "b"]


def test_what_is_built_in_needs_no_file(tmp_path: Path) -> None:
    make_tree(tmp_path, {"virtiofs.ko": "fuse"}, builtin=("fuse", "virtio-blk"))
    assert [module.name for module in select(tmp_path, "virtio_blk", "virtiofs")] == ["virtiofs"]


def test_dashes_and_underscores_are_the_same(tmp_path: Path) -> None:
    make_tree(tmp_path, {"nd-pmem.ko": "lib-nd", "lib_nd.ko": ""})
    assert [module.name for module in select(tmp_path, "nd_pmem")] == ["lib_nd", "nd_pmem"]


def test_a_compressed_module_is_decompressed(tmp_path: Path) -> None:
    make_tree(tmp_path, {"fuse.ko.xz": ""})
    (module,) = select(tmp_path, "fuse")
    assert module.relative_path == "kernel/drivers/fuse.ko"
    assert module.data == module_file(depends="")


def test_a_missing_dependency_is_named_with_who_needs_it(tmp_path: Path) -> None:
    make_tree(tmp_path, {"virtiofs.ko": "fuse"})
    with pytest.raises(InvalidArgumentError, match=r"fuse \(needed by virtiofs\)"):
        select(tmp_path, "virtiofs")


def test_a_cycle_is_named(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a.ko": "b", "b.ko": "a"})
    with pytest.raises(InvalidArgumentError, match="a -> b -> a"):
        select(tmp_path, "a")


def test_a_folder_without_modules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="no kernel modules here"):
        scan_tree(tmp_path)


@pytest.mark.parametrize("cut", [0, 3, 40, 63, 70, 100, 200])
def test_a_damaged_module_is_refused(cut: int) -> None:
    with pytest.raises(InvalidArgumentError, match="no kernel module"):
        module_dependencies(module_file(depends="a")[:cut], name="x.ko")


def test_canonical_name_drops_folder_and_suffix() -> None:
    assert canonical_name("kernel/drivers/nvdimm/nd-virtio.ko.xz") == "nd_virtio"
