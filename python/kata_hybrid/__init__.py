"""Kata Hybrid: a containerd shim that runs each pod in its own light virtual machine.

Importing the package costs nothing: it holds the version only.
"""

__version__ = "0.1.0"
