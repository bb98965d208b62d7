"""A Linux guest for tests of the built-in machine monitor, and what the host does with it.

``image``    kernel and initrd of the guest, made once and kept below ``build/``
``machine``  a machine that runs it: devices, commands in the guest, how it ended, nothing left
``network``  the other end of its network card
``streams``  checksummed streams between host and guest

In the guest, ``init.sh`` loads modules and goes into the host's own root, shared read-only, so that
fio, iperf3, stress-ng and Python are there; ``program.c`` is the one program of ours: it runs the
commands the host sends and is the guest's end of the streams.
"""
