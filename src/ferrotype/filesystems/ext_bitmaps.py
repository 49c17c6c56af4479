"""Bitmaps of the groups of ext4, one a row, of those groups alone that have to be looked at.

    groups   0     1     2     3     4     5     6     7         W: a bitmap was written   M: metadata lies in it
             W           M                       W     last
    rows     0     1     2     3                 4     5         1 and 3 stand for 1, and for 3 to 5: free as a whole

A group that was never written and holds no metadata is free from end to end, and so is a stretch of them: the first
one stands for it, so that free runs which end or begin there have their edges in the rows as well.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from ferrotype.extents import Offsets
from ferrotype.filesystems.ext_checksums import Bytes
from ferrotype.filesystems.ext_records import Blocks, Geometry

__all__ = ["bytes_of", "fill_behind", "in_rows", "ones", "paint"]


def in_rows(geo: Geometry, rows: Blocks, starts: Blocks, ends: Blocks) -> tuple[Blocks, Blocks]:
    """Runs of blocks, counted as though the volume were made of the groups in ``rows`` alone, which hold them all."""
    starts, lengths = starts - geo.first_block, ends - starts
    group = starts // geo.group_blocks
    starts -= (group - np.searchsorted(rows, group)) * geo.group_blocks
    return starts, starts + lengths


def bytes_of(geo: Geometry, rows: Blocks, edges: Offsets) -> Offsets:
    """Where clusters that are counted through ``rows`` begin on the volume, in bytes; computed in place."""
    row = edges // geo.group_clusters
    edges += ((rows - np.arange(len(rows))) * geo.group_clusters)[np.minimum(row, len(rows) - 1, out=row)]
    edges *= geo.ratio
    edges += geo.first_block
    np.minimum(edges, geo.blocks, out=edges)
    edges *= geo.block_size
    return edges


def paint(geo: Geometry, window: range, metadata: tuple[Blocks, Blocks]) -> Bytes:
    """Bitmaps of a window of rows in which the metadata is in use and nothing else."""
    starts, ends = metadata
    painted = np.zeros(len(window) * geo.group_clusters // 8, np.uint8)
    low = window.start * geo.group_blocks
    high = low + len(window) * geo.group_blocks
    inside = slice(int(np.searchsorted(ends, low, "right")), int(np.searchsorted(starts, high, "left")))
    first = (np.maximum(starts[inside], low) - low) // geo.ratio
    last = (np.minimum(ends[inside], high) - 1 - low) // geo.ratio
    head, tail = first >> 3, last >> 3
    head_mask = (0xFF << (first & 7)) & 0xFF
    tail_mask = 0xFF >> (7 - (last & 7))
    np.bitwise_or.at(painted, head, np.where(head == tail, head_mask & tail_mask, head_mask).astype(np.uint8))
    np.bitwise_or.at(painted, tail, np.where(head == tail, 0, tail_mask).astype(np.uint8))
    between = np.maximum(tail - head - 1, 0)
    skipped = np.cumsum(between) - between
    painted[np.repeat(head + 1 - skipped, between) + np.arange(between.sum())] = 0xFF
    return painted.reshape(len(window), -1)


@cache
def _popcounts() -> NDArray[np.uint8]:
    """Of all 16-bit numbers."""
    bits = np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1)
    counts: NDArray[np.uint8] = bits.sum(1, dtype=np.uint8)
    return counts


def ones(bitmaps: Bytes) -> Blocks:
    """How many bits are set in each row."""
    counts: Blocks
    if hasattr(np, "bitwise_count"):  # which came with numpy 2
        words = bitmaps if bitmaps.shape[1] % 8 else bitmaps.view(np.uint64)
        counts = np.bitwise_count(words).sum(1, dtype=np.int64)
    else:
        pairs = bitmaps if bitmaps.shape[1] % 2 else bitmaps.view(np.uint16)
        counts = _popcounts()[pairs].sum(1, dtype=np.int64)
    return counts


def fill_behind(bitmap: Bytes, count: int) -> None:
    """Set the padding: all bits from ``count`` on."""
    bitmap[-(-count // 8) :] = 0xFF
    if count % 8:
        bitmap[count // 8] |= 0xFF << (count % 8) & 0xFF
