"""Block devices as a Source and a Sink.

Bulk bytes go around the page cache (O_DIRECT), so that imaging a disk does not push everything else out of memory:

    request           |    offset ....... end |         any byte, any buffer
    asked for      [sector][sector][sector][sector]     whole sectors
                      through an aligned buffer of the thread, where the caller's does not fit

Small reads are metadata that is soon read again, so they go through the cache.  Writes never mix the two ways: a
cached page written back late would undo a direct write to the sector beside it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NoReturn, Self

import numpy as np

from ferrotype import linux
from ferrotype.block import Source, Traits, inventory
from ferrotype.block.file import PROMISE, FileSource, check_read, check_write, read_fully, write_fully
from ferrotype.errors import DeviceError, ReadError, Refused, UsageError, WriteError
from ferrotype.extents import ExtentMap
from ferrotype.linux import aligned_buffer
from ferrotype.stall import Patience, Storage
from ferrotype.trouble import is_gone, why
from ferrotype.units import GiB, KiB, MiB

__all__ = ["DeviceSink", "DeviceSource", "aligned_buffer", "open_source"]

_DIRECT: Final = 64 * KiB  # bytes; reads from this size on go around the page cache
_BOUNCE: Final = MiB  # bytes a thread
_ZEROING: Final = GiB  # bytes zeroed by one call, which cannot be interrupted
_DIRTY: Final = 64 * MiB  # bytes written through the page cache before they are pushed out

# How a failing sector is told from a failing device: I/O, medium, protection, target and timeout errors of
# block/blk-core.c's blk_errors.
_MEDIUM: Final = frozenset({errno.EIO, errno.ENODATA, errno.EILSEQ, errno.EREMOTEIO, errno.ETIMEDOUT})

_per_thread = threading.local()


def _bounce() -> memoryview:
    buffer: memoryview | None = getattr(_per_thread, "bounce", None)
    if buffer is None:
        buffer = _per_thread.bounce = aligned_buffer(_BOUNCE)
    return buffer


def _address(buf: memoryview) -> int:
    return int(np.frombuffer(buf, np.uint8).ctypes.data)


def open_source(
    path: str | os.PathLike[str],
    *,
    sector_size: int | None = None,
    patience: Patience | None = None,
    holes: bool = True,
) -> Source:
    """The block device or regular file at ``path``; ``sector_size`` is for files, which do not know theirs.

    Without ``holes`` those of a file are not believed.

    Raises UsageError where there is none, or where the device's sector size is another; DeviceError where it cannot
    be opened.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} does not exist") from None
    except OSError as error:
        raise DeviceError(f"{path} cannot be opened for reading: {why(error)}") from error
    if stat.S_ISREG(mode):
        return FileSource(path, sector_size or 512, patience=patience, holes=holes)
    if not stat.S_ISBLK(mode):
        raise UsageError(f"{path} is neither a block device nor a regular file")
    device = DeviceSource(path)
    own = device.traits.sector_size
    if sector_size not in (None, own):
        device.close()
        raise UsageError(f"{path} has sectors of {own} bytes, not of {sector_size}")
    return device


