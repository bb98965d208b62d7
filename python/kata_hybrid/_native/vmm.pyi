"""The machine. For now the probe that says whether KVM can run a real kernel here."""

from typing import final

__all__ = ["KvmProbe", "probe_kvm"]

@final
class KvmProbe:
    """What the probe found. Frozen."""

    @property
    def is_usable(self) -> bool:
        """A guest that meets the instructions a Linux kernel needs ran to its end."""
    @property
    def reason(self) -> str:
        """Why not, in one line, or what was seen to work."""
    @property
    def api_version(self) -> int | None:
        """KVM_GET_API_VERSION, if ``/dev/kvm`` could be opened."""

def probe_kvm() -> KvmProbe:
    """Open ``/dev/kvm`` and run a tiny long-mode guest. Takes milliseconds; never raises."""
