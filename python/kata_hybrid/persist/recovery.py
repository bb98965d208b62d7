"""Release on the host what a dead (or dying) shim left, from the files in its run directory.

Used by ``delete``, and by ``start`` when it finds the folder of a shim that is gone. Reads
``state.json`` (``schema.py``) and ``shim.pid`` without their modules: the writer may be years
older than the reader, and this must import next to nothing. Nobody is killed on the strength of a
pid alone: the process's start time must be the recorded one, checked with a pidfd already held.

The order is: the shim first, since it would react to the death of its helpers; then the helpers;
then mounts, cgroups, hooks on links and the folder. Each step is safe to repeat, and a failed one
does not keep the next from being tried.
"""

import errno
import json
import os
import select
import signal
import time
from collections.abc import Callable

from kata_hybrid.persist import mounts, netns
from kata_hybrid.persist.cgroups import remove_cgroups

STATE_FILE = "state.json"
PID_FILE = "shim.pid"
_KILL_TIMEOUT_S = 2.0
_MAX_STATE_BYTES = 16 << 20

Victim = tuple[str, int, int]
"""Name, pid and start ticks of a process to kill."""


def clean_up(run_dir: str, *, unmount: Callable[[str], None] = mounts.unmount) -> list[str]:
    """Kill, unmount and remove everything recorded in ``run_dir``, and the folder itself.

    ``unmount`` detaches one path, and does nothing for one that is no mount point.

    Returns:
        What could not be released, one text for each; empty when all is gone.
    """
    problems: list[str] = []
    state = read_state(run_dir, problems=problems)
    shims = _processes([state.get("shim")], default_name="shim")
    shims += _pid_file(run_dir)
    problems += kill_all(shims)
    helpers = state.get("processes")
    problems += kill_all(_processes(helpers if isinstance(helpers, list) else [], default_name=""))
    for path in reversed(_paths(state, "mounts")):
        _attempt(unmount, path, problems=problems)
    left = remove_cgroups(_paths(state, "cgroups"))
    problems += [f"remove cgroup {path}: {reason}" for path, reason in left.items()]
    problems += _release_links(state.get("links"))
    problems += mounts.unmount_below(run_dir)
    _attempt(_remove_tree, run_dir, problems=problems)
    return problems


def sweep(sandboxes_dir: str) -> list[str]:
    """Clean up after every sandbox whose shim is dead; the caller holds the lock of the folder.

    containerd asks for that by ``delete``, but not for a shim that dies between its start and the
    first connection: nobody would ever come for what that one left.
    """
    problems: list[str] = []
    for name in os.listdir(sandboxes_dir):  # noqa: PTH208
        folder = f"{sandboxes_dir}/{name}"
        shims = _pid_file(folder)
        if shims and not any(map(is_alive, shims)):
            problems += clean_up(folder)
    return problems


