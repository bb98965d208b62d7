"""Linux calls that Python's standard library lacks."""

__all__ = [
    "catch_loopback",
    "enter_private_mount_namespace",
    "mount",
    "set_child_subreaper",
    "set_thread_name",
    "unmount",
]

def set_child_subreaper() -> None:
    """prctl(PR_SET_CHILD_SUBREAPER): orphaned grandchildren become ours.

    Raises:
        OSError: the kernel refused.
    """

def set_thread_name(name: str) -> None:
    """prctl(PR_SET_NAME) of the calling thread: what ps shows, at most 15 bytes.

    Raises:
        OSError: the name holds a zero byte.
    """

def enter_private_mount_namespace() -> None:
    """unshare(CLONE_NEWNS), then make / recursively slave and shared.

    Host mounts still arrive; ours stay inside and vanish with the last process in it. Must be
    called while the process has one thread.

    Raises:
        OSError: the kernel refused.
    """

def mount(source: str, target: str, fstype: str, options: list[str]) -> None:
    """Attach a file system; options are fstab-style: flags are recognised, the rest is data.

    ``rbind``/``bind`` with ``ro`` also does the needed remount. Overlay data longer than a page
    goes through fsopen/fsconfig.

    Raises:
        OSError: the kernel refused; ``filename`` is the target.
    """

def unmount(target: str) -> None:
    """umount2(MNT_DETACH | UMOUNT_NOFOLLOW). A target that is no mount point is no error.

    Raises:
        OSError: the kernel refused.
    """

def catch_loopback(namespace_fd: int, listener_fd: int) -> int:
    """Let a listening TCP socket have every connection to a network namespace's loopback.

    Any port of 127.0.0.0/8 and ::1, before a listener of that port is looked for; an IPv6 socket
    that is not IPv6 only gets both. By bpf(2), ``BPF_PROG_TYPE_SK_LOOKUP`` (Linux 5.9).

    Returns:
        The hook's descriptor, the caller's own: closing it, or the process's end, undoes it.

    Raises:
        OSError: the kernel refused.
    """
