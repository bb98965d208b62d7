"""The compiled extension: machine, guest I/O and host calls. Submodules are attributes.

Write ``from kata_hybrid._native import vsock``, not ``import kata_hybrid._native.vsock``.
"""

from . import events as events
from . import host as host
from . import vmm as vmm
from . import vsock as vsock

__version__: str
