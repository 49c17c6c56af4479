"""Thousands of NTFS records at a time: fix-ups, attributes, run lists and index entries of a whole batch in lockstep.

    batch   record | record | record | ...       one row each, all of one size
    step 1  ^at      ^at      ^at                 the first attribute of every record
    step 2     ^at       ^at  (end)               ... and so on, each step one numpy expression over those still going

What does not hold is left out where it begins: a record without its fix-ups, the attributes behind an impossible
length, the runs behind one that leaves the volume.  Nothing is raised for content.

The structures are those of ``ntfs_records``; offsets in here are bytes of the flattened batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.filesystems.ntfs_records import (
    END,
    STANDARD_STRIDE,
    AttributeRecordHeader,
    FileName,
    IndexEntry,
    NonresidentForm,
    ResidentForm,
)

__all__ = ["Attributes", "Bytes", "Flags", "Places", "Runs", "attributes", "entries", "fix_up", "number_at", "runs"]

Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]
Places = NDArray[np.int64]

_NONRESIDENT: Final = 1
_SHORTEST: Final = AttributeRecordHeader.SIZE + ResidentForm.SIZE
_LAST: Final = 2  # flag of an index entry


@dataclass(frozen=True, slots=True, eq=False)
class Attributes:
    """Attributes of a batch: which row, where each begins and ends, its type, and whether it has clusters."""

    row: Places
    at: Places
    end: Places
    type_code: Places
    nonresident: Flags

    def take(self, which: Flags | Places) -> Attributes:
        """Some of them."""
        return Attributes(
            self.row[which], self.at[which], self.end[which], self.type_code[which], self.nonresident[which]
        )


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Runs of clusters, each of the attribute ``owner``; an attribute's own are in the order of its content."""

    owner: Places
    lcn: Places
    length: Places
    described: Places  # of each attribute: clusters of its runs and holes, up to where they make no sense


def number_at(flat: Bytes, at: Places, width: int) -> Places:
    """The little-endian numbers of up to 8 bytes that stand at some places; what lies behind the batch reads as 0."""
    total = np.zeros(len(at), np.int64)
    for byte in range(width):
        inside = at + byte < len(flat)
        total |= np.where(inside, flat[np.where(inside, at + byte, 0)], 0).astype(np.int64) << 8 * byte
    return total


def fix_up(batch: Bytes, signature: bytes) -> Flags:
    """Undo the fix-ups of every row, in place; which rows have the signature and were written whole."""
    words = batch.view("<u2")
    pieces = batch.shape[1] // STANDARD_STRIDE
    table, count = words[:, 2].astype(np.int64), words[:, 3]
    sound: Flags = (batch[:, :4] == np.frombuffer(signature, np.uint8)).all(axis=1) & (count == pieces + 1)
    sound &= (table % 2 == 0) & (table >= 8) & (table + 2 * (pieces + 1) <= STANDARD_STRIDE - 2)
    rows = np.flatnonzero(sound)
    table = table[rows] // 2
    mark, whole = words[rows, table], np.ones(len(rows), bool)
    for piece in range(pieces):
        last = (piece + 1) * STANDARD_STRIDE // 2 - 1
        whole &= words[rows, last] == mark
        words[rows, last] = words[rows, table + 1 + piece]
    sound[rows] = whole
    return sound


