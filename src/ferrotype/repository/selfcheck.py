"""A backup looks at its own work before it commits it.

    the map       every page of the new maps can be read and proven, every chunk on them is in the index    always
    the medium    every object it put is read back from storage, every frame in it decoded and proven       on request

Of the map only what the snapshot before did not have is looked at, so the cost follows the change.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import CorruptObject, DeviceError, IntegrityError, MissingChunk, StoreError, WriteError
from ferrotype.pipeline import map_ordered
from ferrotype.repository.chunkmap import ChunkMap, MapPage
from ferrotype.repository.packs import PREFIX as PACKS
from ferrotype.repository.sealing import ZERO_ID, ChunkId
from ferrotype.repository.segments import PREFIX as INDEXES
from ferrotype.repository.segments import Entries, Segment, keys_of
from ferrotype.repository.snapshots import DiskRecord
from ferrotype.repository.store import Repository

_LOOKUP: Final = 1 << 20  # ids looked up in one sweep over the index
_STEP: Final = 1 << 16  # of them at a time: what is found takes several times their memory
UNREADABLE: Final = (IntegrityError, DeviceError, StoreError)

Ids = NDArray[np.void]


# ---------------------------------------------------------------------- the map


def check_maps(
    repository: Repository, disks: Iterable[DiskRecord], parents: Mapping[str, DiskRecord], fresh: str | None
) -> None:
    """Follow the maps of a snapshot that is about to be committed down to the index.

    ``parents`` are the disks, by name, of the snapshot before: what they have in the same places is left out.
    ``fresh`` is the index segment that was put for it.  Raises WriteError where anything is missing or unreadable.
    """
    stored = _Stored(repository, fresh)
    for disk in disks:
        pending: list[Ids] = []
        count = 0
        for ids in _new_ids(repository, stored, disk, parents.get(disk.name)):
            pending.append(ids)
            count += len(ids)
            if count >= _LOOKUP:
                _require(stored, disk, np.concatenate(pending))
                pending, count = [], 0
        if pending:
            _require(stored, disk, np.concatenate(pending))


class _Stored:
    """What the stored index leads to: the new segment, read back, and the older ones."""

    def __init__(self, repository: Repository, fresh: str | None) -> None:
        self._repository = repository
        store = repository.store
        self._sizes = {info.name: info.size for info in store.list(PACKS)}
        try:
            self._fresh = [Segment(store, fresh, repository.sealer)] if fresh is not None else []
        except UNREADABLE as error:
            raise _failed("the index of this backup", str(error)) from error
        names = {info.name for info in store.list(INDEXES)}
        self._older = [segment for segment in repository.index.segments if segment.name in names]

    def chunk(self, chunk_id: ChunkId) -> bytes:
        """A map page, proven."""
        for segment in self._fresh:
            if (at := segment.find(chunk_id)) is not None:
                return self._repository.sealer.unseal(
                    chunk_id, self._repository.store.get(at.pack, at.offset, at.length)
                )
        return self._repository.chunk(chunk_id)

    def missing(self, ids: Ids) -> Ids:
        """Those that no segment, or no stored pack, has."""
        for segment in [*self._fresh, *self._older]:
            if len(ids) == 0:
                break
            try:
                positions, entries = segment.find_many(ids)
            except CorruptObject:
                if segment in self._fresh:
                    raise
                return ids[self._repository.locate_many(ids)[0] < 0]  # an old one is damaged: its packs tell
            left = np.ones(len(ids), np.bool_)
            left[positions[self._inside(segment, entries)]] = False
            ids = ids[left]
        return ids

    def _inside(self, segment: Segment, entries: Entries) -> NDArray[np.bool_]:
        """Which entries lie in a pack that is stored."""
        sizes = np.array([self._sizes.get(name, 0) for name in segment.packs], np.int64)
        ends = entries["offset"].astype(np.int64) + entries["length"]
        inside: NDArray[np.bool_] = ends <= sizes[entries["pack"]]
        return inside


def _new_ids(repository: Repository, stored: _Stored, disk: DiskRecord, parent: DiskRecord | None) -> Iterator[Ids]:
    """The chunk ids of a disk that its parent does not have in the same place, page by page."""
    if parent is not None and parent.chunk_size != disk.chunk_size:
        parent = None
    before = {region.start: repository.map(parent, region) for region in parent.regions} if parent else {}
    for region in disk.regions:
        known = before.get(region.start)
        chunk_map = ChunkMap(region.root, disk.cells(region), stored.chunk)
        for page in chunk_map.walk(lambda _: False, known):
            if page.ids is None:
                raise _failed(f"the map of {disk.name}", str(page.error)) from page.error
            if page.level == 0:
                yield _different(page, known)


def _different(page: MapPage, known: ChunkMap | None) -> Ids:
    assert page.ids is not None  # noqa: S101  the caller looked
    ids = page.ids[: page.count]
    wanted = ids != np.void(ZERO_ID)
    if known is not None and (count := min(page.count, known.cells - page.first)) > 0:
        with suppress(*UNREADABLE):  # where the older map is damaged all are looked at
            wanted[:count] &= ids[:count] != known.ids(page.first, count)
    new: Ids = ids[wanted]
    return new


def _require(stored: _Stored, disk: DiskRecord, ids: Ids) -> None:
    ids = ids[np.argsort(keys_of(ids), kind="stable")]
    try:
        pieces = [stored.missing(ids[at : at + _STEP]) for at in range(0, len(ids), _STEP)]
        missing = np.concatenate([ids[:0], *pieces])
    except UNREADABLE as error:
        raise _failed("the index of this backup", str(error)) from error
    if len(missing):
        first = MissingChunk(missing[0].tobytes())
        raise _failed(f"the map of {disk.name}", f"{first}; {len(missing)} in all")


# ---------------------------------------------------------------------- the medium


def unproven(repository: Repository, names: Sequence[str]) -> dict[str, str]:
    """Those of the objects that do not read back from the medium as what they should be, and why."""

    def why(name: str) -> str:
        try:
            repository.store.check(name, from_medium=True)
            if name.startswith(PACKS):
                _prove_frames(repository, name)
        except UNREADABLE as error:
            return str(error)
        return ""

    workers = len(os.sched_getaffinity(0))
    found = zip(names, map_ordered(why, names, workers=workers), strict=True)
    return {name: reason for name, reason in found if reason}


def not_read_back(found: Mapping[str, str]) -> WriteError:
    """The error for what ``unproven`` found."""
    name, why = next(iter(found.items()))
    return _failed(f"{len(found)} of the objects just written, {name} among them,", why)


def _prove_frames(repository: Repository, name: str) -> None:
    table = repository.pack_table(name)
    for i, (offset, length) in enumerate(zip(table.offsets.tolist(), table.lengths.tolist(), strict=True)):
        repository.sealer.unseal(table.id(i), repository.store.get(name, offset, length))


def _failed(what: str, why: str) -> WriteError:
    return WriteError(
        f"{what} did not stand the check after writing ({why}); nothing was committed: check the device that holds "
        "the image, and back up again"
    )
