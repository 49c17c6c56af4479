"""Disks that are in use while they are read: what is taken of one may be of no one point in time.

The work goes on, since a user may know better, and ends with code 8.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ferrotype.block.inventory import writers_of
from ferrotype.block.watched import Watched
from ferrotype.job import Job

if TYPE_CHECKING:
    from ferrotype.engine.references import OpenDisk

__all__ = ["tell_of_changes", "tell_of_use", "tell_of_writers"]

_NAMED: Final = 5  # files; a split disk has thousands


def tell_of_use(disk: OpenDisk, job: Job) -> None:
    """Warn where the disk is mounted, or a file of it is in the hands of a program that may write to it.

    A backup proves what it reads; who writes to one only adds to it.
    """
    if disk.format != "ferro":
        tell_of_writers(disk.files, job)


def tell_of_writers(files: Iterable[Path], job: Job) -> None:
    """The same of files that are named."""
    said = writers_of(*files)
    if said:
        more = [f"{len(said) - _NAMED} more"] if len(said) > _NAMED else []
        job.warn(f"{'; '.join([*said[:_NAMED], *more])}: what is written meanwhile may be caught half-way")


def tell_of_changes(files: Iterable[Watched], job: Job) -> None:
    """Warn of files that another program changed since they were opened.  To be called when all was read."""
    changed = [(file.path, change) for file in files if (change := file.change()) is not None]
    for path, change in changed[:_NAMED]:
        job.warn(
            f"{path} changed while it was read: {change}; what was read of it may be of no one point in time: see "
            "that nobody writes to it, and do this again"
        )
    if len(changed) > _NAMED:
        job.warn(f"{len(changed) - _NAMED} more files changed while they were read")
