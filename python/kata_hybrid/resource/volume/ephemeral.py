"""Volumes in memory: what is a tmpfs of the host's for a pod becomes one of its guest's.

The kubelet mounts a tmpfs for an ``emptyDir`` of medium ``Memory`` and names it as the source of a
bind. Shared as a folder, its data would be in the host's memory and once more in the guest's, and
be charged to nobody's limit. So the guest has a tmpfs of its own, of the same size; the pod's
containers share it, and it lives as long as the guest (Kata's "ephemeral" volumes).
"""

import os
import stat
from pathlib import Path
from typing import Final

from kata_hybrid.persist.mounts import file_system_at
from kata_hybrid.types import GuestStorage

EMPTY_DIR: Final = "kubernetes.io~empty-dir"
"""Where the kubelet has a pod's volumes of that kind, each named as in the pod."""
GUEST_FOLDER: Final = "/run/kata-containers/sandbox/ephemeral"


def ephemeral_storage(source: str) -> GuestStorage | None:
    """Describe the tmpfs that stands for a bind's source in the guest.

    None: the source is no volume in memory, but something to be shared.
    """
    path = Path(os.path.normpath(source))
    # Most sources are told by their name; the mounts of a node may be thousands.
    if path.parent.name != EMPTY_DIR:
        return None
    mounted = file_system_at(os.fspath(path))
    if mounted is None or mounted[0] != "tmpfs":
        return None
    status = path.stat()
    wanted = [option for option in mounted[1] if option.startswith("size=")]
    wanted += ["nodev", f"mode={stat.S_IMODE(status.st_mode):o}"]
    if status.st_gid != 0:
        # What a pod's fsGroup makes of the volume.
        wanted.append(f"fsgid={status.st_gid}")
    return GuestStorage(
        driver="ephemeral",
        source="tmpfs",
        fstype="tmpfs",
        mount_point=f"{GUEST_FOLDER}/{path.name}",
        options=tuple(wanted),
        is_shared=True,
    )
