"""ttRPC: containerd's small RPC protocol over Unix sockets, knowing nothing of containers.

``frame`` splits the byte stream, ``server`` and ``client`` speak over asyncio, ``status`` maps
exceptions to status codes and back. Everything runs on the event loop's thread.
"""
