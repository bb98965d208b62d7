"""Drives a real, private containerd. Used by the integration tests and by ``scripts/demo.py``.

Nothing here touches the system's containerd: root, state, sockets, fifos and the shim's run
directory all live below one private directory, which is also how leftovers are recognised.
"""
