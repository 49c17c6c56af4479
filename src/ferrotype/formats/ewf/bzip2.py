"""bzip2 as EWF version 2 has it: whole streams, and blocks without what stands before and behind them.

    whole     | BZh9 | block: pi, CRC-32, data | end: square root of pi, CRC-32 |
    EnCase           | block: pi, CRC-32, data |

Source: "Expert Witness Compression Format version 2 specification" (libyal), Bzip2 compression.
"""

from __future__ import annotations

import bz2
from typing import Final

from ferrotype.errors import InvalidImage

__all__ = ["bunzip2_sealed"]

_HEADER: Final = b"BZh9"  # 9: blocks of up to 900 kB, the largest there are


def bunzip2_sealed(data: bytes, most: int) -> bytes:
    """What a bzip2 stream or block holds, at most ``most`` bytes, proven by the CRC-32 of its blocks.

    What follows a stream is left alone; behind a block there may be zeros.  Raises InvalidImage.
    """
    stream = bz2.BZ2Decompressor()
    given = data.rstrip(b"\0")  # a block may end with zeros that are its own: they are given where it lacks them
    zeros = len(data) - len(given)
    plain, given = b"", given if given.startswith(b"BZh") else _HEADER + given
    try:
        while len(plain) <= most and not stream.eof:  # once more than there is, which has the last CRC compared
            piece = stream.decompress(given, most + 1 - len(plain))
            if not piece and (plain or not zeros):
                break
            given = b"" if piece else b"\0"
            zeros -= not piece
            plain += piece
    except OSError as error:
        raise InvalidImage(f"compressed data cannot be opened: {error}") from None
    if len(plain) > most:
        raise InvalidImage(f"compressed data holds more than the {most} bytes of its place")
    return plain
