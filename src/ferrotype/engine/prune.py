"""Give back the space of chunks that no snapshot refers to.

    mark      walk the maps of all snapshots once; live chunks are kept as 8 bytes each
    weigh     of each pack: how many of its bytes are live
    rewrite   packs that are mostly dead: their live frames move, as they are, into new packs
    switch    new packs and new index segments durable, then the old ones deleted
    reclaim   holes where they stood

A cut at any point leaves every snapshot readable: until the switch is durable the old packs and segments are whole.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.engine.space import free_for_image, needed_to_rewrite
from ferrotype.errors import IntegrityError, WriteError
from ferrotype.job import Job
from ferrotype.repository import spare
from ferrotype.repository.packs import MAX_FRAMES, PackBuilder
from ferrotype.repository.sealing import ZERO_ID, ChunkId
from ferrotype.repository.segments import ENTRY, Entries, build_segment, keys_of, only_used
from ferrotype.repository.store import Repository
from ferrotype.units import format_size

_DEAD_SHARE: Final = 0.3  # a pack is rewritten when more than this share of its frames' bytes is dead
_FOLD: Final = 1 << 22  # live keys gathered before they are sorted into the rest

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
class _Plan:
    """What becomes of the packs."""

    drop: set[str] = field(default_factory=set)  # nothing in them is live
    rewrite: set[str] = field(default_factory=set)


def prune(repository: Repository, job: Job, *, dry_run: bool = False) -> PruneResult:
    """Reclaim what nothing references.  Needs an image open for writing.

    Raises IntegrityError where a map cannot be read: nothing is deleted then, since it might be needed.  Where there
    is no room to rewrite packs, those that are dead go first; WriteError where there is none of these either.
    """
    result = PruneResult()
    live = _mark(repository, job)
    plan = _weigh(repository, live, result)
    if dry_run:
        return result
    if plan.rewrite:
        needed = needed_to_rewrite(result.rewritten_bytes, len(live))
        free = free_for_image(repository)
        if free is not None and needed > free:
            return _prune_tightly(repository, live, plan, needed, free, job)
    return _carry_out(repository, live, plan, result, job)


def _prune_tightly(
    repository: Repository, live: LiveKeys, plan: _Plan, needed: int, free: int, job: Job
) -> PruneResult:
    """Drop what is dead, which needs hardly any room, and use what that gives back for the rest."""
    if not plan.drop:
        raise WriteError(
            f"rewriting what is mostly dead needs {format_size(needed)} and {format_size(free)} are free there; "
            "make room, or forget more snapshots; nothing was changed"
        )
    dropped = _carry_out(repository, live, _Plan(drop=plan.drop), PruneResult(deleted_packs=len(plan.drop)), job)
    try:
        result = prune(repository, job)
    except WriteError as error:
        job.warn(f"{len(plan.drop)} packs were given back, not more: {error}")
        return dropped
    result.deleted_packs += dropped.deleted_packs
    result.freed_bytes += dropped.freed_bytes
    return result


def _carry_out(repository: Repository, live: LiveKeys, plan: _Plan, result: PruneResult, job: Job) -> PruneResult:
    job.begin("rewriting packs", result.rewritten_bytes)
    try:
        _switch(repository, live, plan, job)
    finally:
        repository.forget_index()  # segments and packs that it knows may be gone
    job.begin("giving space back")
    report = repository.store.reclaim()
    result.freed_bytes, result.remaining_bytes, result.readers = report.freed, report.dead, report.readers
    return result


def _mark(repository: Repository, job: Job) -> LiveKeys:
    """The leading eight bytes of every id a snapshot needs, ascending.

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
                    fresh += [keys_of(ids), np.array([int.from_bytes(page.page_id[:8], "big")], np.uint64)]
                    count += len(ids)
                    if count > _FOLD:
                        live, fresh, count = _folded(live, fresh), [], 0
        job.advance(0)
    return _folded(live, fresh)


def _folded(live: LiveKeys, fresh: list[LiveKeys]) -> LiveKeys:
    keys = np.sort(np.concatenate([live, *fresh]), kind="stable")
    return keys[np.append(True, keys[1:] != keys[:-1])] if len(keys) else keys


def _is_live(live: LiveKeys, entries: Entries) -> NDArray[np.bool_]:
    if not len(live):
        return np.zeros(len(entries), bool)
    keys = keys_of(entries["id"])
    at = np.minimum(np.searchsorted(live, keys), len(live) - 1)
    hit: NDArray[np.bool_] = live[at] == keys
    return hit


