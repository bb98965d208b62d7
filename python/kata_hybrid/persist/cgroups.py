"""Remove cgroup folders that a sandbox made and has left.

Nobody is killed for being in one, and no folder below is removed: others may have entered after the
sandbox did, and who they are is not known here. Such a folder stays, and is told of. Imports only
what the interpreter has built in, for ``delete``'s sake.
"""

import os
import time
from collections.abc import Iterable

_TIMEOUT_S = 1.0
_RETRY_S = 0.02
_ROOT = "/sys/fs/cgroup/"


def remove_cgroups(paths: Iterable[str]) -> dict[str, str]:
    """Remove folders, waiting a second for all of them together until the last members are gone.

    Returns:
        The folders that stay, and why.
    """
    deadline = time.monotonic() + _TIMEOUT_S
    staying: dict[str, str] = {}
    for path in paths:
        if not path.startswith(_ROOT) or "/../" in path + "/":
            staying[path] = "not a cgroup"
            continue
        try:
            _remove(path, deadline)
        except OSError as exc:
            staying[path] = f"{exc.strerror}: {_members(path)}"
    return staying


def _remove(path: str, deadline: float) -> None:
    while True:
        try:
            os.rmdir(path)  # noqa: PTH106 - pathlib is not imported here
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S)  # There is no event for "the last member is gone" on v1.
        else:
            return


def _members(path: str) -> str:
    """Name who is in a folder."""
    try:
        with open(f"{path}/cgroup.procs", "rb") as file:  # noqa: PTH123
            pids = file.read().decode().split()
    except OSError:
        pids = []
    return f"processes {', '.join(pids)} are in it" if pids else "there are folders in it"
