"""LZVN, the compression of LZFSE's short blocks: an LZ77 whose codes are whole bytes.

    LLMMMDDD dddddddd            short distance      L literals, then M + 3 bytes from D bytes before
    101LLMMM ddddddMM dddddddd   medium distance
    LLMMM111 dddddddd dddddddd   long distance
    LLMMM110                     the distance of the match before
    1110LLLL   11100000 llllllll     L literals; l + 16 of them       literals follow the code
    1111MMMM   11110000 mmmmmmmm     M bytes; m + 16 of them          from the distance before
    00001110, 00010110           nothing
    00000110 and 7 bytes         the end

Written from the description in Apple's reference implementation.
"""

from __future__ import annotations

from ferrotype.errors import InvalidImage

__all__ = ["unlzvn"]

_END, _NOTHING = 0x06, (0x0E, 0x16)
_UNDEFINED = frozenset((0x1E, 0x26, 0x2E, 0x36, 0x3E, *range(0x70, 0x80), *range(0xD0, 0xE0)))


def unlzvn(data: bytes, out: bytearray, end: int) -> None:
    """Append what the data hold to ``out``, which is then ``end`` bytes long.  Raises InvalidImage."""
    first = len(out)
    at = back = 0
    try:
        while (code := data[at]) != _END:
            if code in _NOTHING:
                at += 1
                continue
            if code in _UNDEFINED:
                raise InvalidImage("compressed data have a code without a meaning")
            count, length, back, at = _parsed(data, at, code, back)
            if count:
                if at + count > len(data):
                    raise IndexError
                out += data[at : at + count]
                at += count
            start = len(out) - back
            if (length and (start < 0 or not back)) or len(out) + length > end:
                raise InvalidImage("compressed data refer to what is not there")
            if back >= length:
                out += out[start : start + length] if length else b""
            else:
                out += (out[start:] * (length // back + 1))[:length]
    except IndexError:
        raise InvalidImage("compressed data are cut short") from None
    if len(out) != end:
        raise InvalidImage(f"compressed data hold {len(out) - first} bytes where {end - first} are needed")


def _parsed(data: bytes, at: int, code: int, back: int) -> tuple[int, int, int, int]:
    """Of a code: literals, length of the match, its distance, and where what follows the code begins."""
    if code >= 0xF0:
        return (0, code & 15, back, at + 1) if code & 15 else (0, data[at + 1] + 16, back, at + 2)
    if code >= 0xE0:
        return (code & 15, 0, back, at + 1) if code & 15 else (data[at + 1] + 16, 0, back, at + 2)
    if 0xA0 <= code < 0xC0:
        low = data[at + 1] | data[at + 2] << 8
        return code >> 3 & 3, ((code & 7) << 2 | low & 3) + 3, low >> 2, at + 3
    count, length = code >> 6, (code >> 3 & 7) + 3
    if code & 7 == 7:
        return count, length, data[at + 1] | data[at + 2] << 8, at + 3
    if code & 7 == 6:
        return count, length, back, at + 1
    return count, length, (code & 7) << 8 | data[at + 1], at + 2