def attributes(batch: Bytes, rows: Places) -> Attributes:
    """The attributes of some rows of a batch of file records."""
    size, flat = batch.shape[1], batch.reshape(-1)
    words, longs = flat.view("<u2"), flat.view("<u4")
    at = rows * size + words[rows * size // 2 + 10]  # first_attribute_offset
    stop = rows * size + np.minimum(longs[rows * size // 4 + 6], size)  # first_free_byte
    found: list[tuple[Places, Places, Places, Places]] = []
    going = (at % 8 == 0) & (at + _SHORTEST <= stop)
    while going.any():
        rows, at, stop = rows[going], at[going], stop[going]
        kind, length = longs[at // 4].astype(np.int64), longs[at // 4 + 1].astype(np.int64)
        sound = (kind != END) & (length >= _SHORTEST) & (length % 8 == 0) & (at + length <= stop)
        rows, at, stop, length = rows[sound], at[sound], stop[sound], length[sound]
        found.append((rows, at, at + length, kind[sound]))
        at = at + length
        going = at + _SHORTEST <= stop
    columns = [np.concatenate([np.zeros(0, np.int64), *column]) for column in zip(*found, strict=True)]
    row, begin, end, kind = columns or [np.zeros(0, np.int64)] * 4
    order = np.argsort(begin, kind="stable")  # a record's attributes together
    begin = begin[order]
    return Attributes(row[order], begin, end[order], kind[order], flat[begin + 8] == _NONRESIDENT)


def runs(flat: Bytes, of: Attributes, clusters: int) -> Runs:
    """The runs of attributes that have clusters, but for holes."""
    places = number_at(flat, of.at + 32, 2)  # mapping_pairs_offset
    at, stop = of.at + places, of.end
    owner, lcn = np.arange(len(at)), np.zeros(len(at), np.int64)
    described = np.zeros(len(at), np.int64)
    found: list[tuple[Places, Places, Places]] = []
    going = (places >= AttributeRecordHeader.SIZE + NonresidentForm.SIZE) & (at < stop)
    while going.any():
        owner, at, stop, lcn = owner[going], at[going], stop[going], lcn[going]
        head = flat[at].astype(np.int64)
        low, high = head & 15, head >> 4
        sound = (low > 0) & (low <= 8) & (high <= 8) & (at + 1 + low + high <= stop)
        owner, at, stop, lcn, low, high = owner[sound], at[sound], stop[sound], lcn[sound], low[sound], high[sound]
        length = _signed(flat, at + 1, low)
        lcn = lcn + _signed(flat, at + 1 + low, high)
        inside = (length > 0) & ((high == 0) | (lcn >= 0) & (length <= clusters) & (lcn <= clusters - length))
        described[owner[inside]] += length[inside]
        kept = inside & (high > 0)
        found.append((owner[kept], lcn[kept], length[kept]))
        at = at + 1 + low + high
        going = inside & (at < stop)
    columns = [np.concatenate([np.zeros(0, np.int64), *column]) for column in zip(*found, strict=True)]
    whose, first, length = columns or [np.zeros(0, np.int64)] * 3
    order = np.argsort(whose, kind="stable")
    return Runs(whose[order], first[order], length[order], described)


def _signed(flat: Bytes, at: Places, width: Places) -> Places:
    """Signed numbers of 0 to 8 bytes each."""
    raw = flat[np.minimum(at[:, None] + np.arange(8), len(flat) - 1)].view("<i8")[:, 0]
    shift = 64 - 8 * np.maximum(width, 1)
    return np.where(width > 0, raw << shift >> shift, 0)


def entries(flat: Bytes, at: Places, stop: Places) -> Places:
    """Where the entries with a name begin, of index nodes whose entries begin at ``at`` and end before ``stop``."""
    longs = flat.view("<u8")
    found = [np.zeros(0, np.int64)]
    going = (at % 8 == 0) & (at >= 0) & (at + IndexEntry.SIZE <= stop) & (stop <= len(flat))
    while going.any():
        at, stop = at[going], stop[going]
        head = longs[at // 8 + 1].astype(np.int64)
        length, flags = head & 0xFFFF, head >> 32 & 0xFFFF
        sound = (length >= IndexEntry.SIZE) & (length % 8 == 0) & (at + length <= stop) & (flags & _LAST == 0)
        at, stop, length = at[sound], stop[sound], length[sound]
        found.append(at[length >= IndexEntry.SIZE + FileName.SIZE])
        at = at + length
        going = at + IndexEntry.SIZE <= stop
    return np.concatenate(found)
