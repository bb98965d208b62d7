"""Machine monitors: the contract, QEMU, and which one a host can run."""
