"""The files that every container of a pod has in ``/etc``, where nobody else makes them.

containerd makes them for a pod with a pause container, and mounts them. For a sandbox of the
Sandbox API it leaves that to whoever made the sandbox: they are written into the shared folder, and
mounted into each container that has no mount of its own there (the kubelet's ``/etc/hosts``).
"""

import os
from pathlib import Path
from typing import Final

from kata_hybrid.errors import FailedPreconditionError
from kata_hybrid.resource.share_fs.base import SharedFolder

_FOLDER: Final = "pod"
_HOSTS: Final = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"
_HOST_RESOLVER: Final = Path("/etc/resolv.conf")


def write_pod_files(
    folder: SharedFolder, *, hostname: str, resolver: tuple[str, ...]
) -> dict[str, str]:
    """Write them; they go with the folder.

    ``resolver`` are the lines of resolv.conf(5); none: the host's.

    Returns:
        The places of containers and the sources there, paths of the guest's.

    Raises:
        FailedPreconditionError: they cannot be written.
    """
    contents = {
        "hostname": f"{hostname}\n" if hostname else "",
        "hosts": _HOSTS + (f"127.0.1.1 {hostname}\n" if hostname else ""),
        "resolv.conf": "".join(f"{line}\n" for line in resolver) or _host_resolver(),
    }
    here = folder.host_path / _FOLDER
    try:
        here.mkdir(mode=0o755, exist_ok=True)
        for name, text in contents.items():
            (here / name).write_text(text)
            (here / name).chmod(0o644)
    except OSError as exc:
        message = f"write the pod's files in {here}: {exc.strerror}"
        raise FailedPreconditionError(message) from exc
    return {
        f"/etc/{name}": os.fspath(folder.guest_path / _FOLDER / name)
        for name, text in contents.items()
        if text
    }


def _host_resolver() -> str:
    try:
        return _HOST_RESOLVER.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
