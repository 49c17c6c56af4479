"""Frames of chunks, read from packs in runs, for who wants them as they are stored.

    wanted ids    -> located -> in the order of packs -> runs of neighbours, each read in one call

Where a writer has moved or pruned what was located, the frame is read from where it stands by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from ferrotype.errors import DeviceError, IntegrityError, MissingChunk, ObjectMissing, StoreError
from ferrotype.repository.sealing import ID_SIZE, ChunkId
from ferrotype.repository.store import Repository
from ferrotype.units import KiB, MiB

BATCH: Final = MiB  # bytes of frames a worker reads and proves at a time
_GAP: Final = 64 * KiB  # bytes read for nothing rather than reading twice
LOST: Final = (IntegrityError, StoreError, DeviceError)  # what says that something of an image cannot be read

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Run:
    """Frames of one pack that are read together, ascending."""

    pack: str
    frames: tuple[tuple[ChunkId, int, int], ...]  # id, offset, length


def runs_of(source: Repository, wanted: Sequence[bytes], *, lenient: bool = False) -> Iterator[Run]:
    """Where the chunks stand, in the order of packs.  Raises MissingChunk, unless ``lenient``."""
    if not wanted:
        return
    ids = np.frombuffer(b"".join(dict.fromkeys(wanted)), f"V{ID_SIZE}")
    number, offset, length, packs = source.locate_many(ids)
    if not lenient and (number < 0).any():
        raise MissingChunk(ids[int(np.argmin(number))].tobytes())
    order = np.lexsort((offset, number))
    frames: list[tuple[ChunkId, int, int]] = []
    current, begin, end = -1, 0, 0
    for at in order[number[order] >= 0].tolist():
        pack, start, size = int(number[at]), int(offset[at]), int(length[at])
        if frames and (pack != current or start - end > _GAP or start + size - begin > BATCH):
            yield Run(packs[current], tuple(frames))
            frames = []
        if not frames:
            current, begin = pack, start
        frames.append((ChunkId(ids[at].tobytes()), start, size))
        end = start + size
    if frames:
        yield Run(packs[current], tuple(frames))


def frames_of(source: Repository, run: Run) -> Iterator[tuple[ChunkId, memoryview]]:
    """The frames of a run, read in one call."""
    base = run.frames[0][1]
    end = max(offset + length for _, offset, length in run.frames)
    try:
        data = memoryview(source.store.get(run.pack, base, end - base))
    except ObjectMissing:  # a writer has pruned it meanwhile: what is needed stands elsewhere
        source.refresh()
        for chunk_id, _, _ in run.frames:
            at = source.locate(chunk_id)
            yield chunk_id, memoryview(source.store.get(at.pack, at.offset, at.length))
        return
    for chunk_id, offset, length in run.frames:
        yield chunk_id, data[offset - base : offset - base + length]


def tried_twice(
    source: Repository, chunk_id: ChunkId, frame: memoryview, work: Callable[[ChunkId, memoryview], T]
) -> T:
    """What ``work`` makes of a frame; of one that a writer has moved meanwhile, from where it stands now."""
    try:
        return work(chunk_id, frame)
    except IntegrityError:
        source.refresh()
        at = source.locate(chunk_id)
        return work(chunk_id, memoryview(source.store.get(at.pack, at.offset, at.length)))


def readable(source: Repository, run: Run) -> Iterator[tuple[ChunkId, memoryview]]:
    """The frames of a run that can be read, each on its own where they cannot together."""
    try:
        yield from list(frames_of(source, run))
    except LOST:
        for chunk_id, offset, length in run.frames:
            try:
                yield chunk_id, memoryview(source.store.get(run.pack, offset, length))
            except LOST:
                continue
