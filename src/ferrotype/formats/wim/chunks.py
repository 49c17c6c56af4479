"""The compressions of WIM chunks: XPRESS (Huffman) and LZX.

Both are Huffman codes and matches over 16-bit little-endian words, read from the highest bit down.  They are opened
in Python: a few MiB a second, enough for folders and single files.

XPRESS  | 256 bytes: 512 code lengths of 4 bits | symbols; the bytes of long lengths stand between the words |
LZX     | block | block | ...      verbatim, with aligned offsets, or uncompressed; then x86 calls are undone

Sources: [MS-XCA] section 2.2 for XPRESS; [MS-PATCH] "LZX DELTA" and the LZX of cabinets for LZX, with the three
differences of WIM: blocks of 32768 bytes have a one-bit length, the window is the chunk, and the file size for calls
is always 12,000,000.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import InvalidImage

__all__ = ["unlzx", "unxpress"]

_CALLS_SIZE: Final = 12_000_000  # what LZX in WIM takes every file to have, for calls
_SHORTEST_CALL: Final = 10  # bytes at the end of a chunk in which no call is translated
_LENGTH_SYMBOLS: Final = 249
_VERBATIM, _ALIGNED, _UNCOMPRESSED = 1, 2, 3
_SLOTS: Final = {15: 30, 16: 32, 17: 34, 18: 36, 19: 38, 20: 42, 21: 50}  # offset slots by the window's bits


def _extra_bits(slot: int) -> int:
    return 0 if slot < 4 else min(slot // 2 - 1, 17)


_EXTRA: Final = [_extra_bits(slot) for slot in range(50)]
_BASES: Final = [sum(1 << bits for bits in _EXTRA[:slot]) - 2 for slot in range(50)]  # offsets are kept 2 too large


def _table(lengths: NDArray[np.uint8]) -> tuple[list[int], int]:
    """What the next bits mean, as symbol * 32 + length of its code, and how many bits have to be looked at.

    Raises InvalidImage at lengths that make no complete code.
    """
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    if not len(order):
        return [-1, -1], 1  # no symbol at all: fine as long as none is read
    sizes = lengths[order].astype(np.int64)
    bits = int(sizes[-1])
    spans = np.left_shift(1, bits - sizes)
    if int(spans.sum()) != 1 << bits:
        raise InvalidImage("compressed data has a code that is not complete")
    table: list[int] = np.repeat(order * 32 + sizes, spans).tolist()
    return table, bits


def _repeat(out: bytearray, offset: int, length: int) -> None:
    """Add ``length`` bytes that stand ``offset`` bytes back; they may overlap what is added."""
    start = len(out) - offset
    if start < 0 or offset < 1:
        raise InvalidImage("compressed data refers to what is before its begin")
    if offset >= length:
        out += out[start : start + length]
    else:
        out += (out[start:] * (length // offset + 1))[:length]


def unxpress(data: bytes, size: int) -> bytes:
    """A chunk of exactly ``size`` bytes.  Raises InvalidImage."""
    if len(data) < 260:
        raise InvalidImage("compressed data is cut short")
    octets = np.frombuffer(data, np.uint8, 256)
    lengths = np.empty(512, np.uint8)
    lengths[0::2], lengths[1::2] = octets & 15, octets >> 4
    table, look = _table(lengths)
    mask = (1 << look) - 1
    end = len(data)
    pos = 260
    word = int.from_bytes(data[256:258], "little") << 16 | int.from_bytes(data[258:260], "little")
    bits = 32  # of ``word`` that are left; at least 16 before every symbol
    out = bytearray()
    while len(out) < size:
        entry = table[word >> bits - look & mask]
        if entry < 0:
            raise InvalidImage("compressed data has no code")
        bits -= entry & 31
        if bits < 16:
            if pos + 2 > end + 4:
                raise InvalidImage("compressed data is cut short")
            word = (word & 0xFFFF) << 16 | int.from_bytes(data[pos : pos + 2], "little")
            bits, pos = bits + 16, pos + 2
        symbol = entry >> 5
        if symbol < 256:
            out.append(symbol)
            continue
        length, width = symbol & 15, symbol >> 4 & 15
        if length == 15:
            length, pos = _long_length(data, pos)
        offset = 1 << width | (word >> bits - width & (1 << width) - 1)
        bits -= width
        if bits < 16:
            if pos + 2 > end + 4:
                raise InvalidImage("compressed data is cut short")
            word = (word & 0xFFFF) << 16 | int.from_bytes(data[pos : pos + 2], "little")
            bits, pos = bits + 16, pos + 2
        if len(out) + length + 3 > size:
            raise InvalidImage("compressed data is longer than its chunk")
        _repeat(out, offset, length + 3)
    return bytes(out)


def _long_length(data: bytes, pos: int) -> tuple[int, int]:
    """A length that does not fit its symbol, and where the data goes on."""
    if pos + 3 > len(data) and pos >= len(data):
        raise InvalidImage("compressed data is cut short")
    length = 15 + data[pos]
    if length < 15 + 255:
        return length, pos + 1
    return int.from_bytes(data[pos + 1 : pos + 3], "little"), pos + 3


class _Lzx:
    """One chunk being opened.  Bits are named by their number from the begin of the data."""

    def __init__(self, data: bytes, size: int, window: int) -> None:
        self.data, self.size = data, size
        words = np.frombuffer(data[: len(data) // 2 * 2], "<u2").astype(np.uint32)
        words = np.concatenate((words, np.zeros(4, np.uint32)))
        self.pairs: list[int] = (words[:-1] << np.uint32(16) | words[1:]).tolist()  # any 16 bits lie in one of them
        self.last = 8 * len(data) + 16
        self.at = 0
        self.out = bytearray()
        self.large = window > 15
        self.mains = np.zeros(256 + 8 * _SLOTS[window], np.uint8)
        self.lengths = np.zeros(_LENGTH_SYMBOLS, np.uint8)
        self.recent = [1, 1, 1]

    def take(self, count: int) -> int:
        """The next bits, at most 16."""
        at = self.at
        self.at = at + count
        if at + count > self.last:
            raise InvalidImage("compressed data is cut short")
        return self.pairs[at >> 4] >> 32 - (at & 15) - count & (1 << count) - 1

    def wide(self, count: int) -> int:
        """The same for up to 17 bits."""
        return self.take(count) if count <= 16 else self.take(count - 16) << 16 | self.take(16)

    def open(self) -> bytearray:
        while len(self.out) < self.size:
            kind = self.take(3)
            length = 32768 if self.take(1) else self.take(16)
            if self.large and length != 32768:
                length = length << 8 | self.take(8)
            end = len(self.out) + length
            if not length or end > self.size:
                raise InvalidImage(f"a block of {length} bytes does not fit its chunk")
            if kind == _UNCOMPRESSED:
                self.copy(length)
            elif kind in (_VERBATIM, _ALIGNED):
                self.block(end, aligned=kind == _ALIGNED)
            else:
                raise InvalidImage(f"block type {kind} is unknown")
        return self.out

    def copy(self, length: int) -> None:
        at = (self.at // 16 + 1) * 2  # behind the word that is begun, or a whole one of padding
        if at + 12 + length > len(self.data):
            raise InvalidImage("compressed data is cut short")
        self.recent = [int.from_bytes(self.data[at + n : at + n + 4], "little") for n in (0, 4, 8)]
        self.out += self.data[at + 12 : at + 12 + length]
        self.at = 8 * (at + 12 + length + length % 2)

    def code_lengths(self, lengths: NDArray[np.uint8]) -> None:
        """Bring code lengths up to date: each is coded by its difference from the one it had."""
        codes = _table(np.array([self.take(4) for _ in range(20)], np.uint8))
        at = 0
        while at < len(lengths):
            symbol = self.symbol(codes)
            if symbol < 17:
                lengths[at] = (int(lengths[at]) - symbol) % 17
                at += 1
                continue
            if symbol == 17:
                count, value = 4 + self.take(4), 0
            elif symbol == 18:
                count, value = 20 + self.take(5), 0
            else:
                count = 4 + self.take(1)
                symbol = self.symbol(codes)
                if symbol > 16:
                    raise InvalidImage("compressed data has an impossible code length")
                value = (int(lengths[at]) - symbol) % 17
            lengths[at : at + count] = value
            at += count

    def symbol(self, codes: tuple[list[int], int]) -> int:
        """The next symbol of a code."""
        if self.at >= self.last:
            raise InvalidImage("compressed data is cut short")
        table, look = codes
        entry = table[self.pairs[self.at >> 4] >> 32 - (self.at & 15) - look & (1 << look) - 1]
        if entry < 0:
            raise InvalidImage("compressed data has no code")
        self.at += entry & 31
        return entry >> 5

    def block(self, end: int, *, aligned: bool) -> None:
        """Symbols up to ``end`` bytes in all."""
        lows: tuple[list[int], int] = ([], 0)
        if aligned:
            lows = _table(np.array([self.take(3) for _ in range(8)], np.uint8))
        for part in (self.mains[:256], self.mains[256:], self.lengths):
            self.code_lengths(part)
        (mains, main_look), (lengths, length_look) = _table(self.mains), _table(self.lengths)
        main_shift, main_mask = 32 - main_look, (1 << main_look) - 1
        length_shift, length_mask = 32 - length_look, (1 << length_look) - 1
        at, pairs, last, out, recent = self.at, self.pairs, self.last, self.out, self.recent
        while len(out) < end:
            if at >= last:
                raise InvalidImage("compressed data is cut short")
            entry = mains[pairs[at >> 4] >> main_shift - (at & 15) & main_mask]
            if entry < 0:
                raise InvalidImage("compressed data has no code")
            at += entry & 31
            symbol = entry >> 5
            if symbol < 256:
                out.append(symbol)
                continue
            length, slot = symbol & 7, symbol - 256 >> 3
            if length == 7:
                if at >= last:
                    raise InvalidImage("compressed data is cut short")
                entry = lengths[pairs[at >> 4] >> length_shift - (at & 15) & length_mask]
                if entry < 0:
                    raise InvalidImage("compressed data has no code")
                at += entry & 31
                length += entry >> 5
            if slot < 3:
                offset = recent[slot]
                recent[slot] = recent[0]
            else:
                self.at = at
                extra = _EXTRA[slot]
                if aligned and extra >= 3:
                    offset = _BASES[slot] + (self.wide(extra - 3) << 3)
                    offset += self.symbol(lows)
                else:
                    offset = _BASES[slot] + self.wide(extra)
                at = self.at
                recent[2] = recent[1]
                recent[1] = recent[0]
            recent[0] = offset
            if len(out) + length + 2 > end:
                raise InvalidImage("compressed data is longer than its block")
            _repeat(out, offset, length + 2)
        self.at = at


def unlzx(data: bytes, size: int, window: int) -> bytes:
    """A chunk of exactly ``size`` bytes; ``window`` is the binary logarithm of the size of a full chunk."""
    if window not in _SLOTS:
        raise InvalidImage(f"LZX has no window of 2**{window} bytes")
    out = _Lzx(data, size, window).open()
    at = out.find(0xE8)
    while 0 <= at < size - _SHORTEST_CALL:
        target = int.from_bytes(out[at + 1 : at + 5], "little", signed=True)
        if -at <= target < _CALLS_SIZE:
            relative = target - at if target >= 0 else target + _CALLS_SIZE
            out[at + 1 : at + 5] = relative.to_bytes(4, "little", signed=True)
        at = out.find(0xE8, at + 5)
    return bytes(out)
