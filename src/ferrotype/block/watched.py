"""Whether a file was changed by another program while it was read: what was read is then of no one point in time.

    opened        size, time of the last write (mtime), time of the last change of anything (ctime), remembered
    read ...
    at the end    the same asked again: the times go on with every write, and reading changes neither

The ctime tells of a write whose author set the mtime back.  It also goes on where the file is renamed, linked or
removed, which changes nothing of what is read.  A device's times say nothing about its content.
"""

from __future__ import annotations

import os
import time
from typing import Final

from ferrotype.block import Source
from ferrotype.block.file import FileSource

__all__ = ["Watched", "watch"]

_TICK: Final = 10_000_000  # ns; a kernel's clock for files goes on in steps of at most this


class Watched:
    """A file that is read, as it was when it was opened first, however often it is opened after that."""

    def __init__(self, file: FileSource) -> None:
        """``file`` was just opened, and nothing was read from it."""
        self.path = file.path
        self.size = file.size  # bytes
        self._file = file
        first = file.status()
        if abs(time.time_ns() - first.st_mtime_ns) < _TICK:  # one more write would not move its time on
            time.sleep(_TICK / 1e9)
            first = file.status()
        self._first = first
        self._replaced = False

    @property
    def identity(self) -> tuple[int, int]:
        """The same for two names of one file."""
        return self._first.st_dev, self._first.st_ino

    def again(self, file: FileSource) -> None:
        """The file was opened once more."""
        self._file = file
        status = file.status()
        self._replaced |= (status.st_dev, status.st_ino) != self.identity

    def change(self) -> str | None:
        """What another program did to the file since it was opened first; None: nothing."""
        now = self._now()
        if self._replaced:
            return "another file took its name, and parts of both were read"
        if now is None:
            return None
        if now.st_size < self.size:
            return f"it had {self.size} bytes and has {now.st_size} now: another program has cut it"
        if now.st_size > self.size:
            return f"it had {self.size} bytes and has {now.st_size} now: another program has added to it"
        first = self._first
        if now.st_mtime_ns != first.st_mtime_ns:
            return "another program wrote to it"
        if now.st_ctime_ns != first.st_ctime_ns and not self._renamed(now):
            return "another program changed it, or its attributes"
        return None

    def _now(self) -> os.stat_result | None:
        """By the descriptor, which a new name does not deceive; None where it is closed and the name another's."""
        try:
            return self._file.status()
        except OSError:
            return self._named()

    def _named(self) -> os.stat_result | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status if (status.st_dev, status.st_ino) == self.identity else None

    def _renamed(self, now: os.stat_result) -> bool:
        return now.st_nlink != self._first.st_nlink or self._named() is None


def watch(file: Source) -> Watched | None:
    """The watch over a source that was just opened; None where it is no regular file."""
    return Watched(file) if isinstance(file, FileSource) else None
