"""Apple Data Compression (ADC), the oldest one of disk images: opened, never made.

    1nnnnnnn  n + 1 bytes as they are                                         follow
    01nnnnnn  dddddddd dddddddd     n + 4 bytes from d + 1 bytes before       three bytes in all
    00nnnndd  dddddddd              n + 3 bytes from d + 1 bytes before       two bytes

No specification was published; the layout is what readers of such images agree on.
"""

from __future__ import annotations

from ferrotype.errors import InvalidImage

__all__ = ["unadc"]


def unadc(data: bytes, size: int) -> bytes:
    """What the data hold: exactly ``size`` bytes, whatever follows them.  Raises InvalidImage."""
    out = bytearray()
    at = 0
    try:
        while len(out) < size:
            code = data[at]
            if code & 0x80:
                count = (code & 0x7F) + 1
                piece = data[at + 1 : at + 1 + count]
                if len(piece) < count:
                    raise IndexError
                out += piece
                at += 1 + count
                continue
            if code & 0x40:
                count, back = (code & 0x3F) + 4, (data[at + 1] << 8 | data[at + 2]) + 1
                at += 3
            else:
                count, back = (code >> 2 & 0x0F) + 3, ((code & 3) << 8 | data[at + 1]) + 1
                at += 2
            start = len(out) - back
            if start < 0:
                raise InvalidImage("compressed data refer to what lies before them")
            match = out[start : start + count]
            out += match if back >= count else (match * (count // back + 1))[:count]
    except IndexError:
        raise InvalidImage(f"compressed data end after {len(out)} bytes where {size} are needed") from None
    if len(out) != size:
        raise InvalidImage(f"compressed data hold {len(out)} bytes where {size} are needed")
    return bytes(out)
