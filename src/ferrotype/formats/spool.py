"""What is unpacked once, kept in an unnamed sparse file, and read at any place.

    a stream  --one pass-->  an unnamed temporary file, zeros are holes

A stream of gzip, zstd or xz is one piece: to read its middle, all before must be unpacked.  Points to restart from
would have to be kept for every few MiB (32 KiB of window each with gzip, up to 128 MiB with zstd) and could be made
only by a first pass over everything, as slow as this one.  So what was unpacked once is kept on disk: memory stays
small, every read is at full speed.  The price is space in the folder for temporary files.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from threading import Lock
from typing import Final

from ferrotype import linux
from ferrotype.block import Source, Traits
from ferrotype.block.file import check_read, read_fully, write_fully
from ferrotype.block.zeros import zero_cells
from ferrotype.errors import DeviceError, InvalidImage
from ferrotype.extents import ExtentMap, State
from ferrotype.formats.streams import unpacked
from ferrotype.units import KiB, MiB, format_size

__all__ = ["Scratch", "Spool"]

_CELL: Final = 64 * KiB  # zeros of this size become holes
_LOOK: Final = 64 * MiB  # bytes stored between two looks at the room that is left
_SPARED: Final = 512 * MiB  # bytes that are left to others, or a twentieth of a small file system
_TMPFS: Final = 0x01021994  # statfs(2)


class Scratch:
    """An unnamed file that grows at its end, as a Source of what it has.  Only its owner may read it."""

    def __init__(self) -> None:
        self.folder = _folder()
        self._file = tempfile.TemporaryFile(prefix="ferrotype-", dir=self.folder)  # noqa: SIM115  closed by ``close``
        self._size = 0
        self._stored = 0  # bytes since the last look at the room
        self.traits = Traits()

    @property
    def size(self) -> int:
        return self._size

    @property
    def stored(self) -> int:
        """Bytes that it takes up."""
        return os.fstat(self._file.fileno()).st_blocks * 512

    def add(self, piece: memoryview) -> None:
        """Add bytes; cells of zeros stay holes.  Raises DeviceError where there is no room for more."""
        fd, start = self._file.fileno(), self._size
        try:
            if piece:
                os.ftruncate(fd, start + len(piece))
            for number, zero in enumerate(zero_cells(piece, _CELL)):
                if not zero:
                    cell = piece[number * _CELL : (number + 1) * _CELL]
                    self._take(len(cell))
                    write_fully(fd, start + number * _CELL, [cell])
        except OSError as error:
            raise DeviceError(f"a temporary file in {self.folder} cannot be written: {error}") from error
        self._size += len(piece)

    def _take(self, count: int) -> None:
        if self._stored == 0 or self._stored >= _LOOK:
            self._stored = 0
            usage = shutil.disk_usage(self.folder)
            if usage.free < min(_SPARED, usage.total // 20) + count:
                raise DeviceError(
                    f"unpacking takes more room than there is in {self.folder}: {format_size(self.stored)} were "
                    f"taken and {format_size(usage.free)} are left: set TMPDIR to a folder with more"
                )
        self._stored += count

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        check_read("what was unpacked", self._size, offset, len(buf))
        read_fully(self._file.fileno(), offset, buf)

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        check_read("what was unpacked", self._size, offset, length)
        if length == 0:
            return ExtentMap.uniform(offset, 0)
        starts, ends = linux.data_runs(self._file.fileno(), offset, offset + length)
        return ExtentMap.from_runs(offset, length, starts, ends, State.DATA, State.ZERO | State.HOLE)

    def close(self) -> None:
        self._file.close()


class Spool:
    """What a stream holds, as a Source of ``size`` bytes, unpacked as far as it is asked for; more is left alone."""

    def __init__(self, file: Source, compression: str, size: int | None, *, limit: int) -> None:
        """Without a ``size`` the stream is unpacked at once to learn it, up to ``limit`` bytes."""
        self._pieces: Iterator[bytes] = unpacked(file, compression)
        self._ended = False
        self._lock = Lock()
        self._scratch = Scratch()
        self.traits = Traits()
        self._size = limit if size is None else size
        try:
            if size is None:
                self._need(limit, whole=False)
                if self._scratch.size > limit or not self._ended:
                    raise InvalidImage(f"a stream holds more than the {limit} bytes that its header allows")
                self._size = self._scratch.size
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        return self._size

    def _need(self, end: int, *, whole: bool = True) -> None:
        """Have the first ``end`` bytes in the file.  With ``whole`` raises InvalidImage where there are fewer."""
        while (done := self._scratch.size) < end:
            piece = next(self._pieces, None)
            if piece is None:
                if whole:
                    raise InvalidImage(f"a stream ends after {done} bytes, and {self._size} are needed")
                self._ended = True
                return
            if not done:
                check_room(self._size, self._scratch.folder)
            self._scratch.add(memoryview(piece))
        if end >= self._size and not self._ended:
            self._ended = next(self._pieces, None) is None  # the checksum of a stream is behind its last byte

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        check_read("stream", self._size, offset, len(buf))
        with self._lock:
            self._need(offset + len(buf))
        self._scratch.read_into(offset, buf)

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return ExtentMap.uniform(offset, length)

    def close(self) -> None:
        self._scratch.close()


def check_room(size: int, folder: str) -> None:
    """Raises DeviceError where a folder has no room for ``size`` bytes."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DeviceError(
            f"unpacking a partition takes up to {format_size(size)} in {folder}, which has {format_size(free)}: "
            f"set TMPDIR to a folder with more space"
        )


def _folder() -> str:
    """Where temporary files go: not into memory, unless the user chose that."""
    chosen = tempfile.gettempdir()
    with_room = "/var/tmp"  # noqa: S108  the file has no name
    if chosen != "/tmp" or linux.file_system_type(chosen) != _TMPFS or not os.access(with_room, os.W_OK):  # noqa: S108
        return chosen
    return with_room
