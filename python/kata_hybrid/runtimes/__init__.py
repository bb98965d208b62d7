"""Runtimes: what a sandbox is made of. ``virt`` runs it as a virtual machine."""
