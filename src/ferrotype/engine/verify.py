"""Verify: prove that every stored byte is what was written, and say which part of which disk is hit where not.

    stored bytes   each object against its checksum, each frame of an encrypted image against its tag: no decoding
    deep           each frame decoded and its plaintext compared with its id
    references     each snapshot's maps: every page readable, every chunk present and not among the damaged

Damage is found once, in the packs, and then looked up in the maps; pages that snapshots share are walked once.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import CorruptChunk, CorruptObject, DeviceError, IntegrityError
from ferrotype.job import Job
from ferrotype.pipeline import map_ordered
from ferrotype.repository.chunkmap import MapPage
from ferrotype.repository.index import PREFIX as INDEXES
from ferrotype.repository.index import keys_of
from ferrotype.repository.packs import PREFIX as PACKS
from ferrotype.repository.sealing import ID_SIZE, ZERO_ID, ChunkId
from ferrotype.repository.snapshots import DiskRecord, Region, Snapshot
from ferrotype.repository.store import Repository


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How much to verify."""

    deep: bool = False
    sample: float = 1.0  # share of the packs, chosen at random
    workers: int = 0


@dataclass(frozen=True, slots=True)
class Damage:
    """A range of a disk whose bytes cannot be given back."""

    snapshot: str
    disk: str
    start: int
    length: int
    files: tuple[str, ...] = ()


@dataclass(slots=True)
class VerifyResult:
    """What was proven, and what was not."""

    checked_bytes: int = 0
    objects: int = 0
    damaged: list[Damage] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # damage that may or may not hit a snapshot

    @property
    def ok(self) -> bool:
        return not self.damaged and not self.problems


def verify(repository: Repository, options: VerifyOptions, job: Job) -> VerifyResult:
    """Check the stored objects, then what the snapshots refer to."""
    result = VerifyResult()
    packs = _sampled([info.name for info in repository.store.list(PACKS)], options.sample)
    sizes = {name: repository.store.size(name) for name in packs}
    job.begin("verifying", sum(sizes.values()))
    checker = _PackChecker(repository, options.deep)
    bad: set[bytes] = set()
    for name, found in zip(
        packs, map_ordered(checker, packs, workers=options.workers or len(os.sched_getaffinity(0))), strict=True
    ):
        if found:
            result.problems.append(f"{name}: {len(found.ids)} damaged chunks ({found.why})")
            bad.update(found.ids)
        result.checked_bytes += sizes[name]
        result.objects += 1
        job.advance(sizes[name])
    _check_objects(repository, result)
    job.begin("checking snapshots")
    known = repository.snapshots()
    result.problems += repository.warnings
    result.damaged += _References(repository, bad).damage(known, job)
    return result


def _sampled(names: list[str], share: float) -> list[str]:
    if share >= 1 or not names:
        return names
    count = max(1, round(len(names) * share))
    return sorted(random.SystemRandom().sample(names, count))


def _check_objects(repository: Repository, result: VerifyResult) -> None:
    """Everything that is not a pack: configuration, keys, indexes, snapshots."""
    for info in list(repository.store.list("")):
        if info.name.startswith(PACKS):
            continue
        try:
            repository.store.check(info.name)
        except (CorruptObject, DeviceError) as error:
            result.problems.append(str(error))
        result.objects += 1
        result.checked_bytes += info.size
    for segment in repository.index.segments:
        try:
            segment.entries()
        except (CorruptObject, DeviceError) as error:
            result.problems.append(str(error))
        segment.release()
    for name in repository.index.damaged:
        result.problems.append(f"{INDEXES}{name.removeprefix(INDEXES)} cannot be read")


# ---------------------------------------------------------------------- packs


@dataclass(frozen=True, slots=True)
class _Found:
    """Damage in one pack."""

    ids: tuple[bytes, ...]
    why: str


