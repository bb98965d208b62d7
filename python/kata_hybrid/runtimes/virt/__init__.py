"""The ``virt_container`` runtime: a sandbox is a virtual machine, its containers run inside."""
