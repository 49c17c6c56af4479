"""Extent maps: which bytes of a source must be moved, and which are known without reading them.

    bounds   0        64K      1M             5M      8M        n + 1 int64, strictly ascending
             |  DATA  |  ZERO  |  FREE        |  DATA |
    states       0        1         4             0             n uint8 of State flags

A state flag is a permission and no flag is always a correct answer, so combining maps never has to guess:

    cut      to a grid: a cell keeps only what all of it has     (AND)
    merge    two maps of the same bytes: what either promises    (OR)
    overlay  the lower layer shows where the upper is a HOLE

Everything is vectorised; a map of ten million runs is cut, merged or counted in about a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntFlag
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import UnsupportedError

Offsets = NDArray[np.int64]
States = NDArray[np.uint8]


class State(IntFlag):
    """What is known of an extent without reading it.  No flag (DATA) promises nothing and is always right."""

    DATA = 0
    ZERO = 1  # reads as zeros
    HOLE = 2  # this layer stores nothing here; a lower layer may
    FREE = 4  # the file system does not use it
    CLEAN = 8  # unchanged since the parent


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes: start, length (bytes) and state."""

    start: int
    length: int
    state: State = State.DATA

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True, eq=False)
class ExtentMap:
    """An ascending, gap-free, complete map of the bytes from ``start`` to ``end``.

    ``bounds`` holds n + 1 strictly ascending offsets and ``states`` n flags, so a map cannot overlap or have gaps.
    An empty range has no extents and one bound.
    """

    bounds: Offsets
    states: States

    # ------------------------------------------------------------------ making

    @classmethod
    def uniform(cls, start: int, length: int, state: State = State.DATA) -> ExtentMap:
        """One extent of one state, or an empty map where ``length`` is 0."""
        if length <= 0:
            return cls(np.array([start], np.int64), np.zeros(0, np.uint8))
        return cls(np.array([start, start + length], np.int64), np.array([state], np.uint8))

    @classmethod
    def from_runs(
        cls,
        start: int,
        length: int,
        run_starts: Offsets | Sequence[int],
        run_ends: Offsets | Sequence[int],
        state: State,
        rest: State = State.DATA,
    ) -> ExtentMap:
        """``state`` inside the runs, ``rest`` outside.  Runs ascend without overlap; they are clipped to the map."""
        end = start + length
        starts, ends = np.asarray(run_starts, np.int64), np.asarray(run_ends, np.int64)
        if len(starts) and (starts[0] < start or ends[-1] > end):
            starts, ends = np.clip(starts, start, end), np.clip(ends, start, end)
        bounds = np.empty(2 * len(starts) + 2, np.int64)
        bounds[0], bounds[-1] = start, end
        bounds[1:-1:2], bounds[2:-1:2] = starts, ends
        states = np.full(len(bounds) - 1, rest, np.uint8)
        states[1::2] = state
        return cls._normal(bounds, states)

    @classmethod
    def from_extents(cls, extents: Sequence[Extent]) -> ExtentMap:
        """A map of adjacent, ascending extents.  Raises ValueError on a gap or an overlap."""
        if not extents:
            return cls.uniform(0, 0)
        for left, right in pairwise(extents):
            if left.end != right.start:
                raise ValueError(f"extents do not touch: {left} and {right}")
        bounds = np.array([e.start for e in extents] + [extents[-1].end], np.int64)
        return cls._normal(bounds, np.array([e.state for e in extents], np.uint8))

    @classmethod
    def joined(cls, bounds: Offsets, states: States) -> ExtentMap:
        """A map of ascending bounds and the states between them; equal neighbours become one."""
        return cls._normal(bounds, states)

    @classmethod
    def concat(cls, maps: Sequence[ExtentMap]) -> ExtentMap:
        """Maps that follow each other, as one.  Raises ValueError where one does not start at the end of the last."""
        for left, right in pairwise(maps):
            if left.end != right.start:
                raise ValueError(f"maps do not touch: {left.end} and {right.start}")
        if len(maps) < 2:
            return maps[0] if maps else cls.uniform(0, 0)
        bounds = np.concatenate([m.bounds[:-1] for m in maps] + [maps[-1].bounds[-1:]])
        return cls._normal(bounds, np.concatenate([m.states for m in maps]))

    @classmethod
    def _normal(cls, bounds: Offsets, states: States) -> ExtentMap:
        """Drop empty extents and join equal neighbours."""
        keep = bounds[1:] > bounds[:-1]
        if not keep.all():
            states, bounds = states[keep], np.append(bounds[:-1][keep], bounds[-1])
        if len(states) == 0:
            return cls(bounds[-1:], states)
        fresh = np.empty(len(bounds), bool)
        fresh[0] = fresh[-1] = True
        np.not_equal(states[1:], states[:-1], out=fresh[1:-1])
        return cls(bounds, states) if fresh.all() else cls(bounds[fresh], states[fresh[:-1]])

    # ------------------------------------------------------------------ looking

    @property
    def start(self) -> int:
        return int(self.bounds[0])

    @property
    def end(self) -> int:
        return int(self.bounds[-1])

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def starts(self) -> Offsets:
        return self.bounds[:-1]

    @property
    def lengths(self) -> Offsets:
        return np.diff(self.bounds)

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[Extent]:
        bounds = self.bounds.tolist()
        for i, state in enumerate(self.states.tolist()):
            yield Extent(bounds[i], bounds[i + 1] - bounds[i], State(state))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExtentMap):
            return NotImplemented
        return np.array_equal(self.bounds, other.bounds) and np.array_equal(self.states, other.states)

    __hash__ = None  # type: ignore[assignment]  # arrays inside

    def total(self, flags: State) -> int:
        """Bytes of the extents that have any of ``flags``."""
        return int(self.lengths[(self.states & np.uint8(flags)) != 0].sum())

    def runs(self, flags: State, *, present: bool = True) -> tuple[Offsets, Offsets]:
        """Starts and ends of the maximal runs in which any of ``flags`` is present (or, if not ``present``, none)."""
        hit = ((self.states & np.uint8(flags)) != 0) == present
        edge = np.diff(np.concatenate(([False], hit, [False])).astype(np.int8))
        return self.bounds[np.flatnonzero(edge == 1)], self.bounds[np.flatnonzero(edge == -1)]

    # ------------------------------------------------------------------ deriving

    def clip(self, start: int, length: int) -> ExtentMap:
        """The part of the map inside the range; the range must lie within the map."""
        end = start + length
        if start < self.start or end > self.end or length < 0:
            raise ValueError(f"range {start}..{end} is outside the map {self.start}..{self.end}")
        if length == 0:
            return ExtentMap.uniform(start, 0)
        first = int(np.searchsorted(self.bounds, start, "right")) - 1
        last = int(np.searchsorted(self.bounds, end, "left"))
        bounds = self.bounds[first : last + 1].copy()
        bounds[0], bounds[-1] = start, end
        return ExtentMap(bounds, self.states[first:last])

    def shift(self, delta: int) -> ExtentMap:
        """The same map, ``delta`` bytes further on."""
        return ExtentMap(self.bounds + delta, self.states) if delta else self

    def translate(self, table: dict[State, State]) -> ExtentMap:
        """Replace whole state values; a value not in ``table`` stays."""
        lookup = np.arange(256, dtype=np.uint8)
        for old, new in table.items():
            lookup[int(old)] = int(new)
        return self._normal(self.bounds, lookup[self.states])

    def masked(self, flags: State) -> ExtentMap:
        """Keep only ``flags`` in every state."""
        return self._normal(self.bounds, self.states & np.uint8(flags))

    def cleared(self, flags: State, ranges: Iterable[tuple[int, int]]) -> ExtentMap:
        """Without ``flags`` inside the ranges, given as (start, length)."""
        inside = ExtentMap.uniform(self.start, self.length)
        for start, length in ranges:
            inside = merge(inside, ExtentMap.from_runs(self.start, self.length, [start], [start + length], flags))
        bounds = _same_range(self, inside)
        return self._normal(bounds, _at(self, bounds[:-1]) & ~_at(inside, bounds[:-1]))

    def cut(self, size: int, origin: int = 0) -> ExtentMap:
        """On a grid of ``size`` bytes from ``origin``: each cell keeps the flags that all of it has (AND).

        The first and the last cell may be shorter where the map's range is not on the grid.  Equal neighbouring
        cells are one extent, so the cost follows the runs, not the cells.
        """
        if len(self) == 0:
            return self
        # A boundary off the grid makes its cell mixed; every other cell is uniform already.
        inner = self.bounds[1:-1]
        off_grid = inner[(inner - origin) % size != 0]
        lows = _distinct(np.maximum(off_grid - (off_grid - origin) % size, self.start))
        highs = np.minimum(lows - (lows - origin) % size + size, self.end)
        bounds = _distinct(np.sort(np.concatenate([self.bounds, lows, highs]), kind="stable"))
        pieces = _at(self, bounds[:-1])
        # Pieces of one mixed cell become one by AND; a piece starts a new cell unless it lies inside a mixed one.
        depth = np.zeros(len(bounds), np.int8)
        depth[np.searchsorted(bounds, lows)] += 1
        depth[np.searchsorted(bounds, highs)] -= 1
        opens = np.zeros(len(bounds), bool)
        opens[np.searchsorted(bounds, lows)] = True
        heads = np.flatnonzero((np.cumsum(depth, dtype=np.int8) == 0)[:-1] | opens[:-1])
        return self._normal(np.append(bounds[heads], bounds[-1]), np.bitwise_and.reduceat(pieces, heads))


