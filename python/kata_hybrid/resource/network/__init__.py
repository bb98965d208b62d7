"""A pod's network as a resource: its links found, steered to the guest, and given back."""
