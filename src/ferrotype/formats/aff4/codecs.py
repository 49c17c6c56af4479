"""The compressions of AFF4's chunks: snappy and LZ4 blocks, besides those that other containers share.

Where the package ``cramjam`` is installed it does the work, with the interpreter lock released; what stands here
without it is many times slower.  Written from "format_description.txt" of snappy, "lz4_Block_format.md", and section
3.3 of "AFF4 Standard v1.0a", whose own example has an address with http where its table has https: both are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Final

from ferrotype.errors import InvalidImage
from ferrotype.formats.codecs import inflate

__all__ = ["CODECS", "STORED"]

STORED: Final = "stored"


@cache
def _cramjam() -> Any:
    """The package, or None.  It has no types."""
    try:
        return import_module("cramjam")
    except ImportError:
        return None


def _snappy(data: bytes, size: int) -> bytes:
    length, at = _varint(data)
    if not 0 < length <= size:
        raise InvalidImage(f"a chunk states {length} bytes where at most {size} can be")
    fast = _cramjam()
    if fast is None:
        return _slow_snappy(data, at, length)
    out = bytearray(length)
    return _checked(fast, lambda: fast.snappy.decompress_raw_into(data, out), out)


def _lz4(data: bytes, size: int) -> bytes:
    fast = _cramjam()
    if fast is None:
        return _slow_lz4(data, size)
    out = bytearray(size)
    return _checked(fast, lambda: fast.lz4.decompress_block_into(data, out, output_len=size), out)


def _checked(fast: Any, call: Callable[[], int], out: bytearray) -> bytes:
    try:
        count = call()
    except fast.DecompressionError as error:
        raise InvalidImage(f"a chunk cannot be opened: {error}") from None
    return bytes(memoryview(out)[:count])


def _zlib(data: bytes, size: int) -> bytes:
    return inflate(data, size)


def _deflate(data: bytes, size: int) -> bytes:
    """Bare or, as some write it, with the header of zlib."""
    if len(data) > 2 and data[0] & 15 == 8 and (data[0] << 8 | data[1]) % 31 == 0:
        try:
            return inflate(data, size)
        except InvalidImage:
            pass  # bare, and looks like the header by chance
    return inflate(data, size, wbits=-15)


_ADDRESSES: Final[dict[str, tuple[str, Callable[[bytes, int], bytes] | None]]] = {
    "aff4.org/Schema#NullCompressor": (STORED, None),
    "aff4.org/Schema#compression/stored": (STORED, None),
    "www.ietf.org/rfc/rfc1950.txt": ("zlib", _zlib),
    "tools.ietf.org/html/rfc1950": ("zlib", _zlib),
    "www.ietf.org/rfc/rfc1951.txt": ("deflate", _deflate),
    "tools.ietf.org/html/rfc1951": ("deflate", _deflate),
    "code.google.com/p/snappy/": ("snappy", _snappy),
    "github.com/google/snappy": ("snappy", _snappy),
    "code.google.com/p/lz4/": ("lz4", _lz4),
}
CODECS: Final = {f"{scheme}://{rest}": codec for rest, codec in _ADDRESSES.items() for scheme in ("http", "https")}


# ---------------------------------------------------------------------- without the package


def _varint(data: bytes) -> tuple[int, int]:
    """The number at the start, and where what follows it begins."""
    value = 0
    for at, octet in enumerate(data[:5]):
        value |= (octet & 0x7F) << 7 * at
        if octet < 0x80:
            return value, at + 1
    raise InvalidImage("a chunk does not begin with its size")


def _slow_snappy(data: bytes, at: int, size: int) -> bytes:
    out = bytearray()
    try:
        while at < len(data):
            tag = data[at]
            kind, count = tag & 3, tag >> 2
            at += 1
            if kind == 0:
                if count >= 60:
                    width = count - 59
                    count = int.from_bytes(data[at : at + width], "little")
                    at += width
                count += 1
                out += _literal(data, at, count)
                at += count
            elif kind == 1:
                _copy(out, (tag >> 5) << 8 | data[at], (count & 7) + 4)
                at += 1
            else:
                width = 2 if kind == 2 else 4
                _copy(out, int.from_bytes(_literal(data, at, width), "little"), count + 1)
                at += width
            if len(out) > size:
                raise InvalidImage("a chunk holds more than it states")
    except IndexError:
        raise InvalidImage("a chunk is cut short") from None
    if len(out) != size:
        raise InvalidImage(f"a chunk holds {len(out)} bytes where it states {size}")
    return bytes(out)


def _slow_lz4(data: bytes, size: int) -> bytes:
    out = bytearray()
    at = 0
    try:
        while True:
            token = data[at]
            count, at = _length(data, at + 1, token >> 4)
            out += _literal(data, at, count)
            at += count
            if len(out) > size:
                raise InvalidImage("a chunk holds more than it may")
            if at == len(data):
                return bytes(out)
            back = int.from_bytes(_literal(data, at, 2), "little")
            count, at = _length(data, at + 2, token & 15)
            if len(out) + count + 4 > size:
                raise InvalidImage("a chunk holds more than it may")
            _copy(out, back, count + 4)
    except IndexError:
        raise InvalidImage("a chunk is cut short") from None


def _length(data: bytes, at: int, count: int) -> tuple[int, int]:
    if count == 15:
        while True:
            octet = data[at]
            count, at = count + octet, at + 1
            if octet != 255:
                break
    return count, at


def _literal(data: bytes, at: int, count: int) -> bytes:
    piece = data[at : at + count]
    if len(piece) != count:
        raise IndexError
    return piece


def _copy(out: bytearray, back: int, count: int) -> None:
    start = len(out) - back
    if start < 0 or not back:
        raise InvalidImage("a chunk refers to what lies before it")
    match = out[start : start + count]
    out += match if back >= count else (match * (count // back + 1))[:count]
