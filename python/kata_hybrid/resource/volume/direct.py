"""Direct volumes: file systems on disks that a storage driver leaves for the guest to mount.

Whoever prepares a volume (a CSI driver, ``kata-ctl direct-volume add``) writes a description of it
below one folder, named after the path that pods use: the base64 (RFC 4648, section 5) of it. A bind
of that path then is a disk of the guest's, and the host never mounts what is on it.
"""

import base64
import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kata_hybrid.errors import InvalidSpecError, UnimplementedError
from kata_hybrid.types import GuestDisk, GuestStorage

DIRECT_VOLUMES: Final = Path("/run/kata-containers/shared/direct-volumes")
GUEST_FOLDER: Final = "/run/kata-containers/sandbox/storage"
_DESCRIPTION: Final = "mountInfo.json"
_BLOCK: Final = "directvol"
_MAX_BYTES: Final = 1 << 20
_MAX_GROUP: Final = 2**32 - 2
_GROUP: Final = "fsGroup"
_GROUP_POLICY: Final = "fsGroupChangePolicy"
_POLICIES: Final = {"": False, "Always": False, "OnRootMismatch": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectVolume:
    """A volume that is described: a file system on a device or in a file."""

    name: str
    """Of its folder, in the guest too."""
    device: Path
    fstype: str
    options: tuple[str, ...]
    group_id: int | None
    is_group_kept_if_right: bool
    """The group is given to the files only if that of the root is another."""

    @property
    def is_read_only(self) -> bool:
        """It is mounted read-only."""
        return "ro" in self.options

    def storage(self, disk: GuestDisk) -> GuestStorage:
        """Describe it to the agent, on a disk that the guest has."""
        options = (*self.options, "nouuid") if self.fstype == "xfs" else self.options
        return GuestStorage(
            driver=disk.driver,
            source=disk.source,
            fstype=self.fstype,
            options=options,
            mount_point=f"{GUEST_FOLDER}/{self.name}",
            group_id=self.group_id,
            is_group_kept_if_right=self.is_group_kept_if_right,
        )


def direct_volume(source: str, *, folder: Path = DIRECT_VOLUMES) -> DirectVolume | None:
    """Find the volume that stands for a bind's source; None for any other source.

    Raises:
        InvalidSpecError: its description is wrong or cannot be read; the text says where and what.
        UnimplementedError: it is of a kind that is not supported.
    """
    name = base64.urlsafe_b64encode(os.fsencode(os.path.normpath(source))).decode()
    path = folder / name / _DESCRIPTION
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as exc:
        # Not there, or a name longer than a file's may be: not one of these.
        if exc.errno in {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}:
            return None
        message = f"direct volume {source}: {path}: {exc.strerror}"
        raise InvalidSpecError(message) from exc
    return _parse(data, name=name, path=path)


def _parse(data: bytes, *, name: str, path: Path) -> DirectVolume:
    try:
        _expect(len(data) <= _MAX_BYTES, f"more than {_MAX_BYTES} bytes")
        document = json.loads(data)
        _expect(isinstance(document, dict), "no JSON object")
        kind = _text(document, "volume-type")
        metadata = document.get("metadata") or {}
        _expect(isinstance(metadata, dict), "metadata must be an object")
        volume = DirectVolume(
            name=name,
            device=Path(_text(document, "device")),
            fstype=_text(document, "fstype"),
            options=_options(document.get("options") or []),
            group_id=_group(metadata.get(_GROUP)),
            is_group_kept_if_right=_policy(metadata.get(_GROUP_POLICY)),
        )
    except (ValueError, RecursionError) as exc:
        message = f"direct volume {path}: {exc}"
        raise InvalidSpecError(message) from exc
    if kind != _BLOCK:
        message = f"direct volume {path}: volume-type {kind!r}: only {_BLOCK!r} is implemented"
        raise UnimplementedError(message)
    return volume


def _expect(holds: bool, otherwise: str) -> None:  # noqa: FBT001 - as an assertion
    if not holds:
        raise ValueError(otherwise)


def _options(value: object) -> tuple[str, ...]:
    options = value if isinstance(value, list) else [None]
    texts = tuple(each for each in options if isinstance(each, str))
    _expect(len(texts) == len(options), "options must be a list of texts")
    return texts


def _text(document: dict[str, object], key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str) or not value or "\0" in value:
        message = f"{key} must be a text, is {value!r}"
        raise ValueError(message)
    return value


def _group(value: object) -> int | None:
    text = "" if value is None else str(value)
    is_number = text.isascii() and text.isdigit() and int(text) <= _MAX_GROUP
    _expect(is_number or not text, f"metadata.{_GROUP} must be a group's number, is {value!r}")
    return int(text) if text else None


def _policy(value: object) -> bool:
    text = "" if value is None else str(value)
    _expect(
        text in _POLICIES,
        f"metadata.{_GROUP_POLICY} must be Always or OnRootMismatch, is {value!r}",
    )
    return _POLICIES[text]
