"""Tiny kernels, assembled here: one that prints a line on the serial port and ends in a chosen way.

Enough to see a machine of KVM's begin and end where no Linux kernel runs: they use no instruction
that a paravirtual KVM lacks.
"""

import struct
from enum import Enum

_BASE = 0x10_0000
_FILLER = b"\x90"
_HALT = bytes.fromhex("fa f4 ebfc")
"""cli; again: hlt; jmp again."""


class End(Enum):
    """How the kernel ends; the values are x86-64 machine code."""

    POWER_OFF = bytes.fromhex("66ba0006 b034 ee") + _HALT
    """ACPI's sleep control register: sleep enable, type 5."""
    RESTART = bytes.fromhex("b0fe e664") + _HALT
    """The keyboard controller's reset line."""
    TRIPLE_FAULT = bytes.fromhex("6a00 6a00 0f011c24 0f0b")
    """No interrupt table, then an undefined instruction."""
    HALT = _HALT
    """Never."""


def tiny_kernel(message: bytes, *, end: End, pvh_size: int | None = None) -> bytes:
    """Assemble an ELF kernel that prints ``message`` and ends as ``end`` says.

    With ``pvh_size`` it has the note of a PVH kernel, which QEMU asks for, and so many bytes to be
    loaded.
    """
    # mov dx, 0x3f8; for each byte: mov al, BYTE; out dx, al. The same with 32 and with 64 bits.
    code = bytes.fromhex("66baf803") + b"".join(bytes((0xB0, byte, 0xEE)) for byte in message)
    code += end.value
    if pvh_size is None:
        return _elf(code, note=b"")
    # The headers' size is known once there is a note; its length doesn't depend on the address.
    entry = _BASE + len(_elf(b"", note=_pvh_note(0)))
    return _elf(code.ljust(pvh_size, _FILLER), note=_pvh_note(entry))


def _pvh_note(entry: int) -> bytes:
    """``XEN_ELFNOTE_PHYS32_ENTRY`` (Xen's public/elfnote.h)."""
    return struct.pack("<III4sQ", 4, 8, 18, b"Xen", entry)


def _elf(code: bytes, *, note: bytes) -> bytes:
    """Headers, the note if there is one, and the code, all of it loaded at ``_BASE``."""
    segments = 2 if note else 1
    start = 64 + 56 * segments
    size = start + len(note) + len(code)
    ident = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)
    entry = _BASE + start + len(note)
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, segments, 0, 0, 0)
    loaded = struct.pack("<IIQQQQQQ", 1, 7, 0, _BASE, _BASE, size, size, 0x1000)
    described = b""
    if note:
        place = _BASE + start
        described = struct.pack("<IIQQQQQQ", 4, 4, start, place, place, len(note), len(note), 4)
    return ident + header + loaded + described + note + code
