"""Plain files as a Source and a Sink: raw disk images, sparse where the file system can.

A created file stands under a hidden name beside its final one until ``commit``:

    .disk.raw.8f3a41c07be2d915.part  --fsync, rename-->  disk.raw

so an unfinished one never passes for the whole, and whatever it replaces stays until the new one is durable.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from ferrotype import linux
from ferrotype.block import Traits
from ferrotype.errors import DeviceError, ReadError, Refused, UsageError, WriteError
from ferrotype.extents import ExtentMap, State
from ferrotype.fresh import Fresh, true_name
from ferrotype.stall import Beat, Patience, Storage
from ferrotype.trouble import is_gone, why, why_not_written
from ferrotype.units import KiB, MiB

__all__ = ["FileSink", "FileSource"]

BULK: Final = 256 * KiB  # bytes; a read of this size is not metadata, and nobody will ask for it again soon
IOV_MAX: Final = 1024  # parts a single pwritev takes (limits.h)
_PIECE: Final = 4 * MiB  # bytes that even a slow stick stores within seconds
PROMISE: Final = "the restore is not complete"  # what becomes of a target whose storage does not answer


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

    def __init__(
        self,
        path: str | os.PathLike[str],
        sector_size: int = 512,
        *,
        drop_cache: bool = True,
        patience: Patience | None = None,
        holes: bool = True,
    ) -> None:
        """Open for reading.  With ``drop_cache`` what large reads leave in the page cache is given back.

        Without ``holes`` the file system is not believed that what it calls a hole is zeros: all is read.
        """
        self.path = Path(path)
        self._storage: Storage | None = None  # only where reading may wait for another machine or process
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
        self._holes = holes
        self._settled = False  # whether its holes can be asked for
        if not linux.is_local(self._fd):
            self._storage = Storage(self.path, patience or Patience(), "nothing on it was changed")
            self._storage.on(status.st_dev)
        self.traits = Traits(sector_size=sector_size)
        with contextlib.suppress(OSError):  # advice
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    @property
    def size(self) -> int:
        return self._size

    def status(self) -> os.stat_result:
        """What the file system says of the open file now.  Raises OSError once it is closed."""
        if self._storage is None or self._fd < 0:
            return os.fstat(self._fd)
        return self._storage.call(lambda _: os.fstat(self._fd))

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        check_read(self.path, self._size, offset, len(buf))
        try:
            if self._storage is None:
                read_fully(self._fd, offset, buf)
            else:
                self._storage.call(lambda _: read_fully(self._fd, offset, buf))
        except OSError as error:
            raise ReadError(str(self.path), offset, len(buf), why(error), gone=is_gone(error)) from error
        except EOFError:
            raise ReadError(str(self.path), offset, len(buf), "the file has become shorter") from None
        if self._drop_cache and len(buf) >= BULK:
            linux.drop_cache(self._fd, offset, len(buf))

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        check_read(self.path, self._size, offset, length)
        if length == 0 or not self._holes:
            return ExtentMap.uniform(offset, length)
        if not self._settled:
            linux.settle_holes(self._fd)
            self._settled = True
        starts, ends = linux.data_runs(self._fd, offset, offset + length)
        holes = ExtentMap.from_runs(offset, length, starts, ends, State.DATA, State.ZERO | State.HOLE)
        # What was cut off since the file was opened is not zero but missing: let the read say so.
        now = max(os.fstat(self._fd).st_size, offset)
        if now >= offset + length:
            return holes
        rest = offset + length - now
        return ExtentMap.concat([holes.clip(offset, now - offset), ExtentMap.uniform(now, rest)])

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if self._storage is not None:
            if fd >= 0 and self._storage.lost:
                self._storage.afterwards(lambda: os.close(fd))
                fd = -1
            self._storage.release()
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FileSink:
    """A regular file to be filled: made by ``create`` (new, blank) or ``open_existing`` (in place)."""

    def __init__(
        self,
        fd: int,
        path: Path,
        size: int,
        traits: Traits,
        fresh: Fresh | None,
        *,
        replace: bool,
        patience: Patience | None,
    ) -> None:
        self.path = path
        self.traits = traits
        self._fd = fd
        self._size = size
        self._fresh = fresh  # None once the file has its final name
        self._replace = replace
        self._flushed = False  # since anything was written last
        self.behind = False  # whether a write may return while it is under way, see ``write``
        self._storage = Storage(path, patience or Patience(), PROMISE)
        self._storage.on(os.fstat(fd).st_dev)

    @property
    def closed(self) -> bool:
        """Whether the file was let go of, by ``complete`` or ``close``."""
        return self._fd < 0

    @property
    def sign(self) -> str | None:
        """What the hidden names of the files of one output have in common; None once it has its name."""
        return self._fresh.sign if self._fresh is not None else None

    @property
    def place(self) -> Path:
        """Where the file stands now: under its hidden name until it has its own."""
        return (self._fresh or self).path

    @property
    def committed(self) -> bool:
        """Whether the file has its final name."""
        return self._fresh is None

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        size: int,
        sector_size: int = 512,
        *,
        replace: bool = False,
        mode: int = 0o666,
        sign: str | None = None,
        patience: Patience | None = None,
    ) -> FileSink:
        """A new file of ``size`` zero bytes with permissions ``mode`` (less umask), hidden until ``commit``.

        Files of one output have the same ``sign``.  Raises Refused where ``path`` exists and may not be replaced, or
        would be among devices, and WriteError where the file system takes no file of that size.
        """
        final = true_name(path)  # a symbolic link stays one: what it points to is replaced
        _may_create(final, replace=replace)
        try:
            fresh = Fresh.make(final, mode=mode, sign=sign)
        except FileNotFoundError:
            raise UsageError(f"the folder {final.parent} does not exist") from None
        except OSError as error:
            raise WriteError(f"{final} cannot be created: {why(error)}") from error
        traits = Traits(sector_size=sector_size, blank=True)
        fd = fresh.fd
        sink = cls(fd, final, size, traits, fresh, replace=replace, patience=patience)
        try:
            sink._storage.call(lambda _: os.ftruncate(fd, size), WriteError)
        except OSError as error:
            reason = why_not_written(error, fd, size, size)
            sink.close()
            raise WriteError(f"{final} cannot be created with {size} bytes: {reason}") from error
        except DeviceError:
            sink.close()
            raise
        return sink

    @classmethod
    def open_existing(
        cls, path: str | os.PathLike[str], sector_size: int = 512, *, patience: Patience | None = None
    ) -> FileSink:
        """The file as it is, to be written in place.  Its size stays; nothing about it is known to be zero."""
        try:
            fd = os.open(true_name(path), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise UsageError(f"{path} does not exist") from None
        except OSError as error:
            raise WriteError(f"{path} cannot be opened for writing: {why(error)}") from error
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise UsageError(f"{path} is not a regular file")
        traits = Traits(sector_size=sector_size)
        return cls(fd, Path(path), status.st_size, traits, None, replace=False, patience=patience)

    @property
    def size(self) -> int:
        return self._size

    def resize(self, size: int) -> None:
        """Make the file ``size`` bytes long; what is added reads as zeros.  For files that grow as they are made."""
        try:
            self._storage.call(lambda _: os.ftruncate(self._fd, size), WriteError)
        except OSError as error:
            reason = why_not_written(error, self._fd, size, size)
            raise WriteError(f"{self.path} cannot be given {size} bytes: {reason}") from error
        self._size = size
        self._flushed = False

    def stored_bytes(self) -> int:
        """Bytes that the file takes up on its medium."""
        if self.closed:
            return self._storage.call(lambda _: os.stat(self.place).st_blocks) * 512
        return self._storage.call(lambda _: os.fstat(self._fd).st_blocks) * 512

    def preallocate(self) -> None:
        """Have space for all of the file, holes included.  What was written stays."""
        try:
            if self._size:
                self._storage.call(lambda _: os.posix_fallocate(self._fd, 0, self._size), WriteError)
        except OSError as error:
            reason = why_not_written(error, self._fd, self._size, self._size)
            raise WriteError(f"{self.path} cannot be given space for {self._size} bytes: {reason}") from error
        self._flushed = False

    def write(self, offset: int, data: memoryview, /) -> None:
        """Write ``data``.

        Where ``behind`` was set, by the one thread that writes, it must not change until the next call returned, and
        that one raises what went wrong.
        """
        self.write_many(offset, [data])

    def write_many(self, offset: int, parts: Sequence[memoryview | bytes], /) -> None:
        """Write parts that follow each other, the first at ``offset``."""
        views = [memoryview(part) for part in parts if len(part)]
        length = sum(map(len, views))
        check_write(self.path, self._size, offset, length)
        self._flushed = False
        fd = self._fd

        def write(_: Beat) -> None:
            try:
                write_fully(fd, offset, views)
            except OSError as error:
                reason = why_not_written(error, fd, offset + length, length)
                raise WriteError(f"{self.path}: writing {length} bytes at {offset} failed: {reason}") from error

        if self.behind:
            self._storage.behind(write, WriteError)
        else:
            self._storage.call(write, WriteError)

    def settle(self) -> None:
        """All that was written is in the file, and no write under way.  Raises what went wrong with the last."""
        self._storage.settle()

    def write_zeros(self, offset: int, length: int, /) -> None:
        check_write(self.path, self._size, offset, length)
        self._flushed = False
        try:
            if self._storage.call(lambda _: self._zeroed(offset, length), WriteError):
                return
        except OSError as error:
            raise WriteError(f"{self.path}: zeroing {length} bytes at {offset} failed: {why(error)}") from error
        zeros = memoryview(bytes(min(length, MiB)))
        for at in range(offset, offset + length, MiB):
            self.write(at, zeros[: offset + length - at])

    def _zeroed(self, offset: int, length: int) -> bool:
        # Where one cannot, asking again the next time costs a microsecond.
        return linux.punch_hole(self._fd, offset, length) or linux.zero_range(self._fd, offset, length)

    def flush(self) -> None:
        try:
            self._storage.call(self._flush, WriteError)
            self._flushed = True
        except OSError as error:
            raise WriteError(f"{self.path}: what was written could not be made durable: {why(error)}") from error

    def reread(self) -> FileSource:
        """The file as its medium gives it back: what was written is durable, and the page cache forgets it."""
        self.flush()
        linux.drop_cache(self._fd, 0, 0)
        return FileSource(self.place, self.traits.sector_size)

    def _flush(self, beat: Beat) -> None:
        flush_range(self._fd, self._size, beat)
        os.fsync(self._fd)

    def complete(self) -> None:
        """Make the file durable and let go of its descriptor.  Nothing may be written then; ``commit`` names it."""
        if self.closed:
            return
        if not self._flushed:
            self.flush()
        if self._fresh is not None:
            self._fresh.let_go()
        fd, self._fd = self._fd, -1
        with contextlib.suppress(OSError):  # all of it is durable
            self._storage.call(lambda _: os.close(fd), WriteError)
        self._storage.release()

    def commit(self) -> None:
        """Make the file durable and give it its final name, which replaces what stood there in one step."""
        if not self._flushed:
            self.flush()
        if self._fresh is not None:
            self._storage.call(lambda _: self._commit(), WriteError)
        if self.closed:
            self._storage.release()  # of thousands of files none keeps a thread

    def _commit(self) -> None:
        if self._fresh is None:
            return
        put_in_place(self._fresh, replace=self._replace)
        self._fresh = None

    def close(self) -> None:
        """Let go of the file; one that was created and not committed is removed.  Never waits for stalled storage."""
        with contextlib.suppress(DeviceError):  # what counts was flushed, or has failed already
            self._storage.settle()
        fresh, self._fresh = self._fresh, None
        fd, self._fd = self._fd, -1

        def end() -> None:
            try:
                if fresh is not None:
                    fresh.remove()
            finally:
                if fd >= 0:
                    os.close(fd)

        if self._storage.lost:
            self._storage.afterwards(end)
        else:
            with contextlib.suppress(OSError, DeviceError):  # what counts was flushed, or has failed already
                self._storage.call(lambda _: end())
        self._storage.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def flush_range(fd: int, size: int, beat: Beat) -> None:
    """Have all of a file stored piece by piece, so that slow storage is seen to get on.  Not durable yet."""
    step = max(_PIECE, size >> 16)
    for at in range(0, size, step):
        if not linux.write_back(fd, at, min(step, size - at), wait=True):
            return
        beat()


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


def put_in_place(fresh: Fresh, *, replace: bool) -> None:
    """Give a complete and durable file its name, which is durable on return.

    Raises Refused where the name is taken, WriteError where the file itself is no longer there.
    """
    final = fresh.final
    try:
        fresh.publish(replace=replace)
    except FileExistsError:
        raise Refused(f"{final} exists by now; remove it, or allow it to be replaced") from None
    except OSError as error:
        raise WriteError(f"{final} could not be put in place: {why(error)}") from error
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
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
