"""Where packs stand that nothing but the index knows: at a block, counted from a record that is whole.

    dark range      ...........| pack? .. head .... head .... head |.......
    entries             first ------^   middle --^   last --^        of those that lie in the range

All blocks of a few MiB are tried at once, by the heads of three frames; where one looks right it is opened.  Memory:
tens of MiB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import CorruptChunk
from ferrotype.job import Job
from ferrotype.objects.layout import BLOCK, RecordHeader, padded
from ferrotype.objects.rescue import Piece, RescueStore
from ferrotype.repository.sealing import FRAME_HEAD, MAX_PLAIN, Sealer
from ferrotype.repository.segments import Entries
from ferrotype.units import MiB

_STEP: Final = 4 * MiB  # of places tried at once
_WINDOW: Final = MiB  # bytes read at a time
_KEPT: Final = 24  # windows: the frames of a pack lie that far apart, and the next pack is tried at the same places
_TRIES: Final = 200_000_000  # places tried, all packs together; what costs more counts as many
_READING: Final = 512  # tries that cost as much as reading a window
_OPENING: Final = 256  # ... as opening a frame, and for each 256 bytes of it one more
_MOST_FOUND: Final = 16  # places of one pack

Ints = NDArray[np.int64]


def open_entry(store: RescueStore, sealer: Sealer, piece: Piece, entry: np.void) -> bool:
    """Whether the frame that an entry of the index tells of stands in this piece."""
    chunk_id, _, offset, length = entry.item()
    try:
        sealer.unseal(bytes(chunk_id), store.read(piece, offset, length))
    except CorruptChunk:
        return False
    return True


def place(store: RescueStore, sealer: Sealer, job: Job, packs: Mapping[str, Entries]) -> dict[str, list[Piece]]:
    """For each pack, pieces in which a frame of it was opened; none where it was not found, or the tries ran out."""
    search = _Search(store, sealer, job, [_Pack(name, entries) for name, entries in packs.items()])
    if packs:
        search.run()
    return {pack.name: pack.found for pack in search.packs}


class _Pack:
    """The entries of a pack, by offset."""

    def __init__(self, name: str, entries: Entries) -> None:
        self.name = name
        self.entries = entries[np.argsort(entries["offset"], kind="stable")]
        self.offsets = self.entries["offset"].astype(np.int64)
        self.lengths = self.entries["length"].astype(np.int64)
        self.ends = np.maximum.accumulate(self.offsets + self.lengths)
        self.size = int(self.ends[-1])
        self.span = padded(RecordHeader.SIZE + self.size)
        self.found: list[Piece] = []

    def samples(self, starts: Ints, room: int) -> Iterator[tuple[NDArray[np.bool_], Ints]]:
        """Three times, of a payload at each of ``starts``: whether it has an entry inside of the room, and which."""
        first = np.searchsorted(self.offsets, -starts, "left")
        last = np.searchsorted(self.ends, room - starts, "right") - 1
        inside = first <= last
        for chosen in (first, (first + last) // 2, last):
            yield inside, np.clip(chosen, 0, len(self.entries) - 1)


@dataclass(slots=True)
class _Search:
    store: RescueStore
    sealer: Sealer
    job: Job
    packs: list[_Pack]
    tries: int = _TRIES
    _windows: dict[tuple[Piece, int], bytes] = field(default_factory=dict)

    def run(self) -> None:
        longest = max(pack.span for pack in self.packs)
        for dark in self.store.dark():
            grids = sorted(self.store.grids(dark))
            low = -longest  # the beginning of a pack may be cut off
            while low < dark.length:
                stored = self.store.stored_from(dark, max(low, 0))
                if stored >= dark.length:
                    break
                if stored - longest >= low + _STEP:  # no pack that begins before has a byte that is no hole
                    low = (stored - longest) // BLOCK * BLOCK
                    continue
                self.job.advance(0)
                for pack in self.packs:
                    for grid in grids:
                        if len(pack.found) < _MOST_FOUND and low + _STEP > -pack.span:
                            self._try(pack, dark, max(low, -pack.span) + grid, min(low + _STEP + grid, dark.length))
                        if self.tries < 0:
                            return
                low += _STEP

    def _try(self, pack: _Pack, dark: Piece, low: int, high: int) -> None:
        """A pack at each block from ``low`` on; of what it has inside of the dark range."""
        starts = np.arange(low, high, BLOCK, dtype=np.int64) + RecordHeader.SIZE
        self.tries -= len(starts)
        likely = np.zeros(len(starts), bool)
        chosen = []
        for inside, numbers in pack.samples(starts, dark.length):
            heads = self._heads(dark, np.where(inside, starts + pack.offsets[numbers], 0))
            right = inside & self._look_right(heads, pack.lengths[numbers])
            chosen.append((right, numbers))
            likely |= right
        for at in np.flatnonzero(likely).tolist():
            piece = Piece(dark.volume, dark.start + int(starts[at]), pack.size)
            for number in {int(numbers[at]) for right, numbers in chosen if right[at]}:
                self.tries -= _OPENING + (int(pack.lengths[number]) + MAX_PLAIN // 16) // 256
                if self.tries < 0 or len(pack.found) >= _MOST_FOUND:
                    return
                if open_entry(self.store, self.sealer, piece, pack.entries[number]):
                    pack.found.append(piece)
                    break

    def _look_right(self, heads: NDArray[np.uint8], lengths: Ints) -> NDArray[np.bool_]:
        """Which of them may be heads of frames of these lengths."""
        plain = heads[:, 4:8].copy().view("<u4").ravel().astype(np.int64)
        stored = lengths - self.sealer.overhead
        right: NDArray[np.bool_] = (heads[:, 1:4] == 0).all(axis=1) & (plain > 0) & (plain <= MAX_PLAIN)
        right &= np.where(heads[:, 0] == 0, plain == stored, (heads[:, 0] == 1) & (plain > stored))
        return right

    def _heads(self, dark: Piece, at: Ints) -> NDArray[np.uint8]:
        """The bytes at these offsets of the dark range, as many as a frame's head has; zeros behind its end."""
        out = np.zeros((len(at), FRAME_HEAD), np.uint8)
        numbers = at // _WINDOW
        for number in np.unique(numbers).tolist():
            data = np.frombuffer(self._window(dark, number), np.uint8)
            if len(data) >= FRAME_HEAD:
                here = np.flatnonzero(numbers == number)
                here = here[at[here] - number * _WINDOW <= len(data) - FRAME_HEAD]
                out[here] = np.lib.stride_tricks.sliding_window_view(data, FRAME_HEAD)[at[here] - number * _WINDOW]
        return out

    def _window(self, dark: Piece, number: int) -> bytes:
        known = self._windows.pop((dark, number), None)
        if known is None:
            low, high = number * _WINDOW, min((number + 1) * _WINDOW + FRAME_HEAD - 1, dark.length)
            self.tries -= _READING
            hole = self.store.stored_from(dark, low) >= high
            known = b"" if hole else self.store.read(dark, low, high - low)
        self._windows[dark, number] = known  # behind all others
        if len(self._windows) > _KEPT:
            del self._windows[next(iter(self._windows))]
        return known
