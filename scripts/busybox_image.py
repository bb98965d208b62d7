"""Writes an OCI archive of one busybox layer under several names, the same bytes every time.

Run by ``scripts/setup.py``; ``ctr image import`` takes the result. No registry is asked: the
static busybox of Debian's ``busybox-static`` is the whole root file system.
"""

import argparse
import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

IMAGE_NAME = "localhost/kata-hybrid/busybox:1"
PAUSE_NAME = "localhost/kata-hybrid/pause:1"
"""What a pod's first container is made of: it does nothing, for as long as the pod lives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What an image says beside its layer."""

    command: tuple[str, ...]
    user: str = ""


IMAGES: Final[Mapping[str, Image]] = {
    IMAGE_NAME: Image(command=("/bin/sh",)),
    PAUSE_NAME: Image(command=("/bin/sleep", "2147483647")),
}
_EPOCH = "1970-01-01T00:00:00Z"
_DIRECTORIES = ("bin", "dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "usr", "var")
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home:/bin/sh\n",
    "etc/group": "root:x:0:\nuser:x:1000:\nextra:x:2000:user\n",
    "etc/hostname": "busybox\n",
}


def _entry(
    name: str, *, kind: bytes, mode: int, size: int = 0, target: str = ""
) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type = kind
    entry.mode = mode
    entry.size = size
    entry.linkname = target
    return entry


def build_layer(busybox: Path, *, files: Mapping[str, str]) -> bytes:
    """Return the root file system as an uncompressed tar; what is in ``bin/`` can be run."""
    binary = busybox.read_bytes()
    listed = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True)
    applets = sorted({line.strip() for line in listed.stdout.splitlines()} - {"busybox", ""})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in _DIRECTORIES:
            mode = 0o1777 if name == "tmp" else 0o755
            tar.addfile(_entry(name, kind=tarfile.DIRTYPE, mode=mode))
        entry = _entry("bin/busybox", kind=tarfile.REGTYPE, mode=0o755, size=len(binary))
        tar.addfile(entry, io.BytesIO(binary))
        for applet in applets:
            tar.addfile(_entry(f"bin/{applet}", kind=tarfile.SYMTYPE, mode=0o777, target="busybox"))
        for name, text in {**_FILES, **files}.items():
            data = text.encode()
            mode = 0o755 if name.startswith("bin/") else 0o644
            entry = _entry(name, kind=tarfile.REGTYPE, mode=mode, size=len(data))
            tar.addfile(entry, io.BytesIO(data))
        # A file that is there and can't be run, for the tests of that failure.
        tar.addfile(_entry("bin/not-executable", kind=tarfile.REGTYPE, mode=0o644))
    return buffer.getvalue()


def build_archive(
    busybox: Path,
    *,
    images: Mapping[str, Image] = IMAGES,
    files: Mapping[str, str] | None = None,
    architecture: str = "amd64",
) -> bytes:
    """Return the OCI archive, of the same layer under all names; ``files`` are put into it too."""
    layer = build_layer(busybox, files=files or {})
    packed = gzip.compress(layer, mtime=0)
    blobs: dict[str, bytes] = {}

    def store(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    described = []
    for name, image in images.items():
        config = {
            "architecture": architecture,
            "os": "linux",
            "created": _EPOCH,
            "config": {
                "Env": ["PATH=/bin"],
                "Cmd": image.command,
                "WorkingDir": "/",
                **({"User": image.user} if image.user else {}),
            },
            "rootfs": {
                "type": "layers",
                "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"],
            },
            "history": [{"created": _EPOCH, "created_by": "scripts/busybox_image.py"}],
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": store(_json(config), "application/vnd.oci.image.config.v1+json"),
            "layers": [store(packed, "application/vnd.oci.image.layer.v1.tar+gzip")],
        }
        stored = store(_json(manifest), "application/vnd.oci.image.manifest.v1+json")
        stored["platform"] = {"architecture": architecture, "os": "linux"}
        stored["annotations"] = {
            "io.containerd.image.name": name,
            "org.opencontainers.image.ref.name": name.rpartition(":")[2],
        }
        described.append(stored)
    contents = {
        "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
        "index.json": _json({"schemaVersion": 2, "manifests": described}),
        **dict(sorted(blobs.items())),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("blobs", "blobs/sha256"):
            tar.addfile(_entry(name, kind=tarfile.DIRTYPE, mode=0o755))
        for name, data in contents.items():
            entry = _entry(name, kind=tarfile.REGTYPE, mode=0o644, size=len(data))
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def main() -> None:
    """Write the archive to the path given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--busybox", type=Path, default=Path("/bin/busybox"))
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    part = arguments.output.with_suffix(".part")
    part.write_bytes(build_archive(arguments.busybox))
    part.replace(arguments.output)


if __name__ == "__main__":
    main()
