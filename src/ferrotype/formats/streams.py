"""Compressed streams, unpacked from front to back in bounded memory.

    | gzip member | gzip member | zeros |     members follow each other: pigz, pzstd, ``cat`` and split ones do so
    | xz stream   | something else      |     told, or damage

Every check that a stream has is made: CRC-32 and length of gzip, the blocks' CRC of bzip2, the check of xz, the
checksum of zstd where there is one.
"""

from __future__ import annotations

import bz2
import lzma
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from threading import Thread
from typing import Final, Protocol, cast

from isal import igzip_lib

from ferrotype.block import Source, read
from ferrotype.errors import DeviceError, InvalidImage, UnsupportedError
from ferrotype.job import leave_signals
from ferrotype.units import MiB

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["COMPRESSIONS", "unpacked"]

_PIECE: Final = MiB  # bytes of output at a time, and of input
_MAGIC: Final = 8  # bytes that say whether another member follows
_WINDOW: Final = 27  # of zstd: 128 MiB, which is also what its own program takes unless it is told to
_MOST_IDLE: Final = 1024  # pieces of input in a row that hold nothing: a sparse file may have millions
_XZ_MEMORY: Final = 256 * MiB
PROGRAMS: Final = {"lz4": "lz4", "lzo": "lzop", "lz": "lzip"}  # what has no library here is opened by its program
COMPRESSIONS: Final = ("gz", "bz2", "xz", "lzma", "zst", *PROGRAMS)

_IsalError: type[Exception] = getattr(igzip_lib, "error")  # noqa: B009  its stub takes it for an instance


class _Stream(Protocol):
    """What the decompressors of the libraries have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = ..., /) -> bytes: ...


def _stream(compression: str) -> _Stream:
    if compression in ("gz", "deflate"):
        flag = igzip_lib.DECOMP_GZIP if compression == "gz" else igzip_lib.DECOMP_DEFLATE
        return cast("_Stream", igzip_lib.IgzipDecompressor(flag=flag))
    if compression == "bz2":
        return bz2.BZ2Decompressor()
    if compression in ("xz", "lzma"):
        return lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW})


def _begins(compression: str, head: bytes) -> bool:
    """Whether another member may begin so."""
    if compression == "gz":
        return head[:3] == b"\x1f\x8b\x08"
    if compression == "bz2":
        return head[:3] == b"BZh" and head[4:8] in (b"1AY&", b"\x17rE8")
    if compression == "xz":
        return head[:6] == b"\xfd7zXZ\0"
    if compression == "zst":
        return head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"*M\x18" and head[0] >> 4 == 5)  # or skippable
    return False


def _input(file: Source, passed: Callable[[int], None] = lambda _: None) -> Iterator[bytes]:
    for at in range(0, file.size, _PIECE):
        data = read(file, at, min(_PIECE, file.size - at))
        yield data
        passed(len(data))


def unpacked(
    file: Source,
    compression: str,
    *,
    passed: Callable[[int], None] = lambda _: None,
    told: Callable[[str], None] | None = None,
) -> Iterator[bytes]:
    """What a stream holds, in pieces of at most 1 MiB.  Raises InvalidImage where it is damaged or cut short.

    ``passed`` hears how many bytes of the file were taken.  What follows the stream and is no further member is an
    error, or ``told`` and left alone; zeros are neither.
    """
    if compression in PROGRAMS:
        yield from _by_program(file, PROGRAMS[compression])
        return
    stream: _Stream | None = _stream(compression)
    held, at, idle = b"", 0, 0
    try:
        for data in _input(file, passed):
            at += len(data)
            idle += 1
            if idle > _MOST_IDLE:
                if stream is not None or told is None:
                    raise InvalidImage(f"the {compression} stream holds nothing for {idle} MiB before byte {at}")
                told(f"what follows the {compression} stream are zeros up to byte {at}, and the rest is left out")
                return
            while True:
                if stream is None:
                    data = (held + data).lstrip(b"\0")
                    held = b""
                    if len(data) < _MAGIC and at < file.size:
                        held = data
                        break
                    if not data:
                        break
                    if not _begins(compression, data[:_MAGIC]):
                        sentence = f"what follows the {compression} stream from byte {at - len(data)} on is none"
                        if told is None:
                            raise InvalidImage(f"{sentence}: it is damaged")
                        told(f"{sentence}, and is left out")
                        return
                    stream = _stream(compression)
                piece = stream.decompress(data, _PIECE)
                data = b""
                if piece:
                    idle = 0
                    yield piece
                if stream.eof:
                    data, stream = stream.unused_data, None
                elif stream.needs_input:
                    break
    except (_IsalError, OSError, EOFError, lzma.LZMAError, zstd.ZstdError) as error:
        if isinstance(error, DeviceError):
            raise
        raise _refusal(compression, error) from None
    if stream is not None:
        raise InvalidImage(f"the {compression} stream is cut short")


def _refusal(compression: str, error: Exception) -> InvalidImage | UnsupportedError:
    if "too much memory" in str(error) or "Memory usage limit" in str(error):
        advice = "zstd -d --long=31" if compression == "zst" else f"{compression} -d"
        return UnsupportedError(f"the {compression} stream takes too much memory to unpack here: use {advice}")
    return InvalidImage(f"the {compression} stream is damaged: {error}")


def _by_program(file: Source, program: str) -> Iterator[bytes]:
    if shutil.which(program) is None:
        raise UnsupportedError(f"unpacking this needs the program {program}, which is not installed")
    failed: list[BaseException] = []
    with subprocess.Popen(
        [program, "-dc"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        into, out = process.stdin, process.stdout
        assert into is not None and out is not None  # noqa: S101, PT018  both are pipes

        def feed() -> None:
            leave_signals()
            try:
                for data in _input(file):
                    into.write(data)
            except BrokenPipeError:
                pass  # the program has said why by its code
            except BaseException as error:  # noqa: BLE001  handed to the reader
                failed.append(error)
            finally:
                with suppress(OSError):
                    into.close()

        thread = Thread(target=feed, name="ferrotype-feed", daemon=True)
        thread.start()
        try:
            while piece := out.read(_PIECE):
                yield piece
        except GeneratorExit:
            process.kill()
            raise
        finally:
            thread.join()
    if failed:
        raise failed[0]
    if process.returncode:
        raise InvalidImage(f"{program} cannot unpack a stream: it is damaged or cut short")
