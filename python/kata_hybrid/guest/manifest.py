"""What went into a guest and what came out: ``manifest.json`` beside the kernel and the initrd.

Holds no time and no folder names of the building machine but those it was told on the command
line, so that it is reproducible like the files it describes.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from kata_hybrid.errors import InvalidArgumentError

MANIFEST_NAME = "manifest.json"
SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    """A file of the build, by name, size and content."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything the guest was made of."""

    schema: int
    builder_version: str
    command: str
    """A command line that makes the same bytes from the same inputs."""
    kernel_version: str
    kernel_source: str
    """Package and version, or the file given."""
    modules: tuple[str, ...]
    inputs: tuple[FileDigest, ...]
    outputs: tuple[FileDigest, ...]

    def to_json(self) -> str:
        """Lay it out as JSON, keys sorted."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    def output(self, name: str) -> FileDigest:
        """Look an output up by name.

        Raises:
            KeyError: there is none.
        """
        for digest in self.outputs:
            if digest.name == name:
                return digest
        raise KeyError(name)


def digest_bytes(name: str, data: bytes) -> FileDigest:
    """Digest a file that is in memory."""
    return FileDigest(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def digest_file(path: Path, *, name: str | None = None) -> FileDigest:
    """Digest a file on disk.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return FileDigest(name=name or path.name, size=path.stat().st_size, sha256=sha256)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest back.

    Raises:
        OSError: it cannot be read.
        InvalidArgumentError: it is not one, or of another schema.
    """
    try:
        document = json.loads(path.read_text())
        if document["schema"] != SCHEMA:
            msg = f"{path}: schema {document['schema']} is not {SCHEMA}"
            raise InvalidArgumentError(msg)
        return Manifest(
            schema=SCHEMA,
            builder_version=str(document["builder_version"]),
            command=str(document["command"]),
            kernel_version=str(document["kernel_version"]),
            kernel_source=str(document["kernel_source"]),
            modules=tuple(str(name) for name in document["modules"]),
            inputs=tuple(FileDigest(**entry) for entry in document["inputs"]),
            outputs=tuple(FileDigest(**entry) for entry in document["outputs"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{path}: not a guest manifest"
        raise InvalidArgumentError(msg) from error
