"""Room on the target: asked for before anything is written, where what is needed can be known.

restore    the bytes of all chunks, exactly; zeros and free space become holes
backup     what the plan reads is the most it can store; where that does not fit, a sample says what is likely
prune      live frames of the packs that are rewritten, and their index
compact    what one batch moves into holes

Disk images of other kinds are judged in ``room``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from ferrotype.engine.estimate import estimate
from ferrotype.engine.prepare import PreparedDisk
from ferrotype.engine.restore import Part
from ferrotype.engine.room import free_for, not_enough
from ferrotype.errors import WriteError
from ferrotype.job import Job
from ferrotype.objects.compaction import BATCH
from ferrotype.objects.container import Container
from ferrotype.repository.sealing import ZERO_ID
from ferrotype.repository.store import Repository
from ferrotype.units import MiB, format_size

_INDEX_ENTRY: Final = 48  # bytes a chunk in a segment, with its share of the directory
_LITTLE: Final = MiB  # bytes for catalogs, anchors and what a file system needs for itself


def free_for_image(repository: Repository) -> int | None:
    """Bytes that an image may still grow by."""
    return free_for(repository.store.path) if isinstance(repository.store, Container) else None


# ---------------------------------------------------------------------- restore


def stored_bytes(part: Part) -> int:
    """Bytes of the part that are not zeros: what a new, sparse file takes up."""
    total = 0
    end = part.start + part.length
    size = part.disk.chunk_size
    for region in part.disk.regions:
        low, high = max(region.start, part.start), min(region.start + region.length, end)
        if low >= high:
            continue
        first, last = (low - region.start) // size, -(-(high - region.start) // size)
        for cell, ids in part.repository.map(part.disk, region).pages(first, last - first):
            starts = region.start + (np.flatnonzero(ids != np.void(ZERO_ID)) + cell) * size
            total += int((np.minimum(starts + size, high) - np.maximum(starts, low)).sum())
    return total


def check_restore(part: Part, target: Path) -> None:
    """Raise WriteError where a new file for the part finds no room at ``target``; nothing is made yet."""
    free = free_for(target)
    if free is None or part.length <= free:
        return
    needed = stored_bytes(part)
    if needed > free:
        raise not_enough(target, needed, free)


# ---------------------------------------------------------------------- backup


def warn_of_backup(
    repository: Repository, prepared: Sequence[PreparedDisk], job: Job, becomes: Path | None = None
) -> None:
    """Warn where what will be stored is judged to find no room; the judgement may be wrong, so nothing is refused.

    ``becomes`` is the name a new image has only when it is complete.
    """
    free = free_for_image(repository)
    if free is None or sum(disk.plan.data_bytes for disk in prepared) + _LITTLE <= free:
        return
    if not isinstance(repository.store, Container):
        return
    stored = estimate(repository, prepared, job).stored_bytes
    if becomes is None:
        warn_of_estimate(repository.store.path, stored, job, dry_run=False)
    elif stored > free:
        job.warn(
            f"{becomes} may not fit: it takes about {format_size(stored)}, and {format_size(free)} are free there"
        )


def warn_of_estimate(image: Path, stored: int, job: Job, *, dry_run: bool) -> None:
    """The same, where the judgement is known."""
    free = free_for(image)
    if free is not None and stored > free:
        will = "would" if dry_run else "will"
        job.warn(
            f"{image} {will} grow by about {format_size(stored)} and {format_size(free)} are free there; "
            "make room, also with `ferrotype prune`, or what does not fit is left for the next backup"
        )


# ---------------------------------------------------------------------- prune, compact


def needed_to_rewrite(frame_bytes: int, chunks: int) -> int:
    """Bytes an image grows by when packs with so many live bytes and an index of so many chunks are written."""
    return frame_bytes + chunks * _INDEX_ENTRY + _LITTLE


def check_compact(container: Container) -> None:
    """Raise WriteError where there is no room for the first batch; nothing is moved yet."""
    free = free_for(container.path)
    dead = container.file_size - container.live_size
    needed = min(BATCH, dead, container.hole_size) + _LITTLE
    if free is not None and dead > 0 and free < needed:
        raise WriteError(
            f"compacting {container.path} needs {format_size(needed)} for a while and {format_size(free)} are free "
            "there; make room first; nothing was changed"
        )
