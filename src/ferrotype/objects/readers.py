"""Readers make themselves known: each holds a shared lock on one byte far behind the image's first volume.

What destroys dead bytes or moves live ones (``reclaim``, ``compact``) takes the exclusive lock on that byte first and
leaves them alone where it is refused.  The locks are those of open file descriptions, so a process that reads and
writes one image at a time is told apart from itself.  Where a file system has no such locks nobody is seen; a
reader then finds out by its proofs that bytes are gone, and goes on to the newest state.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from ferrotype.linux import lock_byte
from ferrotype.objects.machine import Machine

READERS_AT: Final = 1 << 62  # byte: behind anything a file system can store, and below the largest offset
READERS_TRIES: Final = 5
_PAUSE: Final = 0.05  # seconds between two of them


def join_readers(fd: int, machine: Machine, *, tries: int = READERS_TRIES) -> bool:
    """Be one of the readers until the file is closed; False where that could not be had at once."""
    if not machine.has_byte_locks(fd):
        return False
    for left in reversed(range(tries)):
        try:
            if lock_byte(fd, READERS_AT, fcntl.F_RDLCK):
                return True
        except OSError:
            return False
        if left:
            time.sleep(_PAUSE)
    return False


@contextmanager
def no_readers(fd: int, machine: Machine) -> Iterator[bool]:
    """Within the block no reader can join; False where one is there already, and may stay and others join."""
    if not machine.has_byte_locks(fd):
        yield True
        return
    try:
        alone = lock_byte(fd, READERS_AT, fcntl.F_WRLCK)
    except OSError:
        yield True
        return
    try:
        yield alone
    finally:
        with contextlib.suppress(OSError):
            if alone:
                lock_byte(fd, READERS_AT, fcntl.F_UNLCK)
