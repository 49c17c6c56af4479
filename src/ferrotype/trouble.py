"""What goes wrong with storage, in words: error numbers of the kernel -> what, and what to do next.

The one table; everything that reads or writes files and devices uses it.
"""

from __future__ import annotations

import errno
import os
import resource
from typing import Final

from ferrotype.units import MiB, format_size

_GONE: Final = "the device has failed or was pulled out; connect it again, and look at its cable"
_AWAY: Final = "the storage is not reachable any more; connect it again, then start again"

_WHY: Final = {
    errno.ENOSPC: "there is no space left; free some, or choose another place",
    errno.EDQUOT: "the disk quota is used up; free some space, or choose another place",
    errno.EFBIG: "the file system cannot hold a file that large; choose another place",
    errno.EROFS: "the file system is read-only; make it writable (it may have failed), or choose another place",
    errno.EIO: "the device reports an error: it may be failing, or was pulled out; look at it and at its cable",
    errno.EACCES: "permission denied; run as root, or ask for access",
    errno.EPERM: "operation not permitted; run as root, or clear the file's immutable flag",
    errno.ENODEV: _GONE,
    errno.ENXIO: _GONE,
    errno.ENOMEDIUM: "there is no medium in the drive; put it in again",
    errno.ESTALE: "the file server has lost this file; mount its folder again, then start again",
    errno.ENOTCONN: _AWAY,
    errno.ECONNABORTED: _AWAY,
    errno.EHOSTDOWN: _AWAY,
    errno.EHOSTUNREACH: _AWAY,
    errno.ENETDOWN: _AWAY,
    errno.ENETUNREACH: _AWAY,
    errno.ETIMEDOUT: "the storage took too long to answer; see that it is reachable, then start again",
}


_MISSING: Final = frozenset(
    {
        *(code for code, words in _WHY.items() if words in (_GONE, _AWAY)),
        errno.ENOMEDIUM,
        errno.ESTALE,
    }
)


def is_gone(error: OSError) -> bool:
    """Whether the storage is not there any more, rather than one range of it unreadable."""
    return error.errno in _MISSING


# How those say that there is no memory who do not raise MemoryError: the loader of shared objects, Python's threads,
# Zstandard.
_POOR: Final = ("failed to map segment", "cannot allocate", "can't start new thread", "not enough memory")


def lacks_memory(error: BaseException) -> bool:
    """Whether an error means that there is not enough memory, whatever its class."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return any(words in text for words in _POOR)


def why(error: OSError) -> str:
    """What went wrong, and what to do next where that is known."""
    code = error.errno or 0
    return _WHY.get(code) or os.strerror(code)


def why_not_written(error: OSError, fd: int, end: int, length: int, *, image: bool = False) -> str:
    """The same for ``length`` bytes that were to be written up to the byte ``end`` of an open file.

    With ``image`` the advice is that for an image.
    """
    if error.errno == errno.ENOSPC:
        advice = "make room, also with `ferrotype prune`," if image else "make room"
        return f"there is no space left: {_free(fd)}{format_size(length)} more are needed; {advice} or move it"
    if error.errno == errno.EDQUOT:
        advice = "delete something, also with `ferrotype prune`," if image else "delete something"
        return f"the disk quota is used up: {format_size(length)} more are needed; {advice} or have it raised"
    if error.errno == errno.EFBIG:
        return _too_large(end, length, image=image)
    return why(error)


def _free(fd: int) -> str:
    try:
        return f"{format_size(free_bytes(fd))} are free and "
    except OSError:
        return ""


def _too_large(end: int, length: int, *, image: bool) -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft != resource.RLIM_INFINITY and end > soft:
        what = f"this process may write files of {format_size(soft)} only (ulimit -f); raise that limit"
    else:
        what = f"the file system takes no file of {format_size(end)} (FAT32 takes less than 4 GiB); choose another"
    if not image:
        return what
    split = 1 << max(end - length, 1).bit_length() - 1  # a power of two that went well
    return f"{what}, or make a new image with --split {format_size(max(split, 64 * MiB)).replace(' ', '')}"


def free_bytes(place: int | str | os.PathLike[str]) -> int:
    """Bytes that may still be written to the file system of an open file or a path.  Raises OSError."""
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize
