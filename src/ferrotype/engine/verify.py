"""Verify: prove that every stored byte is what was written, and say which part of which disk is hit where not.

    stored bytes   each object against its checksum, each frame of an encrypted image against its tag: no decoding
    deep           each frame decoded and its plaintext compared with its id
    references     each snapshot's maps: every page readable, every chunk present and not among the lost

Damage is found once, in the packs, and then looked up in the maps; pages that snapshots share are walked once.  A
writer may be at work meanwhile: whatever fails is looked at again in the newest state, and what is gone is no damage.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np

from ferrotype.engine.damage import Damage, find_damage, lost_chunks
from ferrotype.engine.turns import Progress, begin_or_resume
from ferrotype.engine.unreadable import tell_of_snapshots
from ferrotype.errors import CorruptChunk, DeviceError, FerrotypeError, IntegrityError, StoreError
from ferrotype.job import Job
from ferrotype.pipeline import map_ordered
from ferrotype.repository.packs import PREFIX as PACKS
from ferrotype.repository.sealing import ChunkId
from ferrotype.repository.segments import PREFIX as INDEXES
from ferrotype.repository.segments import Segment
from ferrotype.repository.store import Repository

__all__ = ["Damage", "VerifyOptions", "VerifyResult", "verify"]

_READ: Final = 2 << 20  # bytes of a pack read at once
_TRIES: Final = 5  # states of the image that one thing is looked at in, while a writer makes newer ones
_UNREADABLE: Final = (IntegrityError, DeviceError, StoreError)


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How much to verify."""

    deep: bool = False
    sample: float = 1.0  # share of the packs
    workers: int = 0
    turns: Path | None = None  # a file that remembers what was checked: the sample goes on there; None: at random


@dataclass(slots=True)
class VerifyResult:
    """What was proven, and what was not."""

    checked_bytes: int = 0
    objects: int = 0
    damaged: list[Damage] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # damage that may or may not hit a snapshot
    progress: Progress | None = None  # of the round, where the image is verified in turns

    @property
    def ok(self) -> bool:
        return not self.damaged and not self.problems


def verify(repository: Repository, options: VerifyOptions, job: Job) -> VerifyResult:
    """Check the stored packs, all other objects, and then what the snapshots refer to."""
    result = VerifyResult()
    sizes = {info.name: info.size for info in repository.store.list(PACKS)}
    turns = None
    if options.turns is not None:
        turns = begin_or_resume(options.turns, repository.config.id, datetime.now(UTC), job)
        packs = turns.choose(sorted(sizes), options.sample)
    else:
        packs = _sampled(sorted(sizes), options.sample)
    job.begin("verifying", sum(sizes[name] for name in packs))
    bad: dict[str, _Found] = {}
    try:
        for name, found in _checked(repository, packs, options):
            if turns is not None:
                turns.note(name, good=found is None)
            if found is None or found.stored:
                result.checked_bytes += sizes[name]
                result.objects += 1
            if found is not None and found.stored:
                bad[name] = found
            job.advance(sizes[name])
    finally:
        if turns is not None and options.turns is not None:  # also where this run is stopped
            now = {info.name: info.size for info in repository.store.list(PACKS)}
            result.progress = turns.settle(options.turns, now, options.sample, packs, job)
    _check_the_rest(repository, bad, result, job)
    with suppress(*_UNREADABLE):  # what is wrong with the snapshots was found
        tell_of_snapshots(repository.snapshots(), job)
    return result


def _sampled(names: list[str], share: float) -> list[str]:
    if share >= 1 or not names:
        return names
    count = max(1, round(len(names) * share))
    return sorted(random.SystemRandom().sample(names, count))


# ---------------------------------------------------------------------- packs


@dataclass(frozen=True, slots=True)
class _Found:
    """Damage in one pack; not ``stored``: it was deleted meanwhile, and that is none."""

    ids: tuple[bytes, ...]
    why: str
    stored: bool = True


_GONE: Final = _Found((), "", stored=False)


def _checked(repository: Repository, packs: list[str], options: VerifyOptions) -> Iterator[tuple[str, _Found | None]]:
    checker = _PackChecker(repository, options.deep)
    workers = options.workers or len(os.sched_getaffinity(0))
    return zip(packs, map_ordered(checker, packs, workers=workers), strict=True)


