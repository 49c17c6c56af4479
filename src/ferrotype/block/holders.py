"""Which other programs have a file or device in their hands: by locks, and by descriptors that are open for writing.

    locks          any that excludes ours (fcntl(2), F_OFD_GETLK): asked for, never taken
    QEMU           bytes 100 + p and 200 + p of an image are locked where it uses, or does not share, permission p
                   (docs/devel of QEMU and its block/file-posix.c: 1 is writing, 3 resizing)
    flock          /proc/locks tells of it; what this process or its parents hold is held for its sake
    descriptors    /proc/PID/fd, as far as the user may look: root sees all

What another machine does with a file on shared storage is seen by locks alone.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

from ferrotype import linux

__all__ = ["device_number", "held", "writers", "writing_processes"]

_USED: Final = 100  # first byte of QEMU's locks
_NOT_SHARED: Final = 200
_PERMISSIONS: Final = 4  # reading, writing, writing the same again, resizing
_WRITING: Final = (_USED + 1, _USED + 3)
_PROC: Final = Path("/proc")

T = TypeVar("T")


def writers(paths: Sequence[Path]) -> dict[Path, str]:
    """Who may write to regular files while they are read: a sentence for each that somebody may write to."""
    found = {}
    for path in paths:
        with _opened(path) as fd:
            if fd < 0:
                continue
            if any(linux.is_locked(fd, at, 1, shared=False) for at in _WRITING):
                found[path] = f"{path} is in use by a running virtual machine"
            elif linux.is_locked(fd, 0, 0, shared=True):
                found[path] = f"{path} is locked for writing by another program"
    return _file_writers([path for path in paths if path not in found]) | found


def held(path: Path) -> str | None:
    """Whom writing to a regular file would harm, in a sentence."""
    with _opened(path) as fd:
        if fd >= 0:
            if any(linux.is_locked(fd, at, _PERMISSIONS, shared=False) for at in (_USED, _NOT_SHARED)):
                return f"{path} is in use by a running virtual machine"
            if linux.is_locked(fd, 0, 0, shared=False) or _is_flocked(fd):
                return f"{path} is locked by another program"
    return _file_writers([path]).get(path)


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


def _is_flocked(fd: int) -> bool:
    """Whether somebody has an flock, which says nothing of writing: scripts take turns in reading by it, too."""
    try:
        owners = linux.flock_holders(fd)
    except (OSError, ValueError):
        return False
    return bool(owners) and not _ancestors().issuperset(owners)


def _ancestors() -> set[int]:
    """This process and those above it: ``flock disk.img ferrotype ...`` holds its lock for this one."""
    found: set[int] = set()
    pid = os.getpid()
    with contextlib.suppress(OSError, ValueError, IndexError):
        while pid > 0 and pid not in found:
            found.add(pid)
            pid = int((_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return found


def _file_writers(paths: Sequence[Path]) -> dict[Path, str]:
    """The files that other processes have open for writing, all found in one pass over these."""
    known = {}  # by the name first: asking a descriptor for more may wait for a server that is gone
    for path in paths:
        with contextlib.suppress(OSError):
            status = path.stat()
            known[path.resolve().name, status.st_dev, status.st_ino] = path
    names = {name for name, _, _ in known}

    def which(link: str, descriptor: Path) -> Path | None:
        name = os.path.basename(link)
        if name not in names:
            return None
        status = os.stat(descriptor)
        return known.get((name, status.st_dev, status.st_ino))

    return {path: f"{path} is open for writing in {who}" for who, path in writing_processes(which)}


def writing_processes(which: Callable[[str, Path], T | None]) -> Iterator[tuple[str, T]]:
    """The other processes, by number and name, with a descriptor open for writing of something ``which`` knows.

    It is given what the descriptor leads to and its place in /proc; it may raise OSError.
    """
    own = os.getpid()
    for process in _numbers(_PROC):
        for number in _numbers(_PROC / f"{process}/fd") if process != own else ():
            if (found := _written(process, number, which)) is not None:
                yield f"process {process} ({linux.process_name(process) or '?'})", found


def _written(process: int, number: int, which: Callable[[str, Path], T | None]) -> T | None:
    descriptor = _PROC / f"{process}/fd/{number}"
    try:
        if (found := which(os.readlink(descriptor), descriptor)) is None:
            return None
        told = (_PROC / f"{process}/fdinfo/{number}").read_text().partition("flags:")[2].split()
        writes = bool(told) and int(told[0], 8) & os.O_ACCMODE != os.O_RDONLY
    except (OSError, ValueError):  # closed meanwhile
        return None
    return found if writes else None


def _numbers(folder: Path) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(folder) if name.isdecimal())
    except OSError:  # ended meanwhile, or another user's
        return []


def device_number(descriptor: Path) -> int | None:
    """The device number behind a descriptor that leads among the devices; None where it is no block device."""
    status = os.stat(descriptor)
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else None