class _PackChecker:
    """Checks one pack; called from many threads."""

    def __init__(self, repository: Repository, deep: bool) -> None:
        self._repository = repository
        self._deep = deep

    def __call__(self, name: str) -> _Found | None:
        try:
            self._repository.store.check(name)
            why = ""
        except (CorruptObject, DeviceError) as error:
            why = str(error)
        if not why and not self._deep and not self._repository.sealer.encrypted:
            return None
        try:
            frames = self._frames(name)
        except (CorruptObject, DeviceError) as error:
            why = why or str(error)
            frames = self._indexed_frames(name)
        ids = tuple(chunk_id for chunk_id, offset, length in frames if not self._good(name, chunk_id, offset, length))
        return _Found(ids, why or "its content does not match") if ids or why else None

    def _good(self, name: str, chunk_id: ChunkId, offset: int, length: int) -> bool:
        sealer = self._repository.sealer
        try:
            frame = self._repository.store.get(name, offset, length)
            if self._deep or not sealer.encrypted:
                sealer.unseal(chunk_id, frame)
            else:
                sealer.authenticate(chunk_id, frame)
        except (CorruptChunk, CorruptObject, DeviceError):
            return False
        return True

    def _frames(self, name: str) -> list[tuple[ChunkId, int, int]]:
        table = self._repository.pack_table(name)
        columns = (range(len(table)), table.offsets.tolist(), table.lengths.tolist())
        return [(table.id(i), offset, length) for i, offset, length in zip(*columns, strict=True)]

    def _indexed_frames(self, name: str) -> list[tuple[ChunkId, int, int]]:
        """What the index says the pack holds, for when its own table is lost."""
        for segment in self._repository.index.segments:
            if name in segment.packs:
                entries = segment.entries()
                mine = entries[entries["pack"] == segment.packs.index(name)]
                columns = (mine["id"], mine["offset"].tolist(), mine["length"].tolist())
                return [(ChunkId(i.tobytes()), o, n) for i, o, n in zip(*columns, strict=True)]
        return []


# ---------------------------------------------------------------------- references


class _References:
    """Finds what of the snapshots' disks is damaged, walking shared pages once."""

    def __init__(self, repository: Repository, bad: set[bytes]) -> None:
        self._repository = repository
        self._bad = np.sort(keys_of(np.frombuffer(b"".join(bad), f"V{ID_SIZE}"))) if bad else None
        self._clean: set[bytes] = set()

    def damage(self, known: Sequence[Snapshot], job: Job) -> list[Damage]:
        out = []
        for snapshot in known:
            for disk in snapshot.disks:
                ranges = [r for region in disk.regions for r in self._region(disk, region)]
                out += [Damage(snapshot.id, disk.name, start, end - start) for start, end in _joined(ranges)]
            job.advance(0)
        return out

    def _region(self, disk: DiskRecord, region: Region) -> list[tuple[int, int]]:
        ranges: list[tuple[int, int]] = []
        visited: list[bytes] = []
        chunk_map = self._repository.map(disk, region)
        for page in chunk_map.walk(lambda page_id: page_id in self._clean):
            visited.append(page.page_id)
            ranges += [
                (region.start + first * disk.chunk_size, region.start + min(last * disk.chunk_size, region.length))
                for first, last in self._bad_cells(page)
            ]
        if not ranges:
            self._clean.update(visited)
        return ranges

    def _bad_cells(self, page: MapPage) -> list[tuple[int, int]]:
        if page.ids is None:
            return [(page.first, page.first + page.count)]
        if page.level:
            return []  # a page that is missing below shows itself when the walk comes to it
        used = np.flatnonzero(page.ids[: page.count] != np.void(ZERO_ID))
        ids = page.ids[used]
        bad = self._missing(ids)
        if self._bad is not None:
            keys = keys_of(ids)
            at = np.minimum(np.searchsorted(self._bad, keys), len(self._bad) - 1)
            bad |= self._bad[at] == keys
        return [(page.first + cell, page.first + cell + 1) for cell in used[bad].tolist()]

    def _missing(self, ids: NDArray[np.void]) -> NDArray[np.bool_]:
        try:
            return self._repository.locate_many(ids)[0] < 0
        except IntegrityError:  # a page of the index is damaged: it is said elsewhere; ask one by one
            return np.array([not self._present(ChunkId(i.tobytes())) for i in ids], bool)

    def _present(self, chunk_id: ChunkId) -> bool:
        try:
            return self._repository.index.find(chunk_id) is not None
        except IntegrityError:
            return False


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out