class _Device:
    """An open block device: its geometry, by ioctl (its inode knows no size)."""

    def __init__(self, path: str | os.PathLike[str], flags: int) -> None:
        self.path = Path(path)
        self._fd = -1
        if not stat.S_ISBLK(os.stat(path).st_mode):
            raise UsageError(f"{path} is not a block device")
        self._fd = os.open(path, flags | os.O_CLOEXEC)
        try:
            self._size = linux.device_size(self._fd)
            sector = linux.logical_sector_size(self._fd)
            self.physical_sector_size = linux.physical_sector_size(self._fd)
            self.read_only = linux.is_read_only(self._fd)
        except OSError:
            self.close()
            raise
        self.traits = Traits(sector_size=sector, preferred_size=_BOUNCE, sector_known=True)
        # A device that does not end on a sector (a loop device may) has an end that O_DIRECT never reaches.
        self._direct = self._size % sector == 0

    @property
    def size(self) -> int:
        return self._size

    def _set_direct(self, fd: int, on: bool) -> bool:
        """Turn O_DIRECT on or off; False where the device cannot."""
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
        except OSError:
            return False
        return True

    def _on_sectors(self, offset: int, buf: memoryview) -> bool:
        """Whether O_DIRECT takes the request as it is.  Memory must be aligned like the sectors."""
        return not (offset | len(buf) | _address(buf)) % self.traits.sector_size

    def _round_out(self, offset: int, end: int) -> tuple[int, int]:
        sector = self.traits.sector_size
        return offset // sector * sector, min(-(-end // sector) * sector, self._size)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DeviceSource(_Device):
    """A block device to read.  Attributes: ``path``, ``physical_sector_size`` (bytes), ``read_only``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._bulk = -1
        try:
            super().__init__(path, os.O_RDONLY)
            self._bulk = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UsageError(f"{path} does not exist") from None
        except OSError as error:
            self.close()
            raise DeviceError(f"{path} cannot be opened for reading: {why(error)}") from error
        self._direct = self._direct and self._set_direct(self._bulk, True)
        with contextlib.suppress(OSError):  # reading ahead of metadata only runs into bad sectors
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
            os.posix_fadvise(self._bulk, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        """Fill ``buf``, or raise ReadError for all of it: ``lenient`` finds out which sectors fail."""
        check_read(self.path, self._size, offset, len(buf))
        if not len(buf):
            return
        try:
            self._read(offset, buf)
        except EOFError:
            raise ReadError(str(self.path), offset, len(buf), "the device has become smaller") from None
        except OSError as error:
            raise ReadError(str(self.path), offset, len(buf), why(error), gone=is_gone(error)) from error

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        check_read(self.path, self._size, offset, length)
        return ExtentMap.uniform(offset, length)

    def close(self) -> None:
        fd, self._bulk = self._bulk, -1
        if fd >= 0:
            os.close(fd)
        super().close()

    def _read(self, offset: int, buf: memoryview) -> None:
        if len(buf) < _DIRECT and self._read_cached(offset, buf):
            return
        if not self._direct:
            read_fully(self._bulk, offset, buf)
            linux.drop_cache(self._bulk, offset, len(buf))
        elif self._on_sectors(offset, buf):
            self._read_sectors(offset, buf)
        else:
            start, end = self._round_out(offset, offset + len(buf))
            for at in range(start, end, _BOUNCE):
                self._read_bounced(at, min(at + _BOUNCE, end), offset, buf)

    def _read_cached(self, offset: int, buf: memoryview) -> bool:
        """False where a sector fails: the cache reads whole pages, and others of the page may be good."""
        try:
            read_fully(self._fd, offset, buf)
        except OSError as error:
            if error.errno not in _MEDIUM or not self._direct:
                raise
            return False
        return True

    def _read_sectors(self, start: int, buf: memoryview) -> None:
        try:
            read_fully(self._bulk, start, buf)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # It promised O_DIRECT and does not take it.
            self._direct = False
            self._set_direct(self._bulk, False)
            read_fully(self._bulk, start, buf)

    def _read_bounced(self, start: int, end: int, offset: int, buf: memoryview) -> None:
        """Read the sectors and copy what ``buf``, which stands for the bytes from ``offset`` on, wants of them."""
        bounce = _bounce()[: end - start]
        self._read_sectors(start, bounce)
        first, last = max(start, offset), min(end, offset + len(buf))
        buf[first - offset : last - offset] = bounce[first - start : last - start]


class DeviceSink(_Device):
    """A block device to overwrite, held exclusively from opening to closing.

    Raises Refused where it is in use (mounted, swap, part of something) or write-protected.
    """

    def __init__(self, path: str | os.PathLike[str], *, patience: Patience | None = None) -> None:
        self._storage = Storage(Path(path), patience or Patience(), PROMISE)
        try:
            super().__init__(path, os.O_RDWR | os.O_EXCL)
        except FileNotFoundError:
            raise UsageError(f"{path} does not exist") from None
        except OSError as error:
            self._refuse(error)
        if self.read_only:
            self.close()
            raise Refused(f"{path} is write-protected; choose another target, or lift the protection")
        self._storage.on(os.fstat(self._fd).st_rdev)
        self._direct = self._direct and self._set_direct(self._fd, True)
        self.traits = replace(self.traits, concurrent=True)
        self._edges = threading.Lock()  # over reading and writing back a sector that is written in part
        self._dirty = 0  # bytes that went through the page cache since it was last pushed out

    def _refuse(self, error: OSError) -> NoReturn:
        if error.errno == errno.EBUSY:
            reasons = "; ".join(inventory.uses(self.path)) or "another program holds it"
            raise Refused(f"{self.path} is in use: {reasons}; release it first") from error
        if error.errno == errno.EROFS:
            raise Refused(f"{self.path} is write-protected; choose another target, or lift the protection") from error
        raise WriteError(f"{self.path} cannot be opened for writing: {why(error)}") from error

    def write(self, offset: int, data: memoryview, /) -> None:
        self.write_many(offset, [data])

    def write_many(self, offset: int, parts: Sequence[memoryview | bytes], /) -> None:
        """Write parts that follow each other, the first at ``offset``."""
        views = [memoryview(part) for part in parts if len(part)]
        length = sum(map(len, views))
        check_write(self.path, self._size, offset, length)
        try:
            try:
                self._storage.call(lambda _: self._write(offset, length, views), WriteError)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # It promised O_DIRECT and does not take it.
                self._direct = False
                self._set_direct(self._fd, False)
                self._storage.call(lambda _: self._write(offset, length, views), WriteError)
        except (OSError, EOFError) as error:
            reason = why(error) if isinstance(error, OSError) else "the device has become smaller"
            raise WriteError(f"{self.path}: writing {length} bytes at {offset} failed: {reason}") from error

    def write_zeros(self, offset: int, length: int, /) -> None:
        check_write(self.path, self._size, offset, length)
        sector, end = self.traits.sector_size, offset + length
        first, last = -(-offset // sector) * sector, end // sector * sector
        if first >= last:
            self.write(offset, memoryview(bytes(length)))
            return
        self.write(offset, memoryview(bytes(first - offset)))
        for at in range(first, last, _ZEROING):
            self._zero_sectors(at, min(_ZEROING, last - at))
        self.write(last, memoryview(bytes(end - last)))

    def flush(self) -> None:
        try:
            self._storage.call(lambda _: os.fsync(self._fd), WriteError)
        except OSError as error:
            raise WriteError(f"{self.path}: what was written could not be made durable: {why(error)}") from error
        linux.drop_cache(self._fd, 0, 0)

    def reread(self) -> DeviceSource:
        """The device as its medium gives it back: what was written is durable, and the page cache forgets it."""
        self.flush()
        linux.drop_buffers(self._fd)
        return DeviceSource(self.path)

    def close(self) -> None:
        """Never waits for a stalled device."""
        if self._storage.lost:
            fd, self._fd = self._fd, -1
            self._storage.afterwards(lambda: os.close(fd))
        self._storage.release()
        super().close()

    def reread_partitions(self) -> bool:
        """Have the kernel take over a new partition table; False where it cannot, which harms nothing."""
        return linux.reread_partitions(self._fd)

    def _zero_sectors(self, start: int, length: int) -> None:
        for zero in (linux.punch_hole, linux.zero_range, linux.zero_out):
            # Bridges that fail a command they announced are common; writing is what always works or says why.
            with contextlib.suppress(OSError):
                if self._zero(zero, start, length):
                    return
        zeros = aligned_buffer(min(length, _BOUNCE))
        for at in range(start, start + length, _BOUNCE):
            self.write(at, zeros[: start + length - at])

    def _zero(self, how: Callable[[int, int, int], bool], start: int, length: int) -> bool:
        return self._storage.call(lambda _: how(self._fd, start, length), WriteError)

    def _write(self, offset: int, length: int, views: list[memoryview]) -> None:
        if not self._direct:
            self._write_cached(offset, views)
        elif all(self._on_sectors(offset, view) for view in views):
            write_fully(self._fd, offset, views)
        else:
            self._write_bounced(offset, offset + length, deque(views))

    def _write_cached(self, offset: int, views: Sequence[memoryview]) -> None:
        write_fully(self._fd, offset, views)
        self._dirty += sum(map(len, views))  # a lost update between threads only delays the push
        if self._dirty >= _DIRTY:
            self._dirty = 0
            os.fdatasync(self._fd)
            linux.drop_cache(self._fd, 0, 0)

    def _write_bounced(self, offset: int, end: int, parts: deque[memoryview]) -> None:
        """Write whole sectors through an aligned buffer; what belongs to nobody in the outer two is read first."""
        sector = self.traits.sector_size
        at = offset
        while at < end:
            start, stop = self._round_out(at, end)
            stop = min(stop, start + _BOUNCE)
            upto = min(stop, end)
            window = _bounce()[: stop - start]
            with self._edges if start < at or upto < stop else contextlib.nullcontext():
                if start < at:
                    read_fully(self._fd, start, window[:sector])
                if upto < stop:
                    read_fully(self._fd, stop - sector, window[-sector:])
                _fill(window[at - start : upto - start], parts)
                write_fully(self._fd, start, [window])
            at = upto


def _fill(buf: memoryview, parts: deque[memoryview]) -> None:
    """Fill ``buf`` from the front of the parts, which are used up by it."""
    done = 0
    while done < len(buf):
        part = parts.popleft()
        count = min(len(part), len(buf) - done)
        buf[done : done + count] = part[:count]
        done += count
        if count < len(part):
            parts.appendleft(part[count:])
