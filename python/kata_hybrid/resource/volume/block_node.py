"""Raw block volumes: a device of the host's, found by its numbers, as a disk of the guest's."""

import os
from pathlib import Path
from typing import Final

from kata_hybrid.errors import InvalidSpecError

_DEVICES: Final = Path("/sys/dev/block")


def host_device(major: int, minor: int) -> Path:
    """Return the node of a block device of this host.

    Raises:
        InvalidSpecError: there is no such device, or its node is another's.
    """
    entry = _DEVICES / f"{major}:{minor}" / "uevent"
    try:
        lines = entry.read_text().splitlines()
        name = dict(line.partition("=")[::2] for line in lines)["DEVNAME"]
        path = Path("/dev") / name
        number = path.stat().st_rdev
    except (OSError, KeyError) as exc:
        message = f"block device {major}:{minor} is not there on this host"
        raise InvalidSpecError(message) from exc
    if number != os.makedev(major, minor):
        message = f"block device {major}:{minor}: {path} is {os.major(number)}:{os.minor(number)}"
        raise InvalidSpecError(message)
    return path
