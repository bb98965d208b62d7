"""This process's open descriptors, to tell what a test left open."""

from pathlib import Path


def open_descriptors() -> set[str]:
    """Return their numbers, as text, without the one that the listing itself needs."""
    listed = list(Path("/proc/self/fd").iterdir())
    return {path.name for path in listed if path.is_symlink()}


def is_alive(pid: int) -> bool:
    """Say whether a process (or a zombie) has this pid."""
    return Path(f"/proc/{pid}").exists()
