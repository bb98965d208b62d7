"""This process's open descriptors, to tell what a test left open."""

from pathlib import Path


def open_descriptors() -> set[str]:
    """Return their numbers, as text."""
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def is_alive(pid: int) -> bool:
    """Say whether a process (or a zombie) has this pid."""
    return Path(f"/proc/{pid}").exists()
