"""The compiled extension: machine, guest I/O and host calls. Submodules are attributes.

Write ``from kata_hybrid._native import vsock``, not ``import kata_hybrid._native.vsock``.
"""

from kata_hybrid._native import events as events
from kata_hybrid._native import host as host
from kata_hybrid._native import vmm as vmm
from kata_hybrid._native import vsock as vsock

__all__ = ["__version__", "events", "host", "vmm", "vsock"]

__version__: str
