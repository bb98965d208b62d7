"""Tiny kernels, assembled here: one that prints a line on the serial port and ends in a chosen way.

Enough to see a machine of KVM's begin and end where no Linux kernel runs: they use no instruction
that a paravirtual KVM lacks.
"""

import struct
from enum import Enum

_BASE = 0x10_0000
_HEADERS_BYTES = 64 + 56
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


def tiny_kernel(message: bytes, *, end: End) -> bytes:
    """Assemble an ELF kernel that prints ``message`` and ends as ``end`` says."""
    # mov dx, 0x3f8; for each byte: mov al, BYTE; out dx, al
    code = bytes.fromhex("66baf803") + b"".join(bytes((0xB0, byte, 0xEE)) for byte in message)
    code += end.value
    size = _HEADERS_BYTES + len(code)
    ident = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)
    entry = _BASE + _HEADERS_BYTES
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 7, 0, _BASE, _BASE, size, size, 0x1000)
    return ident + header + segment + code
