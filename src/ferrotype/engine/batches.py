"""The workers of a backup: a batch of cells in, their ids and the frames of those that are new out.

    read -> blank what is free -> zero cells -> ids -> the same as in the parent, stored already, or sealed

Workers share nothing but the source and the index, which they only ask.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ferrotype.block.device import aligned_buffer
from ferrotype.block.lenient import Lenient
from ferrotype.block.zeros import zero_cells
from ferrotype.engine.plan import Batch, CellRun, blank_gaps
from ferrotype.engine.prepare import PreparedDisk
from ferrotype.errors import IntegrityError
from ferrotype.job import Job
from ferrotype.repository.chunkmap import ChunkMap
from ferrotype.repository.sealing import ID_SIZE, ZERO_ID, ChunkId
from ferrotype.repository.store import Repository
from ferrotype.repository.writer import Writer


@dataclass(slots=True)
class Tally:
    """Counts that become the snapshot's statistics."""

    read: int = 0
    zero: int = 0
    deduplicated: int = 0
    new: int = 0
    chunks: int = 0
    new_chunks: int = 0

    def add(self, other: Tally) -> None:
        self.read += other.read
        self.zero += other.zero
        self.deduplicated += other.deduplicated
        self.new += other.new
        self.chunks += other.chunks
        self.new_chunks += other.new_chunks


@dataclass(slots=True)
class SealedBatch:
    """What a worker made of a batch."""

    region: int
    ids: list[tuple[int, bytes]]  # first cell, ids
    new: list[tuple[ChunkId, bytes, int]]  # id, frame, plaintext bytes
    tally: Tally


class BatchSealer:
    """Reads batches and turns them into ids and frames; called from many threads."""

    def __init__(self, repository: Repository, writer: Writer, disk: PreparedDisk, job: Job) -> None:
        self._sealer = repository.sealer
        self._writer = writer
        self.source = Lenient(disk.named.source, job)
        self._plan = disk.plan
        self._local = threading.local()
        self._job = job
        self._parents = _parent_maps(repository, disk)

    def jobs(self) -> Iterator[tuple[Batch, list[NDArray[np.void] | None]]]:
        """Batches, each with the ids its cells had in the parent."""
        for batch in self._plan.batches():
            yield batch, [self._parent_ids(batch.region, run) for run in batch.runs]

    def __call__(self, job: tuple[Batch, list[NDArray[np.void] | None]]) -> SealedBatch:
        batch, parent_ids = job
        out = SealedBatch(batch.region, [], [], Tally())
        for run, known in zip(batch.runs, parent_ids, strict=True):
            view = self._buffer(run.length)
            self.source.read_into(run.start, view)
            out.tally.read += run.length
            blank_gaps(view, run.start, self._plan.data)
            out.ids.append((run.first, self._seal_cells(view, known, out)))
        return out

    def _parent_ids(self, region: int, run: CellRun) -> NDArray[np.void] | None:
        parent = self._parents[region]
        if parent is None:
            return None
        count = -(-run.length // self._plan.chunk_size)
        try:
            return parent.ids(run.first, max(0, min(count, parent.cells - run.first)))
        except IntegrityError:  # damage to an old snapshot must not keep a new one from being made
            self._parents[region] = None
            return None

    def _buffer(self, length: int) -> memoryview:
        buffer: memoryview | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < length:
            buffer = self._local.buffer = aligned_buffer(max(length, self._plan.chunk_size))
        return buffer[:length]

    def _seal_cells(self, view: memoryview, before: NDArray[np.void] | None, out: SealedBatch) -> bytes:
        size, sealer, writer, tally = self._plan.chunk_size, self._sealer, self._writer, out.tally
        ids: list[bytes] = []
        zero = zero_cells(view, size)
        parent = before.tobytes() if before is not None else b""
        for number, at in enumerate(range(0, len(view), size)):
            cell = view[at : at + size]
            if zero[number]:
                ids.append(ZERO_ID)
                tally.zero += len(cell)
                continue
            chunk_id = sealer.id_of(cell)
            ids.append(chunk_id)
            tally.chunks += 1
            known = chunk_id == parent[number * ID_SIZE : (number + 1) * ID_SIZE]
            if not known and writer.claim(chunk_id):
                # where the user asked to stop it ends here: at a high level a batch takes seconds
                self._job.advance(0)
                out.new.append((chunk_id, sealer.seal(chunk_id, cell), len(cell)))
            else:
                tally.deduplicated += len(cell)
        return b"".join(ids)


def _parent_maps(repository: Repository, disk: PreparedDisk) -> list[ChunkMap | None]:
    """For each region of the plan, the parent's map of the region that starts at the same place."""
    if disk.parent is None or disk.parent[1].chunk_size != disk.plan.chunk_size:
        return [None] * len(disk.plan.regions)
    record = disk.parent[1]
    by_start = {region.start: repository.map(record, region) for region in record.regions}
    return [by_start.get(start) for start, _ in disk.plan.regions]
