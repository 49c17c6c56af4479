"""Chains of clusters, as FAT and exFAT keep them: the table read once, and then asked for many files at a time.

    table     cluster   2  3  4  5  6  7  8  9           an entry names the next cluster, 0 is free
              entry     3  4  8  0  9  -  -  7
    runs      [2, 5) -> 8      [6, 7) -> 9      [7, 8) end      [8, 9) end      [9, 10) -> 7

Runs of clusters that follow each other are one row, so memory grows with the pieces that files are in, not with the
volume.  What a chain touches is told for all chains at once by doubling: after k steps every run knows of the 2^k
that come after it.  A chain that runs in a circle costs no more than another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.extents import Offsets
from ferrotype.filesystems.remains import Ranges

__all__ = ["Chains"]

_MOST_RUNS: Final = 1 << 24  # a table in more pieces than this is read no further: about 700 MiB when asked

Clusters = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Chains:
    """Every chain of a table, in runs: clusters firsts[i] up to ends[i], and the run that follows, or -1."""

    heap: int  # bytes of the volume before cluster 2
    size: int  # bytes of a cluster
    clusters: int  # clusters of the volume, from number 2 on
    firsts: Clusters
    ends: Clusters
    following: NDArray[np.int32]
    bad: NDArray[np.bool_]  # runs that are marked as bad clusters
    ended: NDArray[np.bool_]  # runs behind which the table says that the chain ends
    stray: NDArray[np.uint32]  # the cluster that a run leads to though it is free, 0 where there is none
    whole: bool  # whether all of the table was taken: it is in no more pieces than are looked at

    @classmethod
    def of(cls, windows: Iterable[NDArray[np.uint32]], heap: int, size: int, clusters: int, bad: int) -> Chains:
        """From the entries of cluster 2 on, in windows; ``bad`` is a bad cluster's entry, higher ones are ends."""
        firsts, ends, following, whole = _runs(windows, clusters)
        marked = following == bad
        firsts, ends, following, owner = _cut(firsts, ends, following)
        at = _find(firsts, ends, following)
        astray = (at < 0) & (following >= 2) & (following < clusters + 2)
        stray = np.where(astray, following, 0).astype(np.uint32)
        return cls(
            heap, size, clusters, firsts, ends, at.astype(np.int32), marked[owner], following > bad, stray, whole
        )

    def find(self, clusters: Clusters) -> Clusters:
        """The run in which each cluster lies, -1 where it is free or not one of the volume."""
        return _find(self.firsts, self.ends, clusters)

    def touched(self, ranges: Ranges) -> NDArray[np.bool_]:
        """For each run whether it, or any that comes after it in its chain, shares a byte with a range."""
        runs = np.arange(len(self.firsts))
        hit = ranges.touch(self.at(self.firsts), self.at(self.ends)) | self._astray(runs, ranges)
        hit = np.append(hit, False)
        end = len(self.firsts)
        jump = np.append(np.where(self.following < 0, end, self.following), end)
        for _ in range(max(end, 1).bit_length()):
            hit |= hit[jump]
            jump = jump[jump]
            if (jump == end).all():
                break
        found: NDArray[np.bool_] = hit[:-1]
        return found

    def touched_from(self, heads: Clusters, touched: NDArray[np.bool_], ranges: Ranges) -> NDArray[np.bool_]:
        """For each file that begins at a cluster whether it shares a byte with a range; ``touched`` is of the runs.

        A first cluster that the table calls free still holds the file's first bytes: a table may be damaged.
        """
        on_volume = (heads >= 2) & (heads < self.clusters + 2)
        run = self.find(heads)
        found = run >= 0
        own_end = heads + 1
        own_end[found] = self.ends[run[found]]
        later = np.zeros(len(heads), bool)
        after = self.following[run[found]]
        later[found] = (after >= 0) & np.append(touched, False)[after] | self._astray(run[found], ranges)
        touched_heads: NDArray[np.bool_] = on_volume & (ranges.touch(self.at(heads), self.at(own_end)) | later)
        return touched_heads

    def followed(self) -> tuple[Clusters, NDArray[np.bool_]]:
        """For each run how many clusters its chain has from there on, and whether it comes to an end as it should."""
        lengths = self.ends - self.firsts
        jump = np.where(self.following < 0, np.arange(len(lengths)), self.following)
        before = np.where(self.following < 0, 0, lengths)  # clusters up to the run that is jumped to
        for _ in range(len(lengths).bit_length()):
            before += before[jump]
            jump = jump[jump]
        return before + lengths[jump], self.ended[jump] & (self.following[jump] < 0)

    def through(self, begun: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The runs that chains go through which go through one of these."""
        end = len(self.firsts)
        met = np.append(begun, False)
        jump = np.append(np.where(self.following < 0, end, self.following), end)
        for _ in range(end.bit_length()):
            met[jump[met]] = True
            jump = jump[jump]
        found: NDArray[np.bool_] = met[:-1]
        return found

    def places(self, runs: NDArray[np.bool_]) -> tuple[Offsets, Offsets]:
        """Starts and ends (bytes) of some runs, and of the free clusters that they lead to."""
        stray = self.at(self.stray[runs & (self.stray > 0)].astype(np.int64))
        starts, ends = self.at(self.firsts[runs]), self.at(self.ends[runs])
        return np.concatenate([starts, stray]), np.concatenate([ends, stray + self.size])

    def _astray(self, runs: Clusters, ranges: Ranges) -> NDArray[np.bool_]:
        """Which runs lead to a free cluster that shares a byte with a range."""
        stray = self.at(self.stray[runs].astype(np.int64))
        astray: NDArray[np.bool_] = (self.stray[runs] > 0) & ranges.touch(stray, stray + self.size)
        return astray

    def pieces(self, head: int, most: int) -> Iterator[tuple[int, int]]:
        """Starts and ends (bytes) of the chain that begins at a cluster, up to ``most`` clusters; each run once."""
        if not 2 <= head < self.clusters + 2:
            return
        run = int(self.find(np.array([head], np.int64))[0])
        if run < 0:
            yield self.heap + (head - 2) * self.size, self.heap + (head - 1) * self.size
        seen = set[int]()
        while run >= 0 and run not in seen and most > 0:
            seen.add(run)
            first = head if len(seen) == 1 else int(self.firsts[run])
            end = min(int(self.ends[run]), first + most)
            most -= end - first
            yield self.heap + (first - 2) * self.size, self.heap + (end - 2) * self.size
            run = int(self.following[run])

    def beginnings(self) -> NDArray[np.bool_]:
        """The runs that come after no other, bad clusters left out: each begins a file, or what is left of one."""
        first = ~self.bad
        first[self.following[self.following >= 0]] = False
        return first

    def at(self, clusters: Clusters) -> Offsets:
        """Where clusters begin, in bytes."""
        return self.heap + (clusters - 2) * self.size


def _find(firsts: Clusters, ends: Clusters, clusters: Clusters) -> Clusters:
    if not len(firsts):
        return np.full(len(clusters), -1, np.int64)
    at = np.searchsorted(firsts, clusters, "right") - 1
    return np.where((at >= 0) & (clusters < ends[at]), at, -1)


def _runs(windows: Iterable[NDArray[np.uint32]], clusters: int) -> tuple[Clusters, Clusters, Clusters, bool]:
    """Clusters that follow each other in number and in the table, the entry of the last one of each run; and whether
    the table was taken to its end."""
    firsts, ends, entries = [], [], []
    base, begun, count = 2, 2, 0
    for window in windows:
        last = np.flatnonzero(window != np.arange(base + 1, base + 1 + len(window), dtype=np.uint32))
        edges = last + base
        starts = np.append(begun, edges[:-1] + 1)[: len(edges)]
        begun = int(edges[-1]) + 1 if len(edges) else begun
        kept = (window[last] != 0) | (starts < edges)  # not the free clusters
        firsts.append(starts[kept])
        ends.append(edges[kept] + 1)
        entries.append(window[last][kept].astype(np.int64))
        base += len(window)
        count += len(firsts[-1])
        if count > _MOST_RUNS:
            break
    if begun < base <= clusters + 2:  # a run up to where the table was read
        firsts.append(np.array([begun]))
        ends.append(np.array([base]))
        entries.append(np.array([0]))
    nothing = np.zeros(0, np.int64)
    columns = (np.concatenate([nothing, *column]) for column in (firsts, ends, entries))
    return *columns, base == clusters + 2  # type: ignore[return-value]


def _cut(firsts: Clusters, ends: Clusters, entries: Clusters) -> tuple[Clusters, Clusters, Clusters, Clusters]:
    """Runs cut where an entry leads into the middle of one, as only a damaged table does; and which each was of."""
    at = _find(firsts, ends, entries)
    inside = at >= 0
    targets = entries[inside][entries[inside] > firsts[at[inside]]]
    cut = np.union1d(firsts, targets)
    owner = np.searchsorted(firsts, cut, "right") - 1
    inner = owner[:-1] == owner[1:]
    new_ends, new_entries = ends[owner], entries[owner]
    new_ends[:-1][inner] = new_entries[:-1][inner] = cut[1:][inner]
    return cut, new_ends, new_entries, owner
