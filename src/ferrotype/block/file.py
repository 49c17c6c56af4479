"""Plain files as a Source and a Sink: raw disk images, sparse where the file system can.

A created file stands under a hidden name beside its final one until ``commit``:

    .disk.raw.3f2a9c1e.part  --fsync, rename-->  disk.raw

so an unfinished one never passes for the whole, and whatever it replaces stays until the new one is durable.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from ferrotype import linux
from ferrotype.block import Traits
from ferrotype.errors import DeviceError, ReadError, Refused, UsageError, WriteError
from ferrotype.extents import ExtentMap, State
from ferrotype.units import KiB, MiB

__all__ = ["FileSink", "FileSource"]

BULK: Final = 256 * KiB  # bytes; a read of this size is not metadata, and nobody will ask for it again soon
IOV_MAX: Final = 1024  # parts a single pwritev takes (limits.h)

_WHY: Final = {
    errno.ENOSPC: "there is no space left; free some, or choose another place",
    errno.EDQUOT: "the disk quota is used up; free some space, or choose another place",
    errno.EFBIG: "the file system cannot hold a file that large; choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EIO: "the device reports an error; its cable, or the device itself, may be failing",
    errno.EACCES: "permission denied; run as root, or ask for access",
    errno.EPERM: "operation not permitted; run as root, or clear the file's immutable flag",
    errno.ENODEV: "the device is gone; connect it again",
    errno.ENXIO: "the device is gone; connect it again",
}


def why(error: OSError) -> str:
    """What went wrong, and what to do next where that is known."""
    code = error.errno or 0
    return _WHY.get(code) or os.strerror(code)


def read_fully(fd: int, offset: int, buf: memoryview) -> None:
    """Fill ``buf`` from ``offset``, however short the single reads come.  Raises OSError, EOFError at the end."""
    done = 0
    while done < len(buf):
        count = os.preadv(fd, [buf[done:]], offset + done)
        if count == 0:
            raise EOFError
        done += count


def write_fully(fd: int, offset: int, parts: Sequence[memoryview]) -> None:
    """Write adjacent parts from ``offset`` on, however short the single writes come.  No part is empty."""
    at = 0
    first = 0  # bytes of parts[at] that are written
    while at < len(parts):
        group = [parts[at][first:], *parts[at + 1 : at + IOV_MAX]]
        count = os.pwritev(fd, group, offset)
        if count == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        offset += count
        for part in group:
            if count < len(part):
                break
            count -= len(part)
            at, first = at + 1, 0
        first += count


def check_write(what: object, size: int, offset: int, length: int) -> None:
    """Raise WriteError where the range is not inside."""
    if offset < 0 or length < 0 or offset + length > size:
        raise WriteError(f"{what}: writing {length} bytes at {offset} is outside its {size} bytes")


def check_read(what: object, size: int, offset: int, length: int) -> None:
    """Raise ReadError where the range is not inside."""
    if offset < 0 or length < 0 or offset + length > size:
        raise ReadError(str(what), offset, length, f"it has {size} bytes")


class FileSource:
    """A regular file.  Its holes are known without reading; its size is the one it had when it was opened."""

    def __init__(self, path: str | os.PathLike[str], sector_size: int = 512, *, drop_cache: bool = True) -> None:
        """Open for reading.  With ``drop_cache`` what large reads leave in the page cache is given back."""
        self.path = Path(path)
        try:
            # Not blocking: a named pipe without a writer must be refused below, not waited for.
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise UsageError(f"{path} does not exist") from None
        except OSError as error:
            raise DeviceError(f"{path} cannot be opened for reading: {why(error)}") from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise UsageError(f"{path} is not a regular file")
        self._size = status.st_size
        self._drop_cache = drop_cache
        self.traits = Traits(sector_size=sector_size)
        with contextlib.suppress(OSError):  # advice
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        check_read(self.path, self._size, offset, len(buf))
        try:
            read_fully(self._fd, offset, buf)
        except OSError as error:
            raise ReadError(str(self.path), offset, len(buf), why(error)) from error
        except EOFError:
            raise ReadError(str(self.path), offset, len(buf), "the file has become shorter") from None
        if self._drop_cache and len(buf) >= BULK:
            linux.drop_cache(self._fd, offset, len(buf))

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        check_read(self.path, self._size, offset, length)
        if length == 0:
            return ExtentMap.uniform(offset, 0)
        starts, ends = linux.data_runs(self._fd, offset, offset + length)
        holes = ExtentMap.from_runs(offset, length, starts, ends, State.DATA, State.ZERO | State.HOLE)
        # What was cut off since the file was opened is not zero but missing: let the read say so.
        now = max(os.fstat(self._fd).st_size, offset)
        if now >= offset + length:
            return holes
        rest = offset + length - now
        return ExtentMap.concat([holes.clip(offset, now - offset), ExtentMap.uniform(now, rest)])

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FileSink:
    """A regular file to be filled: made by ``create`` (new, blank) or ``open_existing`` (in place)."""

    def __init__(
        self, fd: int, path: Path, size: int, traits: Traits, temporary: Path | None, *, replace: bool
    ) -> None:
        self.path = path
        self.traits = traits
        self._fd = fd
        self._size = size
        self._temporary = temporary  # None once the file has its final name
        self._replace = replace

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], size: int, sector_size: int = 512, *, replace: bool = False
    ) -> FileSink:
        """A new file of ``size`` zero bytes, under a temporary name until ``commit``.

        Raises Refused where ``path`` exists and ``replace`` is not set, or is not a regular file.
        """
        final = Path(os.path.realpath(path))  # a symbolic link stays one: what it points to is replaced
        _may_create(final, replace=replace)
        # The name may be as long as the file system allows already: keep the head of it (255 bytes in all).
        head = os.fsdecode(os.fsencode(final.name)[:230])
        temporary = final.with_name(f".{head}.{secrets.token_hex(4)}.part")
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            raise UsageError(f"the folder {final.parent} does not exist") from None
        except OSError as error:
            raise WriteError(f"{final} cannot be created: {why(error)}") from error
        sink = cls(fd, final, size, Traits(sector_size=sector_size, blank=True), temporary, replace=replace)
        try:
            os.ftruncate(fd, size)
        except OSError as error:
            sink.close()
            raise WriteError(f"{final} cannot be created with {size} bytes: {why(error)}") from error
        return sink

    @classmethod
    def open_existing(cls, path: str | os.PathLike[str], sector_size: int = 512) -> FileSink:
        """The file as it is, to be written in place.  Its size stays; nothing about it is known to be zero."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise UsageError(f"{path} does not exist") from None
        except OSError as error:
            raise WriteError(f"{path} cannot be opened for writing: {why(error)}") from error
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise UsageError(f"{path} is not a regular file")
        return cls(fd, Path(path), status.st_size, Traits(sector_size=sector_size), None, replace=False)

    @property
    def size(self) -> int:
        return self._size

    def write(self, offset: int, data: memoryview, /) -> None:
        self.write_many(offset, [data])

    def write_many(self, offset: int, parts: Sequence[memoryview | bytes], /) -> None:
        """Write parts that follow each other, the first at ``offset``."""
        views = [memoryview(part) for part in parts if len(part)]
        length = sum(map(len, views))
        check_write(self.path, self._size, offset, length)
        try:
            write_fully(self._fd, offset, views)
        except OSError as error:
            raise WriteError(f"{self.path}: writing {length} bytes at {offset} failed: {why(error)}") from error

    def write_zeros(self, offset: int, length: int, /) -> None:
        check_write(self.path, self._size, offset, length)
        try:
            # Where one cannot, asking again the next time costs a microsecond.
            if linux.punch_hole(self._fd, offset, length) or linux.zero_range(self._fd, offset, length):
                return
        except OSError as error:
            raise WriteError(f"{self.path}: zeroing {length} bytes at {offset} failed: {why(error)}") from error
        zeros = memoryview(bytes(min(length, MiB)))
        for at in range(offset, offset + length, MiB):
            self.write(at, zeros[: offset + length - at])

    def flush(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise WriteError(f"{self.path}: what was written could not be made durable: {why(error)}") from error

    def commit(self) -> None:
        """Make the file durable and give it its final name, which replaces what stood there in one step."""
        self.flush()
        if self._temporary is None:
            return
        try:
            (os.replace if self._replace else linux.rename_new)(self._temporary, self.path)
        except FileExistsError:
            raise Refused(f"{self.path} exists by now; remove it, or allow it to be replaced") from None
        except OSError as error:
            raise WriteError(f"{self.path} could not be put in place: {why(error)}") from error
        self._temporary = None
        _sync_folder(self.path.parent)

    def close(self) -> None:
        """Let go of the file; one that was created and not committed is removed."""
        temporary, self._temporary = self._temporary, None
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _may_create(final: Path, *, replace: bool) -> None:
    try:
        mode = os.lstat(final).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise WriteError(f"{final} cannot be created: {why(error)}") from error
    if not stat.S_ISREG(mode):
        raise Refused(f"{final} exists and is not a regular file; choose another name")
    if not replace:
        raise Refused(f"{final} exists; remove it, or allow it to be replaced")


def _sync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    fd = -1
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EROFS, errno.ENOTSUP):  # some network file systems cannot
            raise WriteError(f"{folder}: the new name could not be made durable: {why(error)}") from error
    finally:
        if fd >= 0:
            os.close(fd)
