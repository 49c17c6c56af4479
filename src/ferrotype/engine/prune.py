"""Give back the space of chunks that no snapshot refers to.

    mark      walk the maps of all snapshots; live chunks are remembered as 8 bytes each
    weigh     of each entry of the index: is it live, as one bit; of each pack: how many of its bytes are
              (both for a part of all ids at a time, where they are many)
    rewrite   packs that are mostly dead: their live frames move, as they are, into new packs
    switch    new packs and new index segments durable, then the old ones deleted
    reclaim   holes where they stood

A cut at any point leaves every snapshot readable: until the switch is durable the old packs and segments are whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.engine.space import free_for_image, needed_to_rewrite
from ferrotype.errors import IntegrityError, WriteError
from ferrotype.job import Job
from ferrotype.repository import spare
from ferrotype.repository.merging import EntryRun, MergedSegment, Run, SegmentRun, build_segment
from ferrotype.repository.packs import MAX_FRAMES, PackBuilder
from ferrotype.repository.sealing import ZERO_ID, ChunkId
from ferrotype.repository.segments import ENTRY, Entries, Segment, keys_of
from ferrotype.repository.store import Repository
from ferrotype.units import MiB, format_size

_DEAD_SHARE: Final = 0.3  # a pack is rewritten when more than this share of its frames' bytes is dead
_FOLD: Final = 1 << 21  # live keys gathered before they are sorted into the rest
_MARKED: Final = 1 << 23  # live keys held at a time: 64 MiB, and twice that while they are sorted
_READ: Final = 4 * MiB  # bytes of a pack read at once
_MOVED: Final = 1 << 20  # frames moved for one new index segment

LiveKeys = NDArray[np.uint64]


@dataclass(slots=True)
class PruneResult:
    """What was, or would be, done; bytes of the image."""

    live_bytes: int = 0
    dead_bytes: int = 0  # that go
    deleted_packs: int = 0
    rewritten_packs: int = 0
    rewritten_bytes: int = 0
    freed_bytes: int = 0  # given back to the file system
    remaining_bytes: int = 0  # dead, but only compacting gives them back
    readers: bool = False  # nothing was given back, since the image is being read: a later prune does it


@dataclass(slots=True)
class _Weights:
    """What of a segment is live."""

    segment: Segment
    live: NDArray[np.uint8]  # a bit for each entry (numpy.packbits)
    chunks: NDArray[np.int64]  # live ones, in each of its packs
    frame_bytes: NDArray[np.int64]  # of all entries, in each of its packs
    live_bytes: NDArray[np.int64]

    @classmethod
    def of(cls, segment: Segment) -> _Weights:
        none = np.zeros(len(segment.packs), np.int64)
        return cls(segment, np.zeros(-(-segment.count // 8), np.uint8), none, none.copy(), none.copy())


@dataclass(slots=True)
class _Plan:
    """What becomes of the packs."""

    weights: list[_Weights]
    drop: set[str] = field(default_factory=set)  # nothing in them is live
    rewrite: set[str] = field(default_factory=set)

    @property
    def chunks(self) -> int:
        return sum(int(weights.chunks.sum()) for weights in self.weights)


def prune(repository: Repository, job: Job, *, dry_run: bool = False) -> PruneResult:
    """Reclaim what nothing references.  Needs an image open for writing.

    Raises IntegrityError where a map cannot be read: nothing is deleted then, since it might be needed.  Where there
    is no room to rewrite packs, those that are dead go first; WriteError where there is none of these either.
    """
    result = PruneResult()
    plan = _weigh(repository, _weights(repository, job), result)
    if dry_run:
        return result
    if plan.rewrite:
        needed = needed_to_rewrite(result.rewritten_bytes, plan.chunks)
        free = free_for_image(repository)
        if free is not None and needed > free:
            return _prune_tightly(repository, plan, needed, free, job)
    return _carry_out(repository, plan, result, job)


def _prune_tightly(repository: Repository, plan: _Plan, needed: int, free: int, job: Job) -> PruneResult:
    """Drop what is dead, which needs hardly any room, and use what that gives back for the rest."""
    if not plan.drop:
        raise WriteError(
            f"rewriting what is mostly dead needs {format_size(needed)} and {format_size(free)} are free there; "
            "make room, or forget more snapshots; nothing was changed"
        )
    fewer = _Plan(plan.weights, drop=plan.drop)
    dropped = _carry_out(repository, fewer, PruneResult(deleted_packs=len(plan.drop)), job)
    try:
        result = prune(repository, job)
    except WriteError as error:
        job.warn(f"{len(plan.drop)} packs were given back, not more: {error}")
        return dropped
    result.deleted_packs += dropped.deleted_packs
    result.freed_bytes += dropped.freed_bytes
    return result


def _carry_out(repository: Repository, plan: _Plan, result: PruneResult, job: Job) -> PruneResult:
    job.begin("rewriting packs", result.rewritten_bytes)
    try:
        _switch(repository, plan, job)
    finally:
        repository.forget_index()  # segments and packs that it knows may be gone
    job.begin("giving space back")
    report = repository.store.reclaim()
    result.freed_bytes, result.remaining_bytes, result.readers = report.freed, report.dead, report.readers
    return result


# ---------------------------------------------------------------------- what is live


def _weights(repository: Repository, job: Job) -> list[_Weights]:
    """What is live of each segment of the index."""
    index = repository.index
    found = [_Weights.of(segment) for segment in index.segments]
    turns = -(-index.count // _MARKED) or 1
    edges = [(1 << 64) * turn // turns for turn in range(turns + 1)]
    for low, high in pairwise(edges):
        live = _mark(repository, low, high, job)
        for weights in found:
            _add_live(weights, live, low, high)
    return found


def _mark(repository: Repository, low: int, high: int, job: Job) -> LiveKeys:
    """The leading eight bytes, from ``low`` to below ``high``, of every id a snapshot needs, ascending.

    Two ids that share them are both kept, which wastes a chunk and harms nothing.
    """
    job.begin("finding what is needed")
    known = repository.snapshots()
    if repository.warnings:
        raise IntegrityError(
            f"{repository.warnings[0]}; nothing is pruned while the image is damaged: run `ferrotype verify`"
        )
    seen: set[bytes] = set()
    live = np.zeros(0, np.uint64)
    fresh: list[LiveKeys] = []
    count = 0
    for snapshot in known:
        for disk in snapshot.disks:
            for region in disk.regions:
                for page in repository.map(disk, region).walk(lambda page_id: page_id in seen):
                    if page.ids is None:
                        raise page.error or IntegrityError("a map page cannot be read")
                    seen.add(page.page_id)
                    ids = page.ids[page.ids != np.void(ZERO_ID)]
                    keys = np.append(keys_of(ids), np.uint64(int.from_bytes(page.page_id[:8], "big")))
                    if low or high < 1 << 64:
                        keys = keys[(keys >= np.uint64(low)) & (keys <= np.uint64(high - 1))]
                    fresh.append(keys)
                    count += len(keys)
                    if count > _FOLD:
                        live, fresh, count = _folded(live, fresh), [], 0
        job.advance(0)
    return _folded(live, fresh)


def _folded(live: LiveKeys, fresh: list[LiveKeys]) -> LiveKeys:
    keys = np.concatenate([live, *fresh])
    keys.sort(kind="stable")
    return keys[np.append(True, keys[1:] != keys[:-1])] if len(keys) else keys


def _add_live(weights: _Weights, live: LiveKeys, low: int, high: int) -> None:
    """Note which entries with low <= key < high are live."""
    at = 0
    packs = len(weights.segment.packs)
    for entries in weights.segment.sweep():  # whole bytes of bits: a sweep reads many full pages at a time
        keys = keys_of(entries["id"])
        inside = (keys >= np.uint64(low)) & (keys <= np.uint64(high - 1))
        hit = inside & _is_in(live, keys)
        lengths = entries["length"].astype(np.int64)
        weights.live[at // 8 : -(-(at + len(entries)) // 8)] |= np.packbits(hit)
        weights.chunks += np.bincount(entries["pack"], hit, packs).astype(np.int64)
        weights.frame_bytes += np.bincount(entries["pack"], np.where(inside, lengths, 0), packs).astype(np.int64)
        weights.live_bytes += np.bincount(entries["pack"], np.where(hit, lengths, 0), packs).astype(np.int64)
        at += len(entries)


def _is_in(live: LiveKeys, keys: LiveKeys) -> NDArray[np.bool_]:
    if not len(live):
        return np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(live, keys), len(live) - 1)
    hit: NDArray[np.bool_] = live[at] == keys
    return hit


def _weigh(repository: Repository, weights: list[_Weights], result: PruneResult) -> _Plan:
    plan = _Plan(weights)
    sums: dict[str, tuple[int, int]] = {}  # bytes of frames, and of live ones
    for one in weights:
        columns = (one.segment.packs, one.frame_bytes.tolist(), one.live_bytes.tolist())
        for name, all_bytes, live_bytes in zip(*columns, strict=True):
            before = sums.get(name, (0, 0))  # more than one segment may know chunks of a pack
            sums[name] = before[0] + all_bytes, before[1] + live_bytes
    for name, (all_bytes, live_bytes) in sums.items():
        result.live_bytes += live_bytes
        if live_bytes == 0:
            plan.drop.add(name)
            result.dead_bytes += all_bytes
        elif all_bytes - live_bytes > _DEAD_SHARE * all_bytes:
            plan.rewrite.add(name)
            result.dead_bytes += all_bytes - live_bytes
            result.rewritten_bytes += live_bytes
    for name in set(repository.packs()) - repository.index.packs():  # left by a backup that was cut, not taken up
        plan.drop.add(name)
        result.dead_bytes += repository.store.size(name)
    result.deleted_packs, result.rewritten_packs = len(plan.drop), len(plan.rewrite)
    return plan


# ---------------------------------------------------------------------- doing it


def _switch(repository: Repository, plan: _Plan, job: Job) -> None:
    store, index = repository.store, repository.index
    gone = plan.drop | plan.rewrite
    touched = [w for w in plan.weights if w.segment is index.rebuilt or not gone.isdisjoint(w.segment.packs)]
    moved, new_packs = np.zeros(0, ENTRY), list[str]()
    for weights in touched:
        for entries in _moving(weights, plan.rewrite):
            if len(moved):  # what was moved before is enough for a segment of its own
                store.put(*build_segment(moved, new_packs, repository.sealer, os.urandom(16)))
            mover = _Mover(repository)
            edges = np.flatnonzero(np.diff(entries["pack"].astype(np.int64), prepend=-1, append=-1)).tolist()
            for first, end in pairwise(edges):
                mover.move(weights.segment.packs[int(entries["pack"][first])], entries[first:end], job)
            moved, new_packs = mover.finish()
            store.flush()  # packs first: a segment must never outlive what it lists
    runs, packs = _staying(touched, gone)
    if len(moved):
        moved["pack"] += len(packs)
        runs.append(EntryRun.of(moved))
        packs += new_packs
    if runs:
        segment = MergedSegment(runs, packs, repository.sealer, os.urandom(16))
        store.put(segment.name, segment.parts())
    store.flush()
    for weights in touched:
        if weights.segment is not index.rebuilt:
            store.delete(weights.segment.name)
    for name in [*gone, *index.damaged]:
        store.delete(name)
    if gone:
        spare.renew(store)  # what it was counted by is gone, and it may stand far from the end by now
    store.flush()
    spare.bring_forward(store)


def _moving(weights: _Weights, rewrite: set[str]) -> Iterator[Entries]:
    """The live entries of packs that are rewritten, in the order in which they stand there, some packs at a time."""
    numbers = [n for n, name in enumerate(weights.segment.packs) if name in rewrite and weights.chunks[n]]
    while numbers:
        sums = np.cumsum(weights.chunks[numbers])
        count = max(1, int(np.searchsorted(sums, _MOVED, "right")))
        wanted = np.zeros(len(weights.segment.packs), bool)
        wanted[numbers[:count]] = True
        numbers = numbers[count:]
        entries = _live_entries(weights, wanted)
        yield entries[np.lexsort((entries["offset"], entries["pack"]))]


def _live_entries(weights: _Weights, packs: NDArray[np.bool_]) -> Entries:
    found, at = [np.zeros(0, ENTRY)], 0
    for entries in weights.segment.sweep():
        bits = np.unpackbits(weights.live[at // 8 : -(-(at + len(entries)) // 8)], count=len(entries)).astype(bool)
        found.append(entries[bits & packs[entries["pack"]]])
        at += len(entries)
    return np.concatenate(found)


def _staying(touched: list[_Weights], gone: set[str]) -> tuple[list[Run], list[str]]:
    """What of the touched segments stays where it is, and the packs that it stands in."""
    packs: dict[str, int] = {}
    runs: list[Run] = []
    for weights in touched:
        names = weights.segment.packs
        stays = np.array([name not in gone for name in names], bool) & (weights.chunks > 0)
        if not stays.any():
            continue
        numbers = [packs.setdefault(n, len(packs)) if s else 0 for n, s in zip(names, stays.tolist(), strict=True)]
        kept, at = weights.live.copy(), 0
        for entries in weights.segment.sweep():
            part = slice(at // 8, -(-(at + len(entries)) // 8))
            kept[part] &= np.packbits(stays[entries["pack"]])
            at += len(entries)
        runs.append(SegmentRun(weights.segment, np.array(numbers, np.uint32), kept))
    return runs, list(packs)


class _Mover:
    """Copies frames, as they are, into new packs."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._builder = PackBuilder()
        self._pending: list[tuple[bytes, int, int]] = []
        self._entries: list[Entries] = []
        self._packs: list[str] = []

    def move(self, pack: str, entries: Entries, job: Job) -> None:
        """Frames of one pack, in the order in which they stand there; neighbours are read at once."""
        starts, lengths = entries["offset"].astype(np.int64), entries["length"].astype(np.int64)
        breaks = (starts[1:] != starts[:-1] + lengths[:-1]) | (np.diff(starts // _READ) != 0)
        edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(entries)]
        for first, end in pairwise(edges):
            base = int(starts[first])
            data = memoryview(self._repository.store.get(pack, base, int(starts[end - 1] + lengths[end - 1]) - base))
            for raw, at, length in zip(
                entries["id"][first:end],
                (starts[first:end] - base).tolist(),
                lengths[first:end].tolist(),
                strict=True,
            ):
                self._add(ChunkId(raw.tobytes()), bytes(data[at : at + length]))
                job.advance(length)

    def _add(self, chunk_id: ChunkId, frame: bytes) -> None:
        self._pending.append((chunk_id, self._builder.add(chunk_id, frame), len(frame)))
        if self._builder.size >= self._repository.config.pack_size or len(self._pending) >= MAX_FRAMES:
            self._put()

    def finish(self) -> tuple[Entries, list[str]]:
        """All that was moved, and the packs it stands in now."""
        if self._pending:
            self._put()
        return np.concatenate([np.zeros(0, ENTRY), *self._entries]), self._packs

    def _put(self) -> None:
        name, parts, start = self._builder.build(self._repository.sealer)
        self._repository.store.put(name, parts)
        entries = np.zeros(len(self._pending), ENTRY)
        entries["id"] = np.frombuffer(b"".join(i for i, _, _ in self._pending), entries["id"].dtype)
        entries["pack"] = len(self._packs)
        entries["offset"] = [start + at for _, at, _ in self._pending]
        entries["length"] = [length for _, _, length in self._pending]
        self._entries.append(entries)
        self._packs.append(name)
        self._builder, self._pending = PackBuilder(), []