def read_state(run_dir: str, *, problems: list[str] | None = None) -> dict[str, object]:
    """Return the recorded state; empty when there is none or it cannot be understood."""
    path = f"{run_dir}/{STATE_FILE}"
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - pathlib is not imported here
            state = json.loads(file.read(_MAX_STATE_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as exc:
        if problems is not None:
            problems.append(f"read {path}: {exc}")
        return {}
    return state if isinstance(state, dict) else {}


def kill_all(victims: list[Victim]) -> list[str]:
    """SIGKILL processes that are still the recorded ones, and wait for them to be gone.

    Returns:
        Those that would not die in time.
    """
    pending: dict[int, Victim] = {}
    problems: list[str] = []
    try:
        for victim in victims:
            fd = _open_if_same(victim)
            if fd is None:
                continue
            pending[fd] = victim
            try:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            except ProcessLookupError:
                pass
            except OSError as exc:
                problems.append(f"kill {victim[0]} {victim[1]}: {exc.strerror}")
        if _wait_all(set(pending), timeout_s=_KILL_TIMEOUT_S):
            problems += [
                f"{name} {pid} is still there after SIGKILL"
                for name, pid, ticks in pending.values()
                if start_ticks(pid) == ticks
            ]
    finally:
        for fd in pending:
            os.close(fd)
    return problems


def is_alive(victim: Victim) -> bool:
    """Tell whether the recorded process still exists and is no zombie."""
    return start_ticks(victim[1]) == victim[2]


def shim_processes(run_dir: str) -> list[Victim]:
    """Return the recorded server process, as often as it is recorded."""
    return _processes([read_state(run_dir).get("shim")], default_name="shim") + _pid_file(run_dir)


def start_ticks(pid: int) -> int | None:
    """Return when a process started (clock ticks since boot); ``None`` for none or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123
            stat = file.read()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in {b"Z", b"X"} else int(fields[19])


def _processes(entries: list[object], *, default_name: str) -> list[Victim]:
    victims: list[Victim] = []
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        pid, ticks = entry.get("pid"), entry.get("start_ticks")
        # Never 0 or 1, and never a negative number, which would mean a process group.
        if isinstance(pid, int) and isinstance(ticks, int) and pid > 1 and ticks > 0:
            victims.append((str(entry.get("name") or default_name or "process"), pid, ticks))
    return victims


def _pid_file(run_dir: str) -> list[Victim]:
    try:
        with open(f"{run_dir}/{PID_FILE}", "rb") as file:  # noqa: PTH123
            words = file.read(64).split()
        return _processes(
            [{"pid": int(words[0]), "start_ticks": int(words[1])}], default_name="shim"
        )
    except (OSError, ValueError, IndexError):
        return []


def _paths(state: dict[str, object], key: str) -> list[str]:
    value = state.get(key)
    if not isinstance(value, list):
        return []
    return [path for path in value if isinstance(path, str) and path.startswith("/")]


def _release_links(record: object) -> list[str]:
    """Let frames of a pod's links go where they went before the sandbox."""
    if not isinstance(record, dict):
        return []
    path, identity, links = (record.get(key) for key in ("namespace", "identity", "links"))
    if not (isinstance(path, str) and isinstance(identity, str) and isinstance(links, list)):
        return []
    names = [name for name in links if isinstance(name, str)]
    return netns.remove_hooks(path, expected=identity, links=names)


def _open_if_same(victim: Victim) -> int | None:
    """Return a pidfd of the recorded process; nothing if that process is gone."""
    _, pid, ticks = victim
    if pid == os.getpid():
        return None
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return None
    # The pidfd holds this very process, so what /proc says now is said of it.
    if start_ticks(pid) != ticks:
        os.close(fd)
        return None
    return fd


def _wait_all(fds: set[int], *, timeout_s: float) -> set[int]:
    """Wait until every process has ended; return those that have not."""
    deadline = time.monotonic() + timeout_s
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    while fds and (left := deadline - time.monotonic()) > 0:
        for fd, _ in poll.poll(left * 1000):
            poll.unregister(fd)
            fds.discard(fd)
    return fds


def _remove_tree(path: str) -> None:
    """Remove a folder without following links and without entering anything mounted in it.

    Raises:
        OSError: something is mounted below it, or a name could not be removed.
    """
    for point in mounts.mounts_below(path):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), point)
    try:
        device = os.lstat(path).st_dev
    except FileNotFoundError:
        return
    _remove_entries(path, device)
    os.rmdir(path)  # noqa: PTH106


def _remove_entries(path: str, device: int) -> None:
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if entry.stat(follow_symlinks=False).st_dev != device:
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), entry.path)
                _remove_entries(entry.path, device)
                os.rmdir(entry.path)  # noqa: PTH106
            else:
                os.unlink(entry.path)  # noqa: PTH108


def _attempt(step: Callable[[str], None], path: str, *, problems: list[str]) -> None:
    try:
        step(path)
    except OSError as exc:
        problems.append(f"release {exc.filename or path}: {exc.strerror or exc}")