_STEP: Final = 1 << 18  # extents looked up at once


def _distinct(ascending: Offsets) -> Offsets:
    """Without repetitions.  (``numpy.unique`` hashes, which costs fifty times as much on sorted input.)"""
    return ascending[np.append(True, ascending[1:] != ascending[:-1])] if len(ascending) else ascending


def _same_range(a: ExtentMap, b: ExtentMap) -> Offsets:
    if a.start != b.start or a.end != b.end:
        raise ValueError(f"maps of different ranges: {a.start}..{a.end} and {b.start}..{b.end}")
    few, many = sorted((a.bounds, b.bounds), key=len)
    if len(few) < len(many) // 8:  # as the holes of a file beside the free space of a volume
        at = np.searchsorted(many, few)
        new = many[at] != few
        return np.insert(many, at[new], few[new]) if new.any() else many
    # a stable sort merges two ascending runs in one pass
    return _distinct(np.sort(np.concatenate([a.bounds, b.bounds]), kind="stable"))


def _at(m: ExtentMap, starts: Offsets) -> States:
    """The states at ``starts``, among which are all starts of the map."""
    if len(m) == len(starts):
        return m.states
    if len(m) < len(starts) // 8:  # few are looked up among many, and not the reverse
        return np.repeat(m.states, np.diff(np.searchsorted(starts, m.starts), append=len(starts)))
    states = np.empty(len(starts), np.uint8)
    for at in range(0, len(starts), _STEP):  # for the memory's sake
        states[at : at + _STEP] = m.states[np.searchsorted(m.bounds, starts[at : at + _STEP], "right") - 1]
    return states


