"""Root file systems: seen by the guest through the shared folder, or as a disk of its own."""
