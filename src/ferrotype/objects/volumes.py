"""The file, or the split files, that a container is stored in.

    laptop.ferro  laptop.ferro.001  laptop.ferro.002 ...

Everything a container does to storage goes through ``VolumeFile``; tests put a failing one in its place.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from ferrotype.errors import DeviceError, Locked, WriteError
from ferrotype.linux import punch_hole
from ferrotype.objects import Bytes
from ferrotype.objects.lock import lock_for_writing

_IOV_MAX: Final = 1024  # buffers the kernel takes in one call


class VolumeFile(Protocol):
    """One open file, by offsets."""

    def read(self, offset: int, length: int, /) -> bytes:
        """Up to ``length`` bytes; fewer only at the end of the file."""

    def write(self, offset: int, parts: Sequence[Bytes], /) -> None: ...

    def sync(self) -> None: ...

    def size(self) -> int: ...

    def allocated(self) -> int:
        """Bytes of storage the file takes up."""

    def truncate(self, size: int, /) -> None: ...

    def punch(self, offset: int, length: int, /) -> bool:
        """Give the range's storage back; False where the file system cannot."""

    def publish(self, path: Path, /) -> None:
        """A created file takes its name, durably."""

    def fileno(self) -> int: ...

    def close(self) -> None:
        """A file that was created and not published is deleted."""


class PosixFile:
    """A plain file through positional system calls."""

    def __init__(self, path: Path, *, writable: bool, create: bool = False) -> None:
        self.path = path
        self._unpublished = path.with_name(f".{path.name}.new") if create else None
        flags = os.O_CLOEXEC | (os.O_RDWR if writable else os.O_RDONLY) | (os.O_CREAT if create else 0)
        try:
            self._fd = os.open(self._unpublished or path, flags, 0o600)
        except OSError as error:
            raise DeviceError(f"{path} cannot be {'created' if create else 'opened'}: {error.strerror}") from error
        if self._unpublished is not None:
            self._claim(self._unpublished)

    def _claim(self, unpublished: Path) -> None:
        """Make the new file this process's own, be it left from one that was cut, before anything in it is lost."""
        try:
            lock_for_writing(self._fd, str(self.path))
            if os.fstat(self._fd).st_ino != unpublished.stat().st_ino:
                raise Locked(f"{self.path} is being created by another process")
            os.ftruncate(self._fd, 0)
        except (OSError, Locked) as error:
            os.close(self._fd)
            if isinstance(error, Locked):
                raise
            raise DeviceError(f"{self.path} cannot be created: {error.strerror}") from error

    def read(self, offset: int, length: int, /) -> bytes:
        try:
            data = os.pread(self._fd, length, offset)
            while len(data) < length and (more := os.pread(self._fd, length - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise DeviceError(f"{self.path}: reading at {offset} failed: {error.strerror}") from error
        return data

    def write(self, offset: int, parts: Sequence[Bytes], /) -> None:
        try:
            for first in range(0, len(parts), _IOV_MAX):
                group = parts[first : first + _IOV_MAX]
                length = sum(map(len, group))
                done = os.pwritev(self._fd, group, offset)
                if done < length:  # rare: a signal, or a file system about to be full
                    rest = memoryview(b"".join(group))[done:]
                    while rest:
                        rest = rest[os.pwrite(self._fd, rest, offset + length - len(rest)) :]
                offset += length
        except OSError as error:
            raise WriteError(f"{self.path}: writing at {offset} failed: {error.strerror}") from error

    def sync(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise WriteError(f"{self.path}: flushing failed: {error.strerror}") from error

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def allocated(self) -> int:
        return os.fstat(self._fd).st_blocks * 512

    def truncate(self, size: int, /) -> None:
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise WriteError(f"{self.path}: cutting to {size} bytes failed: {error.strerror}") from error

    def punch(self, offset: int, length: int, /) -> bool:
        try:
            return punch_hole(self._fd, offset, length)
        except OSError as error:
            raise WriteError(f"{self.path}: punching a hole at {offset} failed: {error.strerror}") from error

    def publish(self, path: Path, /) -> None:
        if self._unpublished is None:
            return
        try:
            self._unpublished.rename(path)
            _sync_folder(path.parent)
        except OSError as error:
            raise WriteError(f"{path} cannot be created: {error.strerror}") from error
        self._unpublished = None

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        if self._unpublished is not None:
            self._unpublished.unlink(missing_ok=True)


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


def remove_volume(image: Path, volume: int) -> None:
    """Delete the file of one volume and make that durable."""
    path = volume_path(image, volume)
    path.unlink()
    _sync_folder(path.parent)
