"""The file, or the split files, that a container is stored in.

    laptop.ferro  laptop.ferro.001  laptop.ferro.002 ...

Everything a container does to storage goes through ``VolumeFile``; tests put a failing one in its place.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar

from ferrotype.errors import DeviceError, Locked, WriteError
from ferrotype.fresh import Fresh, true_name
from ferrotype.linux import is_local, next_data, punch_hole, write_back
from ferrotype.objects import Bytes
from ferrotype.objects.lock import locked_by
from ferrotype.stall import Beat, Patience, Storage
from ferrotype.trouble import why, why_not_written
from ferrotype.units import KiB, MiB

_IOV_MAX: Final = 1024  # buffers the kernel takes in one call
_STEP: Final = 2 * MiB  # bytes moved by one call: a slow stick takes less than a second for them
_PUSH: Final = 256 * KiB  # bytes written at once that are worth starting to store
_UNDER_WAY: Final = 32 * MiB  # bytes

T = TypeVar("T")


class VolumeFile(Protocol):
    """One open file, by offsets."""

    def read(self, offset: int, length: int, /) -> bytes:
        """Up to ``length`` bytes; fewer only at the end of the file."""

    def write(self, offset: int, parts: Sequence[Bytes], /) -> None: ...

    def sync(self) -> None: ...

    def size(self) -> int: ...

    def data_from(self, offset: int, /) -> int:
        """Where the next byte may be that is no hole: ``offset`` if that is not known, the size if there is none."""

    def allocated(self) -> int:
        """Bytes of storage the file takes up."""

    def truncate(self, size: int, /) -> None: ...

    def punch(self, offset: int, length: int, /) -> bool:
        """Give the range's storage back; False where the file system cannot."""

    def publish(self, path: Path, /) -> None:
        """A created file takes its name, durably."""

    def check_name(self) -> None:
        """Raise WriteError where the file no longer has the name it was opened or published by."""

    def remove(self) -> None:
        """The file loses its name, durably; it stays open."""

    def distrust(self) -> None:
        """What is read next comes from the storage, not from memory that a failed ``sync`` may have left behind."""

    def fileno(self) -> int: ...

    def close(self) -> None:
        """A file that was created and not published is deleted."""


