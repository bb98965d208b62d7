"""Generate the Python messages from ``proto/`` into ``python/kata_hybrid/protos/``.

The output is committed, so that installing the package needs no compiler. ``--check`` generates
into a temporary directory instead and fails when the committed files differ. Needs grpcio-tools.
"""

import argparse
import re
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "proto"
OUTPUT = ROOT / "python"
PACKAGE = Path("kata_hybrid") / "protos"
GENERATED = ("*_pb2.py", "*_pb2.pyi")


def generate(output: Path) -> None:
    """Write every message module below ``output``.

    Raises:
        SystemExit: the compiler refused; it has said why on standard error.
    """
    well_known = resources.files("grpc_tools") / "_proto"
    sources = sorted(str(path.relative_to(SOURCES)) for path in (SOURCES / PACKAGE).glob("*.proto"))
    status: int = protoc.main(  # type: ignore[no-untyped-call]
        [
            "protoc",
            f"-I{SOURCES}",
            f"-I{well_known}",
            f"--python_out={output}",
            f"--pyi_out={output}",
            *sources,
        ]
    )
    if status != 0:
        raise SystemExit(status)
    for stub in sorted((output / PACKAGE).glob("*_pb2.pyi")):
        stub.write_text(repair_stub(stub.read_text()))


def repair_stub(text: str) -> str:
    """Make a generated stub pass a strict type checker, which it does not by itself.

    The compiler leaves out type arguments, and a field named like its message hides the type
    from the rest of the class.
    """
    text = text.replace(", _Mapping]", ", _Mapping[str, object]]")
    hidden = sorted(set(re.findall(r"^    (\w+): (?:\1|.*\[\1\])$", text, re.MULTILINE)))
    classes = re.split(r"(?m)^(?=class )", text)
    for name in hidden:
        pattern = re.compile(rf"^    {name}: ", re.MULTILINE)
        use = re.compile(rf"(?<=[\[ ]){name}(?=[,\]\n])")
        classes = [use.sub(f"_{name}", part) if pattern.search(part) else part for part in classes]
    aliases = "".join(f"\n_{name} = {name}\n" for name in hidden)
    return "".join(classes) + aliases


def read_generated(root: Path) -> dict[str, bytes]:
    """Return the generated files below ``root`` by name."""
    folder = root / PACKAGE
    return {path.name: path.read_bytes() for glob in GENERATED for path in folder.glob(glob)}


def check() -> list[str]:
    """Return the names of committed files that are missing, stale or no longer generated."""
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        expected = read_generated(Path(scratch))
    committed = read_generated(OUTPUT)
    names = expected.keys() | committed.keys()
    return sorted(name for name in names if expected.get(name) != committed.get(name))


def main() -> int:
    """Run the command line; the exit status is 1 when ``--check`` finds a difference."""
    parser = argparse.ArgumentParser(description="Generate the protobuf messages.")
    parser.add_argument("--check", action="store_true", help="only compare with what is committed")
    if parser.parse_args().check:
        stale = check()
        for name in stale:
            sys.stderr.write(f"{PACKAGE / name} differs from proto/: run {sys.argv[0]}\n")
        return 1 if stale else 0
    written = read_generated(OUTPUT).keys()
    generate(OUTPUT)
    sources = {f"{path.stem}_pb2" for path in (SOURCES / PACKAGE).glob("*.proto")}
    for name in written:
        if name.partition(".")[0] not in sources:
            (OUTPUT / PACKAGE / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