def merge(a: ExtentMap, b: ExtentMap) -> ExtentMap:
    """Two maps of the same bytes: an extent has every flag that either map promises (OR)."""
    bounds = _same_range(a, b)
    return ExtentMap._normal(bounds, _at(a, bounds[:-1]) | _at(b, bounds[:-1]))


def overlay(top: ExtentMap, base: ExtentMap) -> ExtentMap:
    """``base`` where ``top`` is a HOLE, ``top`` elsewhere."""
    bounds = _same_range(top, base)
    upper = _at(top, bounds[:-1])
    hole = (upper & np.uint8(State.HOLE)) != 0
    return ExtentMap._normal(bounds, np.where(hole, _at(base, bounds[:-1]), upper))


_WINDOW: Final = 256 << 10  # bitmap bytes looked at in one go: temporaries stay under 100 MiB, whatever the bits
_MAX_EDGES: Final = 1 << 23  # ends of runs kept, 64 MiB; a map with more says nothing worth its memory


class BitmapRuns:
    """Runs of set bits, gathered from a bitmap that arrives in pieces.

    Bits are numbered from the least significant of the first byte, as ext4, NTFS and exFAT number theirs.
    Cost: a few passes over the packed bytes; memory grows with the number of runs only.  Raises UnsupportedError
    where there are too many of them to be worth keeping.
    """

    def __init__(self) -> None:
        self._edges: list[Offsets] = []
        self._count = 0
        self._last = 0
        self._kept = 0

    def add(self, bitmap: NDArray[np.uint8], count: int) -> None:
        """Append ``count`` bits.  Every piece but the last must hold a multiple of 8 bits."""
        if self._count % 8:
            raise ValueError("only the last piece may end inside a byte")
        packed = bitmap[: (count + 7) // 8]
        if len(packed) * 8 < count:
            raise ValueError(f"{count} bits asked of {len(bitmap)} bytes")
        for at in range(0, len(packed), _WINDOW):
            window = packed[at : at + _WINDOW]
            self._add_window(window, min(count - at * 8, len(window) * 8))

    def add_run(self, count: int, *, value: bool) -> None:
        """Append ``count`` equal bits without a bitmap."""
        if count and int(value) != self._last:
            self._edges.append(np.array([self._count], np.int64))
            self._last = int(value)
        self._count += count

    def _add_window(self, packed: NDArray[np.uint8], count: int) -> None:
        changes, words = self._changes(packed)
        if len(words):
            octets = changes[words].view(np.uint8)
            touched = np.flatnonzero(octets != 0)  # of numbers themselves it takes six times as long
            place = words[touched >> 3] << 3
            place |= touched & 7
            bits = np.flatnonzero(np.unpackbits(octets[touched], bitorder="little").view(np.bool_))
            edges = place[bits >> 3] << 3
            edges |= bits & 7
            edges = edges[: int(np.searchsorted(edges, count))]
            self._kept += len(edges)
            if self._kept > _MAX_EDGES:
                raise UnsupportedError(f"the allocation map has more than {_MAX_EDGES // 2} free runs")
            self._edges.append(edges + self._count)
            self._last ^= len(edges) & 1
        self._count += count

    def _changes(self, packed: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], Offsets]:
        """The bits in words of 64, each set where it differs from the one before it, and which words have any."""
        if len(packed) % 8 or packed.ctypes.data % 8 or not packed.flags.c_contiguous:
            padded = np.zeros(-(-len(packed) // 8) * 8, np.uint8)  # what is added lies behind ``count``
            padded[: len(packed)] = packed
            packed = padded
        bits = packed.view("<u8")
        changes = bits << np.uint64(1)
        changes[1:] |= bits[:-1] >> np.uint64(63)
        changes[0] |= np.uint64(self._last)
        changes ^= bits
        return changes, np.flatnonzero(changes != 0)

    def finish(self) -> tuple[Offsets, Offsets]:
        """Starts and ends (in bits) of the runs of ones."""
        edges = np.concatenate(self._edges) if self._edges else np.zeros(0, np.int64)
        self._edges = [edges]  # and not twice the memory
        if len(edges) % 2:
            edges = np.append(edges, self._count)
        return edges[0::2], edges[1::2]
