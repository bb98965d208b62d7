"""The sandbox's cgroup on the host: this process, the machine and its helpers count as the pod's.

    outside ──enter──▶ inside ──leave──▶ outside

The path is the OCI spec's (``linux.cgroupsPath``, runtime-spec config-linux.md); kubelet limits and
reads the folder above it. On cgroup v2 it is one folder, on v1 one for each controller. No limit is
set here: the containers' own hold in the guest. Folders that were not there, or were empty, are
removed in the end, if nobody else has come meanwhile.
"""

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar

from kata_hybrid.aio.blocking import begin_in_thread
from kata_hybrid.errors import FailedPreconditionError, InvalidSpecError, UnavailableError
from kata_hybrid.persist.cgroups import remove_cgroups
from kata_hybrid.persist.mounts import Mount, mount_table

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

DEFAULT_PARENT: Final = "/kata_sandboxed_pod"
"""Where a sandbox goes whose spec names no path; Kata's."""
_OWN: Final = Path("/proc/self/cgroup")
_ROOT: Final = Path("/sys/fs/cgroup")
_PROCESSES: Final = "cgroup.procs"
_CPUSET: Final = ("cpuset.cpus", "cpuset.mems")
_COLONS: Final = 2
_EMPTY_LINKS: Final = 2
_TIMEOUT_S: Final = 10.0


class Record(Protocol):
    """Writes down what has to be removed if this process dies."""

    def __call__(self, *, cgroups: tuple[str, ...]) -> None:
        """Replace the folders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy:
    """One tree of cgroups."""

    mount_point: Path
    is_v2: bool
    controllers: frozenset[str]
    """Of v1; of v2 the folders say themselves."""
    own: Path
    """The folder this process was in before it was moved."""


class SandboxCgroup:
    """One sandbox's folder in each hierarchy."""

    def __init__(self, path: str) -> None:
        """``path``: below each hierarchy's root, as :func:`sandbox_path` gives it."""
        self._path = path.strip("/")
        self._entering: asyncio.Future[None] | None = None
        self._joined: list[Hierarchy] = []
        self._owned: tuple[str, ...] = ()

    async def enter(self, record: Record) -> None:
        """Make the folders and move this process into them; children follow.

        Raises:
            FailedPreconditionError: the host does not let us; the text says what to do.
            UnavailableError: the kernel does not come back.
        """
        if not self._path:
            return
        hierarchies = [*_hierarchies()]
        folders = [each.mount_point / self._path for each in hierarchies]
        # Before they are made: whoever cleans up after us ignores those that are not there.
        self._owned = tuple(os.fspath(folder) for folder in folders if _is_free(folder))
        record(cgroups=self._owned)
        # The first move of a process waits for every processor: milliseconds.
        self._entering = begin_in_thread(lambda: self._enter(hierarchies), name="cgroup")
        await _answer(self._entering)

    def _enter(self, hierarchies: list[Hierarchy]) -> None:
        for hierarchy in hierarchies:
            folder = hierarchy.mount_point / self._path
            try:
                _make(folder, hierarchy)
                (folder / _PROCESSES).write_text("0")
            except OSError as exc:
                message = (
                    f"move the sandbox into cgroup {folder}: {exc.strerror}; let it be writable, "
                    "or set sandbox_cgroup_only = false in [runtime]"
                )
                raise FailedPreconditionError(message) from exc
            self._joined.append(hierarchy)

    async def leave(self, record: Record) -> None:
        """Go back to where this process was, and remove the folders. Idempotent.

        Raises:
            UnavailableError: the kernel does not come back; the folders stay recorded.
        """
        if self._entering is None:
            return
        # Whoever gave up waiting for it did not end it.
        with contextlib.suppress(FailedPreconditionError):
            await _answer(self._entering)
        self._entering = None
        left = await _answer(begin_in_thread(self._leave, name="cgroup"))
        for folder, reason in left.items():
            _log.warning("cgroup stays", extra={"cgroup": folder, "reason": reason})
        self._owned = tuple(left)
        record(cgroups=self._owned)

    def _leave(self) -> dict[str, str]:
        """Return the folders that stay, and why."""
        for hierarchy in self._joined:
            folder = hierarchy.mount_point / self._path
            # What this process started and is not its own to end, such as loggers, goes along.
            movers = _family(folder) if os.fspath(folder) in self._owned else []
            for pid in (os.getpid(), *movers):
                _go_back(hierarchy, pid)
        self._joined = []
        return remove_cgroups(self._owned)


async def _answer(work: "asyncio.Future[_T]") -> _T:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            return await asyncio.shield(work)
    except TimeoutError as exc:
        message = f"cgroups of the sandbox: the kernel has not answered for {_TIMEOUT_S:g} s"
        raise UnavailableError(message) from exc


def sandbox_path(oci_path: str, sandbox_id: str) -> str:
    """Return the place of a sandbox below the root of a hierarchy.

    ``slice:prefix:name`` is systemd's way to write it (as in runc): the slice names its parents.

    Raises:
        InvalidSpecError: the path leaves the hierarchy, or is none.
    """
    if not oci_path:
        return f"{DEFAULT_PARENT}/{sandbox_id}"
    if oci_path.count(":") == _COLONS and "/" not in oci_path:
        slice_name, prefix, name = oci_path.split(":")
        unit = name if name.endswith(".slice") else f"{prefix}-{name}.scope".removeprefix("-")
        path = f"{_slice_path(slice_name or 'system.slice')}/{unit}"
    else:
        path = f"/{oci_path.lstrip('/')}"
    if ".." in path.split("/") or "\0" in path:
        message = f"linux.cgroupsPath {oci_path!r} leaves the hierarchy"
        raise InvalidSpecError(message)
    return path