class _PackChecker:
    """Checks one pack; called from many threads."""

    def __init__(self, repository: Repository, deep: bool) -> None:
        self._repository = repository
        self._deep = deep

    def __call__(self, name: str) -> _Found | None:
        """None: it is whole.  What fails is looked at again until the image has no newer state."""
        found = None
        for attempt in range(_TRIES):
            found = self._look(name)
            if found is None:
                return None
            newer = _refreshed(self._repository)
            if not _stored(self._repository, name):
                return _GONE
            if attempt and not newer:  # at least twice: another thread may have gone on in between
                break
        return found

    def _look(self, name: str) -> _Found | None:
        try:
            self._repository.store.check(name)
            why = ""
        except _UNREADABLE as error:
            why = str(error)
        if not why and not self._deep and not self._repository.sealer.encrypted:
            return None
        try:
            frames = self._frames(name)
        except _UNREADABLE as error:
            why = why or str(error)
            frames = self._indexed_frames(name)
        ids = tuple(self._bad(name, frames))
        return _Found(ids, why or "its content does not match") if ids or why else None

    def _bad(self, name: str, frames: list[tuple[ChunkId, int, int]]) -> Iterator[ChunkId]:
        """Chunks whose frames do not prove themselves; neighbours are read at once."""
        at = 0
        while at < len(frames):
            base, end, stop = frames[at][1], frames[at][1] + frames[at][2], at + 1
            while stop < len(frames) and frames[stop][1] == end and end + frames[stop][2] - base <= _READ:
                end += frames[stop][2]
                stop += 1
            data = memoryview(b"")
            with suppress(*_UNREADABLE):  # then each is read by itself
                data = memoryview(self._repository.store.get(name, base, end - base))
            for chunk_id, offset, length in frames[at:stop]:
                if not self._good(name, chunk_id, offset, length, data[offset - base : offset - base + length]):
                    yield chunk_id
            at = stop

    def _good(self, name: str, chunk_id: ChunkId, offset: int, length: int, frame: bytes | memoryview) -> bool:
        sealer = self._repository.sealer
        try:
            if len(frame) != length:
                frame = self._repository.store.get(name, offset, length)
            if self._deep or not sealer.encrypted:
                sealer.unseal(chunk_id, frame)
            else:
                sealer.authenticate(chunk_id, frame)
        except (CorruptChunk, *_UNREADABLE):
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
                number = segment.packs.index(name)
                try:
                    mine = np.concatenate([e[e["pack"] == number] for e in (segment.pages(0, 0), *segment.sweep())])
                except _UNREADABLE:
                    continue
                columns = (mine["id"], mine["offset"].tolist(), mine["length"].tolist())
                return [(ChunkId(i.tobytes()), o, n) for i, o, n in zip(*columns, strict=True)]
        return []


def _refreshed(repository: Repository) -> bool:
    """Whether the image has a newer state now; one that cannot be read is none."""
    try:
        return repository.refresh()
    except FerrotypeError:
        return False


def _stored(repository: Repository, name: str) -> bool:
    try:
        repository.store.size(name)
    except StoreError:
        return False
    return True


# ---------------------------------------------------------------------- everything else


def _check_the_rest(repository: Repository, bad: dict[str, _Found], result: VerifyResult, job: Job) -> None:
    """Configuration, keys, indexes and snapshots, and the damage; once more where the image has changed meanwhile."""
    told = list(repository.warnings)
    for _ in range(_TRIES):
        attempt = VerifyResult()
        suspected: set[bytes] = set()
        for name, found in bad.items():
            if _stored(repository, name):
                attempt.problems.append(f"{name}: {_counted(len(found.ids))} ({found.why})")
                suspected.update(found.ids)
        newer = _check_objects(repository, attempt)
        job.begin("checking snapshots")
        known = repository.snapshots()
        attempt.problems += [warning for warning in repository.warnings if warning not in attempt.problems]
        attempt.damaged = find_damage(repository, lost_chunks(repository, suspected), known, job)
        if attempt.ok or not (_refreshed(repository) or newer):
            break
        repository.warnings[:] = told
    result.damaged, result.problems = attempt.damaged, attempt.problems
    result.objects += attempt.objects
    result.checked_bytes += attempt.checked_bytes


def _counted(chunks: int) -> str:
    return "1 damaged chunk" if chunks == 1 else f"{chunks} damaged chunks"


def _check_objects(repository: Repository, result: VerifyResult) -> bool:
    """Everything that is not a pack; whether the image has gone on to a newer state meanwhile."""
    newer = False
    for info in list(repository.store.list("")):
        if info.name.startswith(PACKS):
            continue
        newer |= _check_object(repository, info.name, result)
        result.objects += 1
        result.checked_bytes += info.size
    for segment in repository.index.segments:
        _told(result, _reading(segment))
    for name in repository.index.damaged:
        result.problems.append(f"{INDEXES}{name.removeprefix(INDEXES)} cannot be read")
    return newer


def _check_object(repository: Repository, name: str, result: VerifyResult) -> bool:
    """What fails is looked at again at once, so that no writer has time to move it between two looks every time."""
    moved = False
    for attempt in range(_TRIES):
        try:
            repository.store.check(name)
            return moved
        except _UNREADABLE as error:
            why = str(error)
        newer = _refreshed(repository)
        moved |= newer
        if not _stored(repository, name):
            return moved
        if attempt and not newer:
            break
    result.problems.append(why)
    return moved


def _told(result: VerifyResult, check: Callable[[], object]) -> None:
    try:
        check()
    except _UNREADABLE as error:
        result.problems.append(str(error))


def _reading(segment: Segment) -> Callable[[], object]:
    return lambda: deque(segment.sweep(), 0)
