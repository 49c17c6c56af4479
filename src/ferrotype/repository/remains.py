"""The chunks that are left in a damaged image, from every place that says where one is.

    pack tables, index     what is left of them
    frames                 of an image that is not encrypted: by their looks, where no whole record stands

Each says only where to look: a chunk counts once its frame was opened and its content has the id that was asked for.
Memory: 53 bytes for each place where a chunk may stand, and a few times that while they are sorted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import CorruptChunk, MissingChunk
from ferrotype.job import Job
from ferrotype.objects.rescue import Piece, RescueStore
from ferrotype.pipeline import map_ordered
from ferrotype.repository.bare_frames import BareFrames
from ferrotype.repository.gathering import gather
from ferrotype.repository.merging import build_segment
from ferrotype.repository.packs import PREFIX as PACKS
from ferrotype.repository.sealing import ID_SIZE, ChunkId, Sealer
from ferrotype.repository.segments import ENTRY, Entries, keys_of, only_used
from ferrotype.units import KiB, MiB

_BATCH: Final = MiB  # bytes of frames a worker proves at a time
_GAP: Final = 64 * KiB
_FOLD: Final = 1 << 22  # needed keys gathered before they are sorted into the rest

PLACE: Final = np.dtype(
    [("id", f"V{ID_SIZE}"), ("piece", "<u4"), ("offset", "<u4"), ("length", "<u4"), ("good", "i1")]
)
Places = NDArray[np.void]
Ids = NDArray[np.void]
UNKNOWN, GOOD, BAD = 0, 1, -1


class Remains:
    """Where the chunks of a damaged image stand.  One thread owns it."""

    def __init__(self, store: RescueStore, sealer: Sealer, job: Job) -> None:
        """Reads all pack tables, and the index where one of them is lost."""
        self._store = store
        self._sealer = sealer
        self._job = job
        self._pieces: list[Piece] = []
        self._fresh: list[Places] = []
        self._places = np.zeros(0, PLACE)  # ascending by the leading eight bytes of the id
        self._keys = np.zeros(0, np.uint64)
        self._needed = np.zeros(0, np.uint64)
        self._asked: list[NDArray[np.uint64]] = []
        for piece, entries in gather(store, sealer, job):
            self._add(piece, entries)
        self._settle()
        self._listed = len(self._pieces)  # behind them come those that only look like chunks

    def look_for_frames(self, lengths: set[int]) -> int:
        """Open whatever looks like a frame where no whole record stands; the number of those that are one.

        Only an image that is not encrypted tells ids by content.  ``lengths`` are those that chunks may have.
        """
        if self._sealer.encrypted:
            return 0
        found = 0
        for piece, entries in BareFrames(self._store, self._sealer, self._job, frozenset(lengths)).entries():
            self._add(piece, entries)
            found += len(entries)
        self._settle()
        return found

    # ------------------------------------------------------------------ places

    def _add(self, piece: Piece, entries: Entries) -> None:
        places = np.zeros(len(entries), PLACE)
        for column in ("id", "offset", "length"):
            places[column] = entries[column]
        places["piece"], places["good"] = len(self._pieces), UNKNOWN
        self._pieces.append(piece)
        self._fresh.append(places)

    def _settle(self) -> None:
        places = np.concatenate([self._places, *self._fresh])
        self._fresh = []
        keys = keys_of(places["id"])
        order = np.argsort(keys, kind="stable")
        self._places, self._keys = places[order], keys[order]

    def chunk(self, chunk_id: ChunkId) -> bytes:
        """A chunk's proven plaintext, from whichever place has it.  Raises MissingChunk or CorruptChunk."""
        key = np.uint64(int.from_bytes(chunk_id[:8], "big"))
        low, high = np.searchsorted(self._keys, key, "left"), np.searchsorted(self._keys, key, "right")
        error: CorruptChunk | None = None
        for at in range(int(low), int(high)):
            place = self._places[at]
            if place["id"].tobytes() != chunk_id:
                continue
            try:
                plain = self._sealer.unseal(chunk_id, self._frame(at))
            except CorruptChunk as caught:
                error = caught
                self._places["good"][at] = BAD
                continue
            self._places["good"][at] = GOOD
            return plain
        raise error or MissingChunk(chunk_id)

    def _frame(self, at: int) -> bytes:
        _, piece, offset, length, _ = self._places[at].item()
        return self._store.read(self._pieces[piece], offset, length)

    # ------------------------------------------------------------------ what is needed

    def need(self, ids: Ids) -> None:
        """A snapshot refers to these chunks; eight bytes of memory for each."""
        self._asked.append(keys_of(ids))
        if sum(map(len, self._asked)) > _FOLD:
            self._fold()

    def _fold(self) -> None:
        self._needed = np.unique(np.concatenate([self._needed, *self._asked]))
        self._asked = []

    def prove(self, workers: int) -> None:
        """Open every place of every chunk that is needed, once."""
        self._fold()
        wanted = np.flatnonzero((self._places["good"] == UNKNOWN) & _within(self._needed, self._keys))
        pieces = np.array([(p.volume, p.start) for p in self._pieces], np.int64).reshape(-1, 2)
        chosen = self._places[wanted]
        starts = pieces[chosen["piece"], 1] + chosen["offset"]
        order = wanted[np.lexsort((starts, pieces[chosen["piece"], 0]))]
        self._job.begin("proving chunks", int(chosen["length"].astype(np.int64).sum()))
        for batch, states, size in map_ordered(self._proven, self._batches(order), workers=workers):
            self._places["good"][batch] = states
            self._job.advance(size)

    def _batches(self, order: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Places that follow each other in a piece, about a MiB of them together."""
        places = self._places[order]
        first = 0
        for at in range(1, len(order) + 1):
            if at < len(order):
                before, here, begin = places[at - 1], places[at], int(places["offset"][first])
                gap = int(here["offset"]) - int(before["offset"]) - int(before["length"])
                end = int(here["offset"]) + int(here["length"])
                if here["piece"] == before["piece"] and 0 <= gap <= _GAP and end - begin <= _BATCH:
                    continue
            if at > first:
                yield order[first:at]
            first = at

    def _proven(self, batch: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int8], int]:
        places = self._places[batch]
        base = int(places["offset"][0])
        end = int(places["offset"][-1]) + int(places["length"][-1])
        data = memoryview(self._store.read(self._pieces[int(places["piece"][0])], base, end - base))
        states = np.full(len(batch), BAD, np.int8)
        for number, (chunk_id, _, offset, length, _) in enumerate(places.tolist()):
            try:
                self._sealer.unseal(bytes(chunk_id), data[offset - base : offset - base + length])
            except CorruptChunk:
                continue
            states[number] = GOOD
        return batch, states, int(places["length"].astype(np.int64).sum())

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Of the chunks that snapshots need: intact, damaged, missing; and places of others that none needs."""
        good = np.unique(self._keys[self._places["good"] == GOOD])
        intact = _within(good, self._needed)
        known = _within(self._keys, self._needed)
        listed = self._places["piece"] < self._listed
        others = np.unique(self._keys[listed & ~_within(self._needed, self._keys)])
        return int(intact.sum()), int((known & ~intact).sum()), int((~known).sum()), len(others)

    def as_objects(self) -> tuple[dict[str, list[Piece]], dict[str, bytes]]:
        """What a repository over the chunks that were proven needs: packs, and an index of them."""
        good = self._places[self._places["good"] == GOOD]
        entries = np.zeros(len(good), ENTRY)
        entries["id"], entries["pack"] = good["id"], good["piece"]
        entries["offset"], entries["length"] = good["offset"], good["length"]
        names = [f"{PACKS}{number:032x}" for number in range(len(self._pieces))]
        entries, used = only_used(entries, names)
        packs = {name: [self._pieces[int(name.removeprefix(PACKS), 16)]] for name in used}
        name, parts = build_segment(entries, used, self._sealer, bytes(16))
        return packs, {name: b"".join(parts)}


def _within(sorted_keys: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of ``keys`` are among keys that ascend."""
    if not len(sorted_keys):
        return np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    hit: NDArray[np.bool_] = sorted_keys[at] == keys
    return hit
