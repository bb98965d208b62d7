"""The ``delete`` action: release what a container left, with or without its shim.

containerd runs it after the connection to the shim is gone: because the shim died, or in the
ordinary course of things, once per container. It must be quick (5 s are allowed), repeatable, and
must not touch the other containers of a living shim.

    shim answers, others remain ─▶ nothing to do
    shim answers, none remain ───▶ give it a moment to exit, then kill it ─┐
    shim hangs, or is dead ────────────────────────────────────────────────┴▶ recovery.clean_up
    then, always: unmount what is left below the bundle's rootfs, answer 137
"""

# ruff: noqa: PLC0415 - imports wait until they are needed: start-up time is this folder's subject

import posix
import sys
import time

from kata_hybrid.persist.mounts import unmount_below
from kata_hybrid.shim import address
from kata_hybrid.shim.bootstrap import encode_delete_response, encode_request
from kata_hybrid.shim.failure import ShimError
from kata_hybrid.shim.group import find_group

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kata_hybrid.shim.args import Arguments

EXIT_STATUS = 137
"""128 + SIGKILL: how a container ends whose end nobody saw."""
_EXIT_GRACE_S = 1.5
_ANSWER_TIMEOUT_S = 3.0
_POLL_S = 0.02


def delete(arguments: "Arguments") -> bytes:
    """Run the action for the bundle in ``-bundle``, or the present directory.

    Returns:
        The serialized DeleteResponse.

    Raises:
        ShimError: the command line makes no sense; nothing was touched.
        OSError: the run directory cannot be read.
    """
    arguments.require_identity()
    bundle = arguments.bundle or "."
    folder = _find_folder(arguments, bundle=bundle)
    problems = _release_sandbox(folder, container_id=arguments.id)
    problems += unmount_below(f"{bundle}/rootfs")
    if problems:
        # containerd logs this text as a warning; the answer is valid all the same.
        sys.stderr.write("".join(f"{problem}\n" for problem in problems))
        sys.stderr.flush()
    return encode_delete_response(pid=0, exit_status=EXIT_STATUS, exited_at_ns=time.time_ns())


def clean_up_sandbox(folder: str) -> list[str]:
    """Kill and remove everything a sandbox folder records.

    Returns:
        What could not be released.
    """
    try:
        if not posix.listdir(folder):
            posix.rmdir(folder)
            return []
    except FileNotFoundError:
        return []
    from kata_hybrid.persist.recovery import clean_up

    return clean_up(folder)


def _find_folder(arguments: "Arguments", *, bundle: str) -> str:
    """Return the sandbox's folder: as ``start`` wrote it down, else as it would compute it."""
    written = address.read_file(f"{bundle}/{address.ADDRESS_FILE}") or b""
    text = written.decode("utf-8", "replace")
    # Plain, or inside the JSON of a gRPC shim.
    path = text.partition(address.SCHEME)[2] or text.partition('"address":"')[2].partition('"')[0]
    folder, _, name = path.rpartition("/")
    if name == address.SOCKET and folder.rpartition("/")[0] == address.sandboxes_dir():
        return folder
    try:
        group_id = find_group(bundle, container_id=arguments.id).id
    except ShimError:
        # A damaged bundle must not keep the rest from being released.
        group_id = arguments.id
    return address.sandbox_dir(arguments.address, namespace=arguments.namespace, group=group_id)


def _release_sandbox(folder: str, *, container_id: str) -> list[str]:
    socket_path = f"{folder}/{address.SOCKET}"
    if not _exists(folder):
        return []
    if address.is_listening(socket_path):
        if _others_remain(folder, container_id=container_id):
            if _answers(folder):
                return []
        else:
            # An orderly shutdown removes the socket first and the folder last.
            deadline = time.monotonic() + _EXIT_GRACE_S
            while _exists(folder) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
    elif _is_closing(folder):
        deadline = time.monotonic() + _EXIT_GRACE_S
        while _is_closing(folder) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    if not _exists(folder):
        return []
    lock = address.SandboxLock()
    try:
        return clean_up_sandbox(folder)
    finally:
        lock.release()


def _is_closing(folder: str) -> bool:
    """Tell whether the server lives though it no longer listens."""
    words = (address.read_file(f"{folder}/{address.PID_FILE}") or b"").split()
    try:
        return int(words[1]) == address.start_ticks(int(words[0]))
    except (IndexError, ValueError, ShimError, OSError):
        return False


def _answers(folder: str) -> bool:
    """Ask the shim for anything: one that hangs is as good as dead, for all its containers.

    containerd gives a shim five seconds for the same question after its own restart.
    """
    import _socket

    if b"grpc" in (address.read_file(f"{folder}/{address.SPEAKS_FILE}") or b""):
        return True
    request = encode_request("containerd.task.v2.Task", method="Connect")
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        probe.settimeout(_ANSWER_TIMEOUT_S)
        probe.connect(f"{folder}/{address.SOCKET}")
        probe.send(request)
        return bool(probe.recv(1))
    except OSError:
        return False
    finally:
        probe.close()


def _others_remain(folder: str, *, container_id: str) -> bool:
    """Tell whether the sandbox holds containers besides this one."""
    from kata_hybrid.persist.recovery import read_state

    containers = read_state(folder).get("containers")
    return isinstance(containers, list) and any(other != container_id for other in containers)


def _exists(path: str) -> bool:
    try:
        posix.stat(path)
    except FileNotFoundError:
        return False
    return True