class PosixFile:
    """A plain file through positional system calls, none of which waits for ever.

    Whatever changes the file is done by way of ``Storage``; so is reading, but from this machine's own file systems.
    """

    def __init__(self, path: Path, *, writable: bool, create: bool = False, patience: Patience | None = None) -> None:
        self.path = path
        self._unpublished: Fresh | None = None  # a file that was created and has no name yet
        self._storage = Storage(path, patience or Patience())
        self._pushed: deque[tuple[int, int]] = deque()  # ranges that the kernel was told to store, perhaps under way
        self._failed = ""  # why something that was written could not be stored
        try:
            if create:
                self._unpublished = self._storage.call(lambda _: self._make(), DeviceError, late=_undo)
                self._fd, device = self._unpublished.fd, os.fstat(self._unpublished.fd).st_dev
                self._local = is_local(self._fd)
            else:
                self._fd, device, self._local = self._storage.call(
                    lambda _: _open(path, writable=writable), DeviceError, late=lambda found: os.close(found[0])
                )
            self._storage.on(device)
        except OSError as error:
            self._storage.release()
            raise DeviceError(f"{path} cannot be {'created' if create else 'opened'}: {why(error)}") from error
        except BaseException:
            self._storage.release()
            raise

    @property
    def hidden_name(self) -> str:
        """Under which a created file stands until it is published; empty for others."""
        return self._unpublished.path.name if self._unpublished is not None else ""

    def _make(self) -> Fresh:
        """A file of this process alone.  Raises Locked where another one is making the same."""

        def held(fd: int) -> None:
            raise locked_by(fd, self.path, "being created")

        return Fresh.make(self.path, mode=0o600, kind="new", held=held)

    def read(self, offset: int, length: int, /) -> bytes:
        try:
            return self._ask(lambda beat: self._read(offset, length, beat))
        except OSError as error:
            raise DeviceError(f"{self.path}: reading at {offset} failed: {why(error)}") from error

    def _read(self, offset: int, length: int, beat: Beat) -> bytes:
        step = length if self._local else _STEP
        data = os.pread(self._fd, min(length, step), offset)
        while len(data) < length and (more := os.pread(self._fd, min(length - len(data), step), offset + len(data))):
            data += more
            beat()
        return data

    def write(self, offset: int, parts: Sequence[Bytes], /) -> None:
        length = sum(map(len, parts))
        try:
            self._storage.call(lambda beat: self._write(offset, parts, beat), WriteError)
        except OSError as error:
            reason = why_not_written(error, self._fd, offset + length, length, image=True)
            raise WriteError(f"{self.path}: writing at {offset} failed: {reason}") from error
        if length >= _PUSH:
            self._push(offset, length)

    def _write(self, offset: int, parts: Sequence[Bytes], beat: Beat) -> None:
        for group in _steps(parts):
            length = sum(map(len, group))
            done = os.pwritev(self._fd, group, offset)
            if done < length:  # rare: a signal, or a file system about to be full
                rest = memoryview(b"".join(group))[done:]
                while rest:
                    rest = rest[os.pwrite(self._fd, rest, offset + length - len(rest)) :]
            offset += length
            beat()

    def _push(self, offset: int, length: int) -> None:
        """Have the range stored soon, and wait for those long before.

        So a sync never has much left to do, and what a slow stick takes minutes to store does not fill the memory.
        """

        def push(beat: Beat) -> None:
            if write_back(self._fd, offset, length, wait=False):
                self._pushed.append((offset, length))
            self._settle(beat, leave=_UNDER_WAY)

        self._stored(push)

    def _settle(self, beat: Beat, leave: int = 0) -> None:
        """Wait until no more than ``leave`` bytes are under way."""
        while sum(length for _, length in self._pushed) > leave:
            start, length = self._pushed.popleft()
            for at in range(start, start + length, _STEP):
                write_back(self._fd, at, min(_STEP, start + length - at), wait=True)
                beat()

    def sync(self) -> None:
        def sync(beat: Beat) -> None:
            self._settle(beat)
            os.fdatasync(self._fd)

        self._stored(sync)

    def _stored(self, work: Callable[[Beat], None]) -> None:
        """Do what tells whether earlier writes reached the storage.

        The kernel says only once that they did not, and a later sync would succeed: so the first failure is final.
        """
        if self._failed:
            raise WriteError(f"{self.path}: earlier writes could not be stored: {self._failed}")
        try:
            self._storage.call(work, WriteError)
        except OSError as error:
            self._failed = why(error)
            raise WriteError(f"{self.path}: what was written could not be stored: {self._failed}") from error

    def size(self) -> int:
        return self._ask(lambda _: os.fstat(self._fd)).st_size

    def data_from(self, offset: int, /) -> int:
        return self._ask(lambda _: next_data(self._fd, offset))

    def allocated(self) -> int:
        return self._ask(lambda _: os.fstat(self._fd)).st_blocks * 512

    def truncate(self, size: int, /) -> None:
        try:
            self._storage.call(lambda _: os.ftruncate(self._fd, size), WriteError)
        except OSError as error:
            raise WriteError(f"{self.path}: cutting to {size} bytes failed: {why(error)}") from error

    def punch(self, offset: int, length: int, /) -> bool:
        try:
            return self._storage.call(lambda _: punch_hole(self._fd, offset, length), WriteError)
        except OSError as error:
            raise WriteError(f"{self.path}: punching a hole at {offset} failed: {why(error)}") from error

    def publish(self, path: Path, /) -> None:
        unpublished = self._unpublished
        if unpublished is None:
            return

        def publish(_: Beat) -> None:
            unpublished.publish()
            self._unpublished = None
            _sync_folder(unpublished.final.parent)

        try:
            self._storage.call(publish, WriteError)
        except FileExistsError:
            raise Locked(f"{path} was made by another process meanwhile and is not touched; start again") from None
        except OSError as error:
            raise WriteError(f"{path} cannot be created: {why(error)}") from error

    def check_name(self) -> None:
        if self._unpublished is not None:
            return

        def named(_: Beat) -> bool:
            with contextlib.suppress(FileNotFoundError):
                return os.path.samestat(os.stat(self.path), os.fstat(self._fd))
            return False

        try:
            still = self._storage.call(named)
        except OSError as error:
            raise WriteError(f"{self.path}: whether it is still there cannot be seen: {why(error)}") from error
        if not still:
            raise WriteError(
                f"{self.path} was deleted, moved or replaced while it was written: what was stored is not in it; "
                "start again"
            )

    def remove(self) -> None:
        def remove(_: Beat) -> None:
            if self._unpublished is not None:
                self._unpublished.remove()
            else:
                self.path.unlink()
            _sync_folder(self.path.parent)

        try:
            self._storage.call(remove, WriteError)
        except OSError as error:
            raise WriteError(f"{self.path} cannot be deleted: {why(error)}") from error
        self._unpublished = None

    def distrust(self) -> None:
        with contextlib.suppress(OSError):  # a wish: where it cannot be granted, reading is all that can be done
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        unpublished, self._unpublished = self._unpublished, None
        if fd < 0:
            return

        def end() -> None:
            try:
                if unpublished is not None:  # while it is locked: afterwards it may be another's
                    unpublished.remove()
            finally:
                os.close(fd)

        if self._storage.lost:
            self._storage.afterwards(end)  # a call may still use the descriptor
        else:
            with contextlib.suppress(OSError, DeviceError):  # nothing that counts depends on it any more
                self._storage.call(lambda _: end())
        self._storage.release()

    def _ask(self, work: Callable[[Beat], T]) -> T:
        """An answer that a local file system gives from memory, or soon."""
        if self._local and not self._storage.lost:
            return work(_no_beat)
        return self._storage.call(work)


