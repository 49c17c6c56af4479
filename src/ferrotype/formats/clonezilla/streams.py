"""The compressed streams of Clonezilla images, made readable at any place.

    sda1.ext4-ptcl-img.gz.aa .ab ...  --one pass, as far as is asked for-->  an unnamed temporary file, sparse

A stream of gzip, zstd or xz is one piece: to read its middle, all before must be unpacked.  Points to restart from
would have to be kept for every few MiB (32 KiB of window each with gzip, up to 128 MiB with zstd) and could be made
only by a first pass over everything, as slow as this one.  So what was unpacked once is kept on disk: memory stays
small, every read is at full speed, and a copy from front to back still takes one pass.  The price is space in the
folder for temporary files, of which there must be enough before it begins.
"""

from __future__ import annotations

import bz2
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from threading import Lock, Thread
from typing import Final, Protocol

from ferrotype.block import Source, Traits, read
from ferrotype.block.file import check_read, read_fully, write_fully
from ferrotype.block.zeros import zero_cells
from ferrotype.errors import DeviceError, InvalidImage, UnsupportedError
from ferrotype.extents import ExtentMap
from ferrotype.units import KiB, MiB, format_size

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["COMPRESSIONS", "Spool", "unpacked"]

_PIECE: Final = MiB  # bytes of output at a time, and of input
_CELL: Final = 64 * KiB  # zeros of this size become holes
PROGRAMS: Final = {"lz4": "lz4", "lzo": "lzop", "lz": "lzip"}  # what has no library here is opened by its program
COMPRESSIONS: Final = ("gz", "bz2", "xz", "lzma", "zst", *PROGRAMS)


class _Stream(Protocol):
    """What the decompressors of the libraries have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = ..., /) -> bytes: ...


class _Gzip:
    """zlib's decompressor in the form of the others."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(31)

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def needs_input(self) -> bool:
        return not self._stream.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: bytes, max_length: int = 0, /) -> bytes:
        return self._stream.decompress(data or self._stream.unconsumed_tail, max_length)


def _stream(compression: str) -> _Stream:
    if compression == "gz":
        return _Gzip()
    if compression == "bz2":
        return bz2.BZ2Decompressor()
    if compression in ("xz", "lzma"):
        return lzma.LZMADecompressor(memlimit=256 << 20)
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 27})


def _input(file: Source) -> Iterator[bytes]:
    for at in range(0, file.size, _PIECE):
        yield read(file, at, min(_PIECE, file.size - at))


def unpacked(file: Source, compression: str) -> Iterator[bytes]:
    """What a stream holds, in pieces of at most 1 MiB.  Raises InvalidImage where it is damaged or cut short."""
    if compression in PROGRAMS:
        yield from _by_program(file, PROGRAMS[compression])
        return
    stream, begun = _stream(compression), False
    try:
        for data in _input(file):
            while data or (begun and not stream.needs_input):
                if stream.eof:  # streams may follow each other: pigz, pzstd and split ones do
                    stream, begun = _stream(compression), False
                piece = stream.decompress(data, _PIECE)
                begun = True
                if piece:
                    yield piece
                data = stream.unused_data if stream.eof else b""
                if stream.eof and not data.strip(b"\0"):  # padding
                    data, begun = b"", False
                    break
    except (zlib.error, OSError, EOFError, lzma.LZMAError, zstd.ZstdError) as error:
        if isinstance(error, DeviceError):
            raise
        raise InvalidImage(f"the {compression} stream is damaged: {error}") from None
    if not stream.eof:
        raise InvalidImage(f"the {compression} stream is cut short")


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

        thread = Thread(target=feed, daemon=True)
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


class Spool:
    """What a stream holds, as a Source of ``size`` bytes; what it has behind them is left alone."""

    def __init__(self, file: Source, compression: str, size: int | None, *, limit: int) -> None:
        """Without a ``size`` the stream is unpacked at once to learn it, up to ``limit`` bytes."""
        self._pieces = unpacked(file, compression)
        self._done, self._ended = 0, False
        self._lock = Lock()
        self._file = tempfile.TemporaryFile(prefix="ferrotype-")  # noqa: SIM115  closed by ``close``
        self.traits = Traits()
        self._size = limit if size is None else size
        try:
            if size is None:
                self._need(limit, whole=False)
                if self._done > limit or not self._ended:
                    raise InvalidImage(f"a stream holds more than the {limit} bytes that its header allows")
                self._size = self._done
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        return self._size

    def _need(self, end: int, *, whole: bool = True) -> None:
        """Have the first ``end`` bytes in the file.  With ``whole`` raises InvalidImage where there are fewer."""
        while self._done < end:
            piece = next(self._pieces, None)
            if piece is None:
                if whole:
                    raise InvalidImage(f"a stream ends after {self._done} bytes, and {self._size} are needed")
                self._ended = True
                return
            if not self._done:
                check_room(self._size)
            self._store(memoryview(piece))
        if end >= self._size and not self._ended:
            self._ended = next(self._pieces, None) is None  # the checksum of a stream is behind its last byte

    def _store(self, piece: memoryview) -> None:
        """Add a piece; cells of zeros stay holes."""
        fd, start = self._file.fileno(), self._done
        try:
            if start + len(piece) > 0:
                os.ftruncate(fd, start + len(piece))
            for number, zero in enumerate(zero_cells(piece, _CELL)):
                if not zero:
                    cell = piece[number * _CELL : (number + 1) * _CELL]
                    write_fully(fd, start + number * _CELL, [cell])
        except OSError as error:
            raise DeviceError(f"a temporary file in {tempfile.gettempdir()} cannot be written: {error}") from error
        self._done += len(piece)

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        check_read("stream", self._size, offset, len(buf))
        with self._lock:
            self._need(offset + len(buf))
        read_fully(self._file.fileno(), offset, buf)

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return ExtentMap.uniform(offset, length)

    def close(self) -> None:
        self._file.close()


def check_room(size: int) -> None:
    """Raises DeviceError where the folder for temporary files has no room for ``size`` bytes."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DeviceError(
            f"unpacking a partition takes up to {format_size(size)} in {folder}, which has {format_size(free)}: "
            f"set TMPDIR to a folder with more space"
        )
