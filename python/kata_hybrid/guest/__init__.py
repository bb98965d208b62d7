"""Building the guest: a kernel, an initial root file system, and a manifest of both."""
