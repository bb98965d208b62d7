"""Tiny static guest programs, assembled here: an /init that says a line and ends in a chosen way.

Enough to see a kernel boot and a machine end, with no compiler and no agent.
"""

import struct
from enum import Enum

_BASE = 0x400000
_HEADERS_BYTES = 64 + 56


class Ending(Enum):
    """How the program ends; the values are x86-64 machine code."""

    POWER_OFF = bytes.fromhex("b8a9000000 bfaddee1fe be69191228 badcfe2143 0f05".replace(" ", ""))
    RESTART = bytes.fromhex("b8a9000000 bfaddee1fe be69191228 ba67452301 0f05".replace(" ", ""))
    EXIT = bytes.fromhex("b83c000000 bf03000000 0f05".replace(" ", ""))
    """The kernel panics when init ends."""
    PAUSE = bytes.fromhex("b822000000 0f05 ebf7".replace(" ", ""))
    """Sleeps for ever."""


def say(message: bytes, *, ending: Ending, times: int = 1) -> bytes:
    """Assemble an ELF program that writes ``message`` to its standard output and then ends."""
    # mov ebx, times; again: mov eax, 1 (write); mov edi, 1; lea rsi, [rip+message]; mov edx, length
    head = struct.pack("<BI", 0xBB, times)
    write = bytes.fromhex("b801000000bf01000000488d35")
    tail = struct.pack("<BI", 0xBA, len(message)) + bytes.fromhex("0f05ffcb75")
    body_bytes = len(write) + 4 + len(tail) + 1
    after_lea = len(tail) + 1 + len(ending.value)
    code = (
        head
        + write
        + struct.pack("<i", after_lea)
        + tail
        + struct.pack("<b", -body_bytes)  # jnz again
        + ending.value
        + message
    )
    entry = _BASE + _HEADERS_BYTES
    size = _HEADERS_BYTES + len(code)
    ident = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return ident + header + segment + code