def _no_beat() -> None:
    pass


def _undo(fresh: Fresh) -> None:
    """Nobody waits for it any more."""
    with contextlib.suppress(OSError):
        fresh.remove()
    os.close(fresh.fd)


def _open(path: Path, *, writable: bool) -> tuple[int, int, bool]:
    """Descriptor, device, and whether the file system is this machine's own."""
    if writable:
        fd = os.open(true_name(path), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    else:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return fd, os.fstat(fd).st_dev, is_local(fd)
    except BaseException:
        os.close(fd)
        raise


def _steps(parts: Sequence[Bytes]) -> Iterator[list[memoryview]]:
    """The parts, cut and put together for calls of at most ``_STEP`` bytes."""
    group: list[memoryview] = []
    room = _STEP
    for part in parts:
        rest = memoryview(part)
        while rest:
            group.append(rest[:room])
            rest, room = rest[room:], room - len(group[-1])
            if not room or len(group) == _IOV_MAX:
                yield group
                group, room = [], _STEP
    if group:
        yield group


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def volume_path(image: Path, volume: int) -> Path:
    """``laptop.ferro`` for volume 0, ``laptop.ferro.001`` for volume 1 ..."""
    return image if volume == 0 else image.with_name(f"{image.name}.{volume:03d}")


class Opener(Protocol):
    """How a container opens its volumes."""

    def __call__(self, path: Path, /, *, writable: bool, create: bool = False) -> VolumeFile: ...


@dataclass(frozen=True, slots=True)
class PatientOpener:
    """Opens plain files that all have the same patience with their storage."""

    patience: Patience

    def __call__(self, path: Path, /, *, writable: bool, create: bool = False) -> PosixFile:
        return PosixFile(path, writable=writable, create=create, patience=self.patience)


def patience_of(opener: Opener) -> Patience:
    """The patience with what stands beside the volumes."""
    return opener.patience if isinstance(opener, PatientOpener) else Patience()
