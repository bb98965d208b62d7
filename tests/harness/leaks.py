"""What a container may leave behind on its host, and how to see that it did not.

Everything of one daemon is recognisable: its private directory is in the command line or the
environment of each process, in the path of each mount, socket and file, and its namespace is in
the name of each cgroup. A census taken before a test is compared with one taken after.
"""

import contextlib
import os
from dataclasses import dataclass, fields
from pathlib import Path

from harness.daemon import Containerd
from harness.deadline import DeadlineError, wait_until

_CGROUPS = Path("/sys/fs/cgroup")
_NAMESPACES = Path("/run/netns")
"""Where containerd keeps those of pods, named ``cni-``."""
_HOST_CACHE = "host.json"
"""What the shim found out about the host; it belongs to no sandbox and is meant to stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """Everything on the host that belongs to a daemon's containers."""

    processes: frozenset[str]
    mounts: frozenset[str]
    files: frozenset[str]
    cgroups: frozenset[str]
    namespaces: frozenset[str]

    def since(self, before: "Census") -> "Census":
        """Return what was not there before."""
        return Census(
            **{
                field.name: getattr(self, field.name) - getattr(before, field.name)
                for field in fields(self)
            }
        )

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        return "\n".join(
            f"  {field.name}: {entry}"
            for field in fields(self)
            for entry in sorted(getattr(self, field.name))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostProcess:
    """A live process as ``/proc`` shows it."""

    pid: int
    parent: int
    name: str
    command: str


def take_census(containerd: Containerd) -> Census:
    """Look at the host now; the daemon itself and ``ctr`` commands don't count."""
    home = os.fspath(containerd.home)
    return Census(
        processes=frozenset(
            f"{process.pid} {process.name}: {process.command[:160]}"
            for process in find_processes(containerd)
        ),
        mounts=frozenset(point for point in mount_points() if point.startswith(home + "/")),
        files=frozenset(_files(containerd)),
        cgroups=frozenset(_cgroups(containerd.namespace)),
        namespaces=frozenset(path.name for path in _NAMESPACES.glob("cni-*") if containerd.has_cri),
    )


def assert_nothing_left(containerd: Containerd, *, before: Census, timeout_s: float = 10.0) -> None:
    """Wait for everything that came since ``before`` to be gone.

    Raises:
        DeadlineError: something stayed; the text lists it.
    """
    seen: list[Census] = []

    def is_clean() -> bool:
        seen[:] = [take_census(containerd).since(before)]
        return not seen[0]

    try:
        wait_until(is_clean, what="clean host", timeout_s=timeout_s, interval_s=0.05)
    except DeadlineError as exc:
        msg = f"left behind after {timeout_s:g} s:\n{seen[0]}\n{containerd.log_tail()}"
        raise DeadlineError(msg) from exc


def find_processes(containerd: Containerd, *, name: str = "") -> list[HostProcess]:
    """Return the processes started for a daemon's containers, by name if one is given."""
    found = []
    home = os.fsencode(containerd.home)
    cgroup = f"/{containerd.namespace}/"
    own = {os.getpid(), containerd.pid if containerd.is_running else 0}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in own:
            continue
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            belongs = (
                home in command
                or home in (entry / "environ").read_bytes()
                or cgroup in (entry / "cgroup").read_text()
            )
            if not belongs:
                continue
            # pid (name) state parent …; the name may hold spaces and parentheses.
            stat = (entry / "stat").read_text()
            title, _, rest = stat.partition("(")[2].rpartition(")")
            state, parent = rest.split()[:2]
            # Dead, and init's to collect: the lab's takes its time.
            if state == "Z" and parent == "1":
                continue
            if title == "ctr" or (name and name not in title):
                continue
            found.append(
                HostProcess(
                    pid=int(entry.name),
                    parent=int(parent),
                    name=title,
                    command=command.replace(b"\0", b" ").decode(errors="replace").strip(),
                )
            )
    return found


def count_descriptors(pid: int) -> int:
    """Return how many files a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def mount_points() -> list[str]:
    """Return every mount point of this mount namespace."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4].encode().decode("unicode_escape") for line in lines]


def _files(containerd: Containerd) -> list[str]:
    # Not the fifos: they are the client's, and `ctr exec -d` leaves its own.
    roots = [
        containerd.bundles,
        containerd.home / "root" / "io.containerd.runtime.v2.task" / containerd.namespace,
        containerd.run_dir,
    ]
    if containerd.shim_dir is not None:  # runc's killed shim does leave its socket there
        roots.append(containerd.home / "s")
    found = []
    for root in roots:
        for directory, names, files in os.walk(root):
            # Rooted file systems and shared folders are counted as mounts; don't walk into them.
            names[:] = [name for name in names if name not in {"rootfs", "shared"}]
            below = Path(directory)
            found += [os.fspath(below / name) for name in files if name != _HOST_CACHE]
            if below not in (root, containerd.run_dir / "sb"):
                found.append(directory)
    return found


def _cgroups(namespace: str) -> list[str]:
    # runc leaves the parent, named like the namespace, and so do we: it is every container's of the
    # namespace. Only what is below it was one container's.
    return [
        directory
        for directory, _, _ in os.walk(_CGROUPS)
        if Path(directory).name != namespace
        and (
            namespace in Path(directory).relative_to(_CGROUPS).parts
            or any(part.startswith("kata-hybrid") for part in Path(directory).parts)
        )
    ]
