"""The OCI runtime specification: reading the host's, writing the guest's."""
