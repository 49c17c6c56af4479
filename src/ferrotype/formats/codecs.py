"""The compressions that containers use, each with its output bounded.

Deflate runs in ISA-L, which compresses five times as fast as zlib at its level 1 and releases the interpreter lock;
levels that ISA-L does not have run in zlib.
"""

from __future__ import annotations

import bz2
import lzma
import sys
import threading
import zlib
from typing import Final

from isal import isal_zlib

from ferrotype.errors import InvalidImage

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["bunzip2", "deflate", "inflate", "inflate_sealed", "unxz", "unzstd", "zstd_frame"]

_IsalError: type[Exception] = getattr(isal_zlib, "error")  # noqa: B009  its stub takes it for an instance
_local = threading.local()  # compressors of each thread: making one takes a tenth of what 64 KiB do
FASTEST: Final = 1  # deflate level that ISA-L serves; 6 and above are zlib's


def deflate(data: memoryview | bytes, *, level: int = FASTEST, wbits: int = 15) -> bytes:
    """The data as a deflate stream; ``wbits`` as in zlib (15: with its header, -15: bare, -12: a window of 4 KiB)."""
    if level < 6:
        return isal_zlib.compress(data, min(level, 2), wbits)
    stream = zlib.compressobj(level, zlib.DEFLATED, wbits)
    return stream.compress(data) + stream.flush()


def inflate(data: memoryview | bytes, size: int, *, wbits: int = 15) -> bytes:
    """What a deflate stream holds: exactly ``size`` bytes, whatever follows the stream.  Raises InvalidImage."""
    try:
        plain: bytes = isal_zlib.decompressobj(wbits).decompress(data, size) if size else b""
    except _IsalError as error:
        raise InvalidImage(f"compressed data cannot be opened: {error}") from None
    return _exactly(plain, size)


def inflate_sealed(data: memoryview | bytes, most: int) -> bytes:
    """What a zlib stream holds, at most ``most`` bytes: all of it, with its Adler-32 there and right.

    What follows the stream is left alone.  Raises InvalidImage.
    """
    stream = isal_zlib.decompressobj(15)
    try:
        plain: bytes = stream.decompress(data, most + 1)
    except _IsalError as error:
        raise InvalidImage(f"compressed data cannot be opened: {error}") from None
    if len(plain) > most:
        raise InvalidImage(f"compressed data holds more than the {most} bytes of its place")
    if not stream.eof:
        raise InvalidImage("compressed data ends before its checksum")
    return plain


def bunzip2(data: memoryview | bytes, size: int) -> bytes:
    """What a bzip2 stream holds: exactly ``size`` bytes.  Raises InvalidImage."""
    try:
        plain = bz2.BZ2Decompressor().decompress(bytes(data), size)
    except (OSError, EOFError) as error:
        raise InvalidImage(f"compressed data cannot be opened: {error}") from None
    return _exactly(plain, size)


def unxz(data: memoryview | bytes, size: int) -> bytes:
    """What an xz or lzma stream holds: exactly ``size`` bytes, in at most 128 MiB of memory.  Raises InvalidImage."""
    try:
        plain = lzma.LZMADecompressor(memlimit=128 << 20).decompress(bytes(data), size)
    except (lzma.LZMAError, EOFError) as error:
        raise InvalidImage(f"compressed data cannot be opened: {error}") from None
    return _exactly(plain, size)


def zstd_frame(data: memoryview | bytes, *, level: int = 1) -> bytes:
    """A zstd frame of the data, which says its length."""
    kept: dict[int, zstd.ZstdCompressor] = _local.__dict__.setdefault("compressors", {})
    if level not in kept:
        kept[level] = zstd.ZstdCompressor(level)
    compressor = kept[level]
    compressor.set_pledged_input_size(len(data))
    return compressor.compress(data, zstd.ZstdCompressor.FLUSH_FRAME)


def unzstd(data: memoryview | bytes, size: int) -> bytes:
    """What zstd frames in a row hold: exactly ``size`` bytes, whatever follows.  Raises InvalidImage."""
    plain = b""
    try:
        while data and len(plain) < size:
            frame = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 27})
            plain += frame.decompress(data, size - len(plain))
            data = frame.unused_data
    except zstd.ZstdError as error:
        raise InvalidImage(f"compressed data cannot be opened: {error}") from None
    return _exactly(plain, size)


def _exactly(plain: bytes, size: int) -> bytes:
    if len(plain) != size:
        raise InvalidImage(f"compressed data holds {len(plain)} bytes where {size} are needed")
    return plain
