"""What a backup would do, without doing it: sizes known exactly, the stored size judged from a sample."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ferrotype.block import read
from ferrotype.engine.plan import blank_gaps
from ferrotype.engine.prepare import PreparedDisk
from ferrotype.job import Job
from ferrotype.repository.sealing import ZERO_ID
from ferrotype.repository.store import Repository

_SAMPLES: Final = 256  # cells looked at on each disk


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes: of the disks, to be read, and (judged) to be stored."""

    disk_bytes: int
    read_bytes: int
    free_bytes: int
    zero_bytes: int
    stored_bytes: int


def estimate(repository: Repository, prepared: Sequence[PreparedDisk], job: Job) -> Estimate:
    """Seal a random sample of what would be read and scale up."""
    stored = 0
    for disk in prepared:
        job.begin(f"sampling {disk.named.name}")
        stored += _stored(repository, disk, job)
    plans = [disk.plan for disk in prepared]
    return Estimate(
        sum(p.size for p in plans),
        sum(p.data_bytes for p in plans),
        sum(p.free_bytes for p in plans),
        sum(p.zero_bytes for p in plans),
        stored,
    )


def _stored(repository: Repository, disk: PreparedDisk, job: Job) -> int:
    plan, sealer = disk.plan, repository.sealer
    runs = [(region, *plan.cell_runs(region)) for region in range(len(plan.regions))]
    counts = [int((last - first).sum()) for _, first, last in runs]
    total = sum(counts)
    picks = sorted(random.SystemRandom().sample(range(total), min(total, _SAMPLES)))
    taken = stored = at = 0
    for (region, first, last), count in zip(runs, counts, strict=True):
        edges = np.cumsum(last - first)
        for pick in [p - at for p in picks if at <= p < at + count]:
            run = int(np.searchsorted(edges, pick, "right"))
            cell = int(last[run] - (edges[run] - pick))
            start = plan.regions[region][0] + cell * plan.chunk_size
            length = min(plan.chunk_size, sum(plan.regions[region]) - start)
            view = memoryview(bytearray(read(disk.named.source, start, length)))
            blank_gaps(view, start, plan.data)
            chunk_id = sealer.id_of(view)
            taken += 1
            if any(view) and chunk_id != ZERO_ID and repository.find(chunk_id) is None:
                stored += len(sealer.seal(chunk_id, view))
            job.advance(0)
        at += count
    return stored * total // taken if taken else 0
