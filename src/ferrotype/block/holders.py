"""Which other programs have a file or device in their hands: by locks, and by descriptors that are open for writing.

    locks          any that excludes ours (fcntl(2), F_OFD_GETLK): asked for, never taken
    QEMU           bytes 100 + p and 200 + p of an image are locked where it uses, or does not share, permission p
                   (docs/devel of QEMU and its block/file-posix.c: 1 is writing, 3 resizing)
    descriptors    /proc/PID/fd, as far as the user may look: root sees all

What another machine does with a file on shared storage is seen by locks alone.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from ferrotype import linux

__all__ = ["device_number", "held", "writers", "writing_processes"]

_USED: Final = 100  # first byte of QEMU's locks
_NOT_SHARED: Final = 200
_PERMISSIONS: Final = 4  # reading, writing, writing the same again, resizing
_WRITING: Final = (_USED + 1, _USED + 3)
_PROC: Final = Path("/proc")


def writers(path: Path) -> list[str]:
    """Who may write to a regular file while it is read: a sentence each."""
    with _opened(path) as fd:
        found = []
        if fd >= 0:
            if any(linux.is_locked(fd, at, 1, shared=False) for at in _WRITING):
                found.append(f"{path} is in use by a running virtual machine")
            elif linux.is_locked(fd, 0, 0, shared=True):
                found.append(f"{path} is locked for writing by another program")
    return found or [f"{path} is open for writing in {who}" for who in _file_writers(path)]


def held(path: Path) -> list[str]:
    """Whom writing to a regular file would harm: a sentence each."""
    with _opened(path) as fd:
        found = []
        if fd >= 0:
            if any(linux.is_locked(fd, at, _PERMISSIONS, shared=False) for at in (_USED, _NOT_SHARED)):
                found.append(f"{path} is in use by a running virtual machine")
            elif linux.is_locked(fd, 0, 0, shared=False):
                found.append(f"{path} is locked by another program")
    return found or [f"{path} is open for writing in {who}" for who in _file_writers(path)]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor to ask with; -1 where there can be none, or the file system has no such locks."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        yield -1
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _file_writers(path: Path) -> Iterator[str]:
    try:
        status, name = path.stat(), path.resolve().name
    except OSError:
        return

    def is_it(link: str, descriptor: Path) -> bool:
        # By its name first: asking a descriptor for more may wait for a server that is gone.
        if os.path.basename(link) != name:
            return False
        found = os.stat(descriptor)
        return (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino)

    yield from writing_processes(is_it)


def writing_processes(is_it: Callable[[str, Path], bool]) -> Iterator[str]:
    """The other processes with a descriptor open for writing that ``is_it``, by number and name.

    ``is_it`` is given what the descriptor leads to and its place in /proc; it may raise OSError.
    """
    own = os.getpid()
    for process in _numbers(_PROC):
        if process != own and any(_writes(process, number, is_it) for number in _numbers(_PROC / f"{process}/fd")):
            yield f"process {process} ({_name(process)})"


def _writes(process: int, number: int, is_it: Callable[[str, Path], bool]) -> bool:
    descriptor = _PROC / f"{process}/fd/{number}"
    try:
        if not is_it(os.readlink(descriptor), descriptor):
            return False
        told = (_PROC / f"{process}/fdinfo/{number}").read_text().partition("flags:")[2].split()
        return bool(told) and int(told[0], 8) & os.O_ACCMODE != os.O_RDONLY
    except (OSError, ValueError):  # closed meanwhile
        return False


def _numbers(folder: Path) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(folder) if name.isdecimal())
    except OSError:  # ended meanwhile, or another user's
        return []


def _name(process: int) -> str:
    try:
        return (_PROC / f"{process}/comm").read_text(errors="replace").strip() or "?"
    except OSError:
        return "?"


def device_number(descriptor: Path) -> int | None:
    """The device number behind a descriptor that leads among the devices; None where it is no block device."""
    status = os.stat(descriptor)
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else None
