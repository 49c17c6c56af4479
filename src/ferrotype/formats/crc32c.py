"""CRC-32C (Castagnoli, reflected 0x82F63B78) in numpy.

    words   w0  w1  w2  w3  w4  w5  w6  w7      the register after each word of 8 bytes alone: 8 look-ups
             \\  /    \\  /    \\  /    \\  /
    pairs     p0      p1      p2      p3        left one moved on by the right one's length: 4 look-ups
               \\      /        \\      /
                  q0              q1            ... down to one

A CRC is linear, so halves are reckoned apart and put together; every level is a handful of numpy calls.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["crc32c"]

Registers = NDArray[np.uint32]

_POLYNOMIAL: Final = np.uint32(0x82F63B78)
_WORD: Final = 8  # bytes
_PIECE: Final = 1 << 17  # words looked up at a time: their indexes stay in the cache


def crc32c(data: bytes | bytearray | memoryview | NDArray[np.uint8]) -> int:
    """CRC-32C of at least 4 bytes."""
    octets = np.frombuffer(data, np.uint8)
    if len(octets) < 4:
        raise ValueError("a CRC of less than 4 bytes is not needed anywhere")
    ahead = -len(octets) % _WORD  # zeros in front change nothing while the register starts at zero ...
    words = np.zeros((ahead + len(octets)) // _WORD * _WORD, np.uint8)
    words[ahead:] = octets
    words[ahead : ahead + 4] ^= 0xFF  # ... and starting with all ones is turning over the first 4 bytes
    registers = _of_words(words.reshape(-1, _WORD))
    level = 0
    while len(registers) > 1:
        if len(registers) % 2:
            registers = np.concatenate([np.zeros(1, np.uint32), registers])
        registers = _moved_on(registers[0::2], level) ^ registers[1::2]
        level += 1
    return int(registers[0]) ^ 0xFFFFFFFF


def _of_words(words: NDArray[np.uint8]) -> Registers:
    tables = _word_tables()
    registers = np.zeros(len(words), np.uint32)
    for at in range(0, len(words), _PIECE):
        for place in range(_WORD):
            registers[at : at + _PIECE] ^= tables[place][words[at : at + _PIECE, place]]
    return registers


def _moved_on(registers: Registers, level: int) -> Registers:
    """The registers after ``2 ** level`` further words of zeros."""
    return _looked_up(_zeros_tables(level), registers)


def _looked_up(tables: Registers, registers: Registers) -> Registers:
    found: Registers = tables[0][registers & 0xFF]
    for place in range(1, 4):
        found ^= tables[place][registers >> np.uint32(8 * place) & 0xFF]
    return found


@cache
def _byte_table() -> Registers:
    """The register that was a byte, after 8 bits more."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = table >> np.uint32(1) ^ (table & np.uint32(1)) * _POLYNOMIAL
    return table


def _after_a_zero(registers: Registers) -> Registers:
    moved: Registers = _byte_table()[registers & 0xFF] ^ registers >> np.uint32(8)
    return moved


@cache
def _word_tables() -> Registers:
    """For each place in a word, the register after a byte there and zeros from there on."""
    tables = [_byte_table()]
    while len(tables) < _WORD:
        tables.insert(0, _after_a_zero(tables[0]))
    return np.stack(tables)


@cache
def _zeros_tables(level: int) -> Registers:
    """For each byte of a register, what it comes to after ``2 ** level`` words of zeros."""
    if level:
        half = _zeros_tables(level - 1)
        return np.stack([_looked_up(half, table) for table in half])
    tables: Registers = np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None]
    for _ in range(_WORD):
        tables = _after_a_zero(tables)
    return tables
