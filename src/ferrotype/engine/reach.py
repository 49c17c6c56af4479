"""Whether a raw disk is all there: its partition table may reach behind the end of the file.

A backup surveys the disk, and says it.  Who only carries bytes asks here, so that a disk that was cut short, or the
one part that is left of a split one, is not taken for whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ferrotype.errors import FormatError, ReadError
from ferrotype.job import Job

if TYPE_CHECKING:
    from ferrotype.engine.references import OpenDisk

__all__ = ["tell_of_reach"]

# what the tables' modules say of such a disk; a damaged table alone is for a survey to tell
_REACHING: Final = ("reach beyond the end of the disk", "lie outside the disk", "smaller than its GPT says")


def tell_of_reach(disk: OpenDisk, job: Job) -> None:
    """Warn where the table of a raw disk, opened whole, names what lies behind its end."""
    if disk.format != "raw" or disk.reference.partition is not None:
        return
    from ferrotype.volumes.scan import scan  # most conversions are of containers

    try:
        table = scan(disk.source, sector_size=disk.sector_size)
    except (FormatError, ReadError):
        return  # what cannot be believed says nothing of the end
    for warning in table.warnings if table is not None else ():
        if any(words in warning for words in _REACHING):
            job.warn(f"{disk.reference.text}: {warning}")
