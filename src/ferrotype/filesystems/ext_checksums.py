"""The checksums of ext4, of many rows at once: crc16 with uninit_bg, crc32c with metadata_csum.

Written from "ext4 Data Structures and Algorithms" (Linux documentation, filesystems/ext4), section "Checksums".
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["CRC16", "CRC32C", "LARGE", "SMALL", "Bytes", "Checksums", "crc", "row"]

Bytes = NDArray[np.uint8]
Checksums = NDArray[np.uint32]

CRC16: Final = 0xA001
CRC32C: Final = 0x82F63B78
SMALL: Final = np.array([0xFFFF], np.uint32)  # the state a crc16 begins with
LARGE: Final = np.array([0xFFFFFFFF], np.uint32)  # the state a crc32c begins with

_COLUMNS: Final = 256  # bytes of each row turned into columns at a time: what they are made from stays in the cache


@cache
def _table(polynomial: int, bits: int) -> Checksums:
    """What ``bits`` (8 or 16) low bits of a reflected CRC's state turn into when they are shifted out."""
    table: Checksums = np.arange(1 << bits, dtype=np.uint32)
    for _ in range(bits):
        low_bit = table & 1
        table >>= 1
        table ^= low_bit * np.uint32(polynomial)
    return table


def crc(polynomial: int, state: Checksums, rows: Bytes) -> Checksums:
    """The CRC of each row, going on from its ``state``: all rows step together, two bytes at a time."""
    even = rows.shape[1] & ~1
    state = np.broadcast_to(state, len(rows)).astype(np.uint32)
    wide, index, looked_up = _table(polynomial, 16), np.empty(len(rows), np.uint16), np.empty(len(rows), np.uint32)
    for at in range(0, even, _COLUMNS):
        for pair in np.ascontiguousarray(rows[:, at : min(at + _COLUMNS, even)]).view("<u2").T.copy():
            np.bitwise_xor(state.astype(np.uint16), pair, out=index)
            np.take(wide, index, out=looked_up, mode="clip")  # "clip", since "raise" makes another copy
            state >>= 16
            state ^= looked_up
    for last in rows[:, even:].T:
        state = _table(polynomial, 8)[(state ^ last) & 0xFF] ^ (state >> 8)
    return state


def row(data: bytes) -> Bytes:
    """Bytes as the only row."""
    return np.frombuffer(data, np.uint8).reshape(1, -1)
