"""Disks that are in use while they are read: what is taken of one may be of no one point in time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ferrotype.block.watched import Watched
from ferrotype.job import Job

__all__ = ["tell_of_changes"]

_NAMED: Final = 5  # files; a split disk has thousands


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
