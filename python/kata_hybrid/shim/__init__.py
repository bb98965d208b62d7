"""The shim binary: what containerd executes.

``start`` and ``delete`` run once per container and are short: they import only what the
interpreter has built in (``posix`` rather than ``os``) and code their few messages by hand.
``run`` is the server they leave behind.
"""