def _weigh(repository: Repository, live: LiveKeys, result: PruneResult) -> _Plan:
    plan = _Plan()
    index = repository.index
    weights: dict[str, tuple[int, int]] = {}  # bytes of frames, and of live ones
    for segment in index.segments:
        entries = segment.entries()
        lengths = entries["length"].astype(np.int64)
        needed = np.where(_is_live(live, entries), lengths, 0)
        total = np.bincount(entries["pack"], lengths, len(segment.packs)).astype(np.int64).tolist()
        kept = np.bincount(entries["pack"], needed, len(segment.packs)).astype(np.int64).tolist()
        segment.release()
        for name, all_bytes, live_bytes in zip(segment.packs, total, kept, strict=True):
            before = weights.get(name, (0, 0))  # more than one segment may know chunks of a pack
            weights[name] = before[0] + all_bytes, before[1] + live_bytes
    for name, (all_bytes, live_bytes) in weights.items():
        result.live_bytes += live_bytes
        if live_bytes == 0:
            plan.drop.add(name)
            result.dead_bytes += all_bytes
        elif all_bytes - live_bytes > _DEAD_SHARE * all_bytes:
            plan.rewrite.add(name)
            result.dead_bytes += all_bytes - live_bytes
            result.rewritten_bytes += live_bytes
    for name in set(repository.packs()) - index.packs():  # left by a backup that was cut, and not taken up again
        plan.drop.add(name)
        result.dead_bytes += repository.store.size(name)
    result.deleted_packs, result.rewritten_packs = len(plan.drop), len(plan.rewrite)
    return plan


def _switch(repository: Repository, live: LiveKeys, plan: _Plan, job: Job) -> None:
    store, index = repository.store, repository.index
    gone = plan.drop | plan.rewrite
    touched = [s for s in index.segments if s is index.rebuilt or not gone.isdisjoint(s.packs)]
    mover = _Mover(repository)
    parts: list[Entries] = []
    packs: dict[str, int] = {}
    for segment in touched:
        entries = segment.entries()
        segment.release()
        entries = entries[_is_live(live, entries)]
        stays = np.array([name not in gone for name in segment.packs], bool)
        numbers = np.array(
            [packs.setdefault(n, len(packs)) if n not in gone else 0 for n in segment.packs], np.uint32
        )
        kept = entries[stays[entries["pack"]]].copy()
        kept["pack"] = numbers[kept["pack"]]
        parts.append(kept)
        for number, name in enumerate(segment.packs):
            if name in plan.rewrite:
                mover.move(name, entries[entries["pack"] == number], job)
    mover.finish()
    moved, new_packs = mover.entries(), mover.packs
    moved["pack"] += len(packs)
    everything = np.concatenate([*parts, moved]) if parts else moved
    store.flush()  # packs first: a segment must never outlive what it lists
    if len(everything):
        everything, used = only_used(everything, [*packs, *new_packs])
        name, pieces = build_segment(everything, used, repository.sealer, os.urandom(16))
        store.put(name, pieces)
    store.flush()
    for segment in touched:
        if segment is not index.rebuilt:
            store.delete(segment.name)
    for name in [*gone, *index.damaged]:
        store.delete(name)
    if gone:
        spare.renew(store)  # what it was counted by is gone, and it may stand far from the end by now
    store.flush()


class _Mover:
    """Copies frames, as they are, into new packs."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._builder = PackBuilder()
        self._pending: list[tuple[bytes, int, int]] = []
        self._entries: list[Entries] = []
        self.packs: list[str] = []

    def move(self, pack: str, entries: Entries, job: Job) -> None:
        for entry in entries[np.argsort(entries["offset"])]:
            raw, _, offset, length = entry.item()
            chunk_id = ChunkId(bytes(raw))
            at = self._builder.add(chunk_id, self._repository.store.get(pack, offset, length))
            self._pending.append((chunk_id, at, length))
            job.advance(length)
            if self._builder.size >= self._repository.config.pack_size or len(self._pending) >= MAX_FRAMES:
                self.finish()

    def finish(self) -> None:
        """Put the pack that is being filled."""
        if not self._pending:
            return
        name, parts, start = self._builder.build(self._repository.sealer)
        self._repository.store.put(name, parts)
        entries = np.zeros(len(self._pending), ENTRY)
        entries["id"] = np.frombuffer(b"".join(i for i, _, _ in self._pending), entries["id"].dtype)
        entries["pack"] = len(self.packs)
        entries["offset"] = [start + at for _, at, _ in self._pending]
        entries["length"] = [length for _, _, length in self._pending]
        self._entries.append(entries)
        self.packs.append(name)
        self._builder, self._pending = PackBuilder(), []

    def entries(self) -> Entries:
        return np.concatenate([np.zeros(0, ENTRY), *self._entries])
