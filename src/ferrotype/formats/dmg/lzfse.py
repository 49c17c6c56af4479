"""LZFSE, Apple's compression of disk images: opened, never made.

    "bvx-" size                    bytes as they are
    "bvxn" size, packed size       LZVN: an LZ77 whose codes are whole bytes (module ``lzvn``)
    "bvx1" or "bvx2" header        LZFSE: literals, then matches (L, M, D), both coded with finite state entropy
    "bvx$"                         the end

    match   L literals, then M bytes from D bytes before; D = 0 is that of the match before

Both streams of an LZFSE block are read backwards from their end.  Written from the description in Apple's reference
implementation.  Where the library of the ``lzfse`` package is installed it does the work: it is a hundred times as
fast, and its C function, unlike the one of its Python module, is told how many bytes it may write.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from typing import Final

import numpy as np

from ferrotype.errors import InvalidImage
from ferrotype.formats.dmg.lzvn import unlzvn
from ferrotype.records import Record, record, u16, u32, u64

__all__ = ["unlzfse"]

MOST_SLOW: Final = 2 << 20  # bytes of a unit that is opened without the library: a few seconds' work at worst

_L_STATES, _M_STATES, _D_STATES, _LITERAL_STATES = 64, 64, 256, 1024
_MOST_MATCHES, _MOST_LITERALS = 10_000, 40_000  # of a block
_L_BITS: Final = (*[0] * 16, 2, 3, 5, 8)
_M_BITS: Final = (*[0] * 16, 3, 5, 8, 11)
_D_BITS: Final = tuple(number // 4 for number in range(64))
_SYMBOLS: Final = (20, 20, 64, 256)  # of L, M, D, literals


@dataclass(frozen=True, slots=True)
class _Header:
    """What both kinds of LZFSE block say, and the length of the header that said it."""

    size: int
    literals: int
    matches: int
    literal_bytes: int
    match_bytes: int
    literal_bits: int  # of the last byte's bits, how many are none of the stream's: 0 to -7
    match_bits: int
    literal_states: tuple[int, int, int, int]
    states: tuple[int, int, int]
    frequencies: list[int]
    length: int


@record(endian="<", size=52)
class _V1(Record):
    """The header of a "bvx1" block, up to the frequencies: 360 of 16 bits."""

    magic: u32
    n_raw_bytes: u32
    n_payload_bytes: u32
    n_literals: u32
    n_matches: u32
    n_literal_payload_bytes: u32
    n_lmd_payload_bytes: u32
    literal_bits: u32
    literal_state_0: u16
    literal_state_1: u16
    literal_state_2: u16
    literal_state_3: u16
    lmd_bits: u32
    l_state: u16
    m_state: u16
    d_state: u16
    first_frequency: u16


@record(endian="<", size=32)
class _V2(Record):
    """The header of a "bvx2" block, up to the frequencies, which are packed."""

    magic: u32
    n_raw_bytes: u32
    fields_0: u64
    fields_1: u64
    fields_2: u64


def unlzfse(data: bytes, size: int) -> bytes:
    """What a stream holds: exactly ``size`` bytes.  Raises InvalidImage."""
    library = _library()
    if library is not None:
        return library(data, size)
    if size > MOST_SLOW:
        raise InvalidImage(f"a unit of {size} bytes is too large for LZFSE without the package lzfse")
    return _open(data, size)


@cache
def _library() -> Callable[[bytes, int], bytes] | None:
    """The decoder of the reference implementation, where it is installed."""
    spec = find_spec("lzfse")
    if spec is None or spec.origin is None or not spec.origin.endswith(tuple(EXTENSION_SUFFIXES)):
        return None
    try:
        decode = ctypes.CDLL(spec.origin).lzfse_decode_buffer
    except (OSError, AttributeError):
        return None
    decode.restype = ctypes.c_size_t
    decode.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p]

    def opened(data: bytes, size: int) -> bytes:
        out = ctypes.create_string_buffer(size)
        count = decode(out, size, data, len(data), None)
        if count != size:
            raise InvalidImage(f"compressed data hold {count} bytes where {size} are needed")
        return out.raw

    return opened


def _open(data: bytes, size: int) -> bytes:
    out = bytearray()
    at = blocks = 0
    while data[at : at + 4] != b"bvx$":
        magic = data[at : at + 4]
        stated = int.from_bytes(data[at + 4 : at + 8], "little")
        packed = int.from_bytes(data[at + 8 : at + 12], "little")
        end, blocks = len(out) + stated, blocks + 1
        if end > size or blocks > 64 + size // 1024:
            raise InvalidImage(f"compressed data hold more than the {size} bytes needed")
        if magic == b"bvx-":
            out += data[at + 8 : at + 8 + stated]
            at += 8 + stated
        elif magic == b"bvxn":
            unlzvn(data[at + 12 : at + 12 + packed], out, end)
            at += 12 + packed
        elif magic in (b"bvx1", b"bvx2"):
            at = _block(data, at, out, end)
        else:
            raise InvalidImage("compressed data have a block of an unknown kind", offset=at)
        if len(out) != end:
            raise InvalidImage(f"a compressed block does not hold the {stated} bytes that it states", offset=at)
    if len(out) != size:
        raise InvalidImage(f"compressed data hold {len(out)} bytes where {size} are needed")
    return bytes(out)


# ---------------------------------------------------------------------- headers


def _header(data: bytes, at: int) -> _Header:
    if data[at + 3 : at + 4] == b"1":
        v1 = _V1.unpack(data, at)
        length = _V1.SIZE - 2 + 2 * sum(_SYMBOLS)
        table = data[at + _V1.SIZE - 2 : at + length]
        if len(table) < 2 * sum(_SYMBOLS):
            raise InvalidImage("a compressed block's header is cut short", offset=at)
        return _Header(
            v1.n_raw_bytes,
            v1.n_literals,
            v1.n_matches,
            v1.n_literal_payload_bytes,
            v1.n_lmd_payload_bytes,
            v1.literal_bits - (v1.literal_bits >> 31 << 32),
            v1.lmd_bits - (v1.lmd_bits >> 31 << 32),
            (v1.literal_state_0, v1.literal_state_1, v1.literal_state_2, v1.literal_state_3),
            (v1.l_state, v1.m_state, v1.d_state),
            np.frombuffer(table, "<u2").tolist(),
            length,
        )
    v2 = _V2.unpack(data, at)
    a, b, c = v2.fields_0, v2.fields_1, v2.fields_2
    length = c & 0xFFFFFFFF
    if not _V2.SIZE <= length <= _V2.SIZE + 2 * sum(_SYMBOLS) or at + length > len(data):
        raise InvalidImage("a compressed block's header is cut short", offset=at)
    return _Header(
        v2.n_raw_bytes,
        a & 0xFFFFF,
        a >> 40 & 0xFFFFF,
        a >> 20 & 0xFFFFF,
        b >> 40 & 0xFFFFF,
        (a >> 60 & 7) - 7,
        (b >> 60 & 7) - 7,
        (b & 1023, b >> 10 & 1023, b >> 20 & 1023, b >> 30 & 1023),
        (c >> 32 & 1023, c >> 42 & 1023, c >> 52 & 1023),
        _frequencies(data[at + _V2.SIZE : at + length]),
        length,
    )


def _frequencies(packed: bytes) -> list[int]:
    """The frequencies of a "bvx2" header: a prefix code, low bits first.

    0: 00   1: 10   2: 001   3: 101   4..7: xx011   8..23: xxxx0111   24..1047: xxxxxxxxxx1111
    """
    if not packed:
        return [0] * sum(_SYMBOLS)
    bits, left = int.from_bytes(packed, "little"), 8 * len(packed)
    values = []
    for _ in range(sum(_SYMBOLS)):
        if bits & 1 == 0:
            value, width = bits >> 1 & 1, 2
        elif bits & 2 == 0:
            value, width = 2 + (bits >> 2 & 1), 3
        elif bits & 4 == 0:
            value, width = 4 + (bits >> 3 & 3), 5
        elif bits & 8 == 0:
            value, width = 8 + (bits >> 4 & 15), 8
        else:
            value, width = 24 + (bits >> 4 & 1023), 14
        values.append(value)
        bits >>= width
        left -= width
    if not 0 <= left < 8:
        raise InvalidImage("the frequencies of a compressed block do not fill their place")
    return values


# ---------------------------------------------------------------------- finite state entropy


def _states(frequencies: list[int], states: int) -> Iterator[tuple[int, int, int]]:
    """(symbol, bits to read, what to add to them for the next state) of every state."""
    if sum(frequencies) > states:
        raise InvalidImage("the frequencies of a compressed block are more than its states")
    for symbol, count in enumerate(frequencies):
        if not count:
            continue
        width = states.bit_length() - count.bit_length()
        wide = (2 * states >> width) - count
        for number in range(count):
            if number < wide:
                yield symbol, width, ((count + number) << width) - states
            else:
                yield symbol, width - 1, (number - wide) << (width - 1)


def _values(frequencies: list[int], states: int, extra: tuple[int, ...]) -> list[tuple[int, int, int, int, int]]:
    """(bits to read, of which the low ones are the value's, their mask, next state, value) of every state."""
    bases = [0]
    for width in extra:
        bases.append(bases[-1] + (1 << width))
    return [
        (width + extra[symbol], extra[symbol], (1 << extra[symbol]) - 1, following, bases[symbol])
        for symbol, width, following in _states(frequencies, states)
    ]


def _windows(stream: bytes) -> list[int]:
    """For every byte of the stream the 64 bits from it on."""
    padded = np.frombuffer(stream + bytes(8), np.uint8)
    return np.lib.stride_tricks.sliding_window_view(padded, 8).copy().view("<u8")[:, 0].tolist()  # type: ignore[no-any-return]


def _block(data: bytes, at: int, out: bytearray, end: int) -> int:
    """Append an LZFSE block's bytes, up to ``end``; where the next block begins."""
    head = _header(data, at)
    middle = at + head.length + head.literal_bytes
    behind = middle + head.match_bytes
    # literals come in fours, and a match makes at least one byte: what makes none would only take time
    room = end - len(out)
    if head.literals > min(_MOST_LITERALS, room + 3) or head.matches > min(_MOST_MATCHES, room):
        raise InvalidImage("a compressed block holds more than it may", offset=at)
    if behind > len(data) or max(head.literal_states) >= _LITERAL_STATES:
        raise InvalidImage("a compressed block is cut short", offset=at)
    if not (-7 <= head.literal_bits <= 0 and -7 <= head.match_bits <= 0):
        raise InvalidImage("a compressed block's streams do not end in their last bytes", offset=at)
    try:
        literals = _literals(head, data[at + head.length : middle])
        _matches(head, data[middle:behind], literals, out, end)
    except IndexError:  # a state that no symbol has, or bits before the first
        raise InvalidImage("compressed data cannot be opened", offset=at) from None
    return behind


def _literals(head: _Header, stream: bytes) -> bytes:
    table = [(width, (1 << width) - 1, add, symbol) for symbol, width, add in _states(head.frequencies[104:], 1024)]
    windows = _windows(stream)
    place = 8 * len(stream) + head.literal_bits
    literals = bytearray(head.literals + 3)
    one, two, three, four = head.literal_states
    for at in range(0, head.literals, 4):
        width, mask, add, literals[at] = table[one]
        place -= width
        one = add + (windows[place >> 3] >> (place & 7) & mask)
        width, mask, add, literals[at + 1] = table[two]
        place -= width
        two = add + (windows[place >> 3] >> (place & 7) & mask)
        width, mask, add, literals[at + 2] = table[three]
        place -= width
        three = add + (windows[place >> 3] >> (place & 7) & mask)
        width, mask, add, literals[at + 3] = table[four]
        place -= width
        four = add + (windows[place >> 3] >> (place & 7) & mask)
        if place < 0:
            raise IndexError
    return bytes(literals[: head.literals])


def _matches(head: _Header, stream: bytes, literals: bytes, out: bytearray, end: int) -> None:
    l_table = _values(head.frequencies[:20], _L_STATES, _L_BITS)
    m_table = _values(head.frequencies[20:40], _M_STATES, _M_BITS)
    d_table = _values(head.frequencies[40:104], _D_STATES, _D_BITS)
    windows = _windows(stream)
    place = 8 * len(stream) + head.match_bits
    l_state, m_state, d_state = head.states
    taken = back = 0
    for _ in range(head.matches):
        width, low, mask, add, base = l_table[l_state]
        place -= width
        bits = windows[place >> 3] >> (place & 7) & ((1 << width) - 1)
        l_state, count = add + (bits >> low), base + (bits & mask)
        width, low, mask, add, base = m_table[m_state]
        place -= width
        bits = windows[place >> 3] >> (place & 7) & ((1 << width) - 1)
        m_state, length = add + (bits >> low), base + (bits & mask)
        width, low, mask, add, base = d_table[d_state]
        place -= width
        bits = windows[place >> 3] >> (place & 7) & ((1 << width) - 1)
        d_state, distance = add + (bits >> low), base + (bits & mask)
        if place < 0:
            raise IndexError
        if count:
            out += literals[taken : taken + count]
            taken += count
        back = distance or back
        start = len(out) - back
        if start < 0 or (length and not back) or taken > len(literals) or len(out) + length > end:
            raise InvalidImage("compressed data refer to what is not there")
        if back >= length:
            out += out[start : start + length]
        else:
            out += (out[start:] * (length // back + 1))[:length]