def _slice_path(name: str) -> str:
    """Expand ``a-b.slice`` to ``/a.slice/a-b.slice`` (systemd.slice(5))."""
    stem = name.removesuffix(".slice")
    parts = stem.split("-")
    if not name.endswith(".slice") or not all(parts):
        if name == "-.slice":
            return ""
        message = f"linux.cgroupsPath: {name!r} is not the name of a slice"
        raise InvalidSpecError(message)
    names = ("-".join(parts[:count]) for count in range(1, len(parts) + 1))
    return "".join(f"/{each}.slice" for each in names)


def _hierarchies() -> Iterator[Hierarchy]:
    """Find the trees that have controllers: v1's, v2's, or some of each (a hybrid host)."""
    own = dict(_own_places())
    seen: set[frozenset[str]] = set()
    version2 = None
    for mount in mount_table():
        mount_point = Path(mount.point)
        if not mount_point.is_relative_to(_ROOT):
            continue
        if mount.kind == "cgroup2":
            version2 = version2 or Hierarchy(
                mount_point=mount_point,
                is_v2=True,
                controllers=frozenset(),
                own=_place(mount, own.get("", "/")),
            )
        elif mount.kind == "cgroup":
            controllers = frozenset(own).intersection(mount.options)
            # A tree may be mounted twice.
            if controllers and controllers not in seen:
                seen.add(controllers)
                yield Hierarchy(
                    mount_point=mount_point,
                    is_v2=False,
                    controllers=controllers,
                    own=_place(mount, own[next(iter(controllers))]),
                )
    if version2 and (not seen or (version2.mount_point / "cgroup.controllers").read_text().strip()):
        yield version2


def _place(mount: Mount, path: str) -> Path:
    """Return where a path of a tree is seen; the top of what is mounted where it is not."""
    with contextlib.suppress(ValueError):
        return Path(mount.point) / Path(path).relative_to(mount.root)
    return Path(mount.point)


def _own_places() -> Iterator[tuple[str, str]]:
    """Give the place of this process for each controller; for the empty name, that of v2."""
    for line in os.fsdecode(_OWN.read_bytes()).split("\n"):
        if not line:
            continue
        _, names, place = line.split(":", 2)
        for name in names.split(","):
            if not name.startswith("name="):
                yield name, place


def _is_free(folder: Path) -> bool:
    """Whether a folder is not there, or nobody's: no process in it, and no folder below it."""
    try:
        # A folder has two links, and one for each folder below it.
        return folder.stat().st_nlink <= _EMPTY_LINKS and not (folder / _PROCESSES).read_text()
    except OSError:
        return not folder.exists()


def _make(folder: Path, hierarchy: Hierarchy) -> None:
    below = hierarchy.mount_point
    for part in folder.relative_to(hierarchy.mount_point).parts:
        below /= part
        if hierarchy.is_v2:
            _enable_controllers(below.parent)
        with contextlib.suppress(FileExistsError):
            below.mkdir()
        if "cpuset" in hierarchy.controllers:
            _inherit_cpuset(below)


def _enable_controllers(folder: Path) -> None:
    """Let the folders below have what this one has; kubelet and containerd do so for theirs."""
    try:
        # With processes in it, it would become a threaded domain: nobody could enter a folder below
        # (cgroup-v2.rst, "Threads"). The root alone may have both; it alone has no type.
        if (folder / "cgroup.type").exists() and (folder / _PROCESSES).read_text():
            return
    except OSError:
        return
    enabled = (folder / "cgroup.subtree_control").read_text().split()
    for controller in (folder / "cgroup.controllers").read_text().split():
        if controller not in enabled:
            # One that cannot be had now, such as cpu while realtime threads run, is no reason
            # to do without the others.
            with contextlib.suppress(OSError):
                (folder / "cgroup.subtree_control").write_text(f"+{controller}")


def _inherit_cpuset(folder: Path) -> None:
    """On v1 nobody can enter a folder without processors and memory nodes."""
    for name in _CPUSET:
        if not (folder / name).read_text().strip():
            (folder / name).write_text((folder.parent / name).read_text())


def _go_back(hierarchy: Hierarchy, pid: int) -> None:
    """Return to the place before, or to the top, should that be gone or closed meanwhile."""
    for place in (hierarchy.own, hierarchy.mount_point):
        try:
            (place / _PROCESSES).write_text(str(pid))
        except ProcessLookupError:
            return
        except OSError as exc:
            if exc.errno not in {errno.ENOENT, errno.EBUSY, errno.EOPNOTSUPP, errno.ENODEV}:
                _log.warning("leave cgroup", extra={"cgroup": place, "error": str(exc)})
        else:
            return


def _family(folder: Path) -> list[int]:
    """Return the members of a folder that descend from this process."""
    try:
        members = (folder / _PROCESSES).read_text().split()
    except OSError:
        return []
    parents = {int(pid): _parent(pid) for pid in members}
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sorted(family - {os.getpid()})


def _parent(pid: str) -> int:
    """Return the parent's pid, 0 for a process that is gone (proc_pid_stat(5), field 4)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    return int(stat[stat.rindex(b")") + 2 :].split()[1])
