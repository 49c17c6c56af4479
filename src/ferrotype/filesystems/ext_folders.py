"""The folders of ext2, ext3 and ext4: under which names inodes stand.

    block    entry | entry | ... | entry that reaches to the end, or the checksum's     one that is free names inode 0
    entry    0 inode   4 rec_len   6 name_len   7 file_type   8 name      (without FILETYPE name_len has both bytes)
    inline   i_block: 4 bytes inode of the folder above | entries, 56 bytes; more in the attribute system.data

The blocks of a hash tree look like blocks with free entries, so they need nothing.  All blocks of a window step from
entry to entry together.  Of each entry that matters only the place of its name is kept; names are read last, and
only those that a path needs.

Written from "ext4 Data Structures and Algorithms" (Linux documentation, filesystems/ext4), sections "Directory
Entries", "Inline Data" and "Extended Attributes".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.filesystems.ext_checksums import Bytes
from ferrotype.filesystems.ext_groups import Descriptors, Table, read_rows
from ferrotype.filesystems.ext_inodes import MOST_NODES, Found, Numbers, inode_places
from ferrotype.filesystems.ext_records import Blocks, Incompat
from ferrotype.filesystems.remains import Ranges, Remains, printable
from ferrotype.units import MiB

__all__ = ["ROOT", "Links", "names"]

Links = dict[int, tuple[int, str]]  # inode -> (folder that it stands in, its name there)

ROOT: Final = 2
_WINDOW: Final = 4 * MiB  # of folders looked at together
_SHORTEST: Final = 8  # bytes of an entry before its name
_INLINE_AT, _INLINE_END = 0x2C, 0x64  # of the entries in an inode: i_block but for its first four bytes
_OLD_INODE: Final = 128
_ATTRIBUTES: Final = (0xEA020000).to_bytes(4, "little")  # h_magic of the attributes in an inode
_SYSTEM, _DATA = 7, b"data"  # e_name_index and e_name of the attribute that holds the rest of inline data


@dataclass(frozen=True, slots=True, eq=False)
class _Entries:
    """Entries of folders: the inode each names, its folder, and where on the volume its name stands."""

    inode: Blocks
    folder: Blocks
    place: Blocks
    length: Blocks

    def those(self, some: NDArray[np.bool_] | Blocks) -> _Entries:
        return _Entries(self.inode[some], self.folder[some], self.place[some], self.length[some])


def names(
    descriptors: Descriptors, table: Table, found: Found, lost: Numbers, ranges: Ranges, remains: Remains
) -> tuple[Blocks, Links]:
    """The inodes in lost places that folders name; and names for those, for all that are hit, and all on the way."""
    pieces = []
    for entries in (*_in_blocks(descriptors, found, remains), *_in_inodes(descriptors, table, found, remains)):
        inside = (entries.inode > 0) & (entries.inode <= descriptors.sb.s_inodes_count)
        wanted = _among(found.hit, entries.inode) | _among(found.folders, entries.inode) | lost.hold(entries.inode)
        pieces.append(entries.those(inside & wanted))
    nothing = np.zeros(0, np.int64)
    fields = ("inode", "folder", "place", "length")
    kept = _Entries(*(np.concatenate([nothing, *(getattr(piece, field) for piece in pieces)]) for field in fields))
    doubtful = ranges.touch(kept.place - _SHORTEST, kept.place + kept.length)
    kept = kept.those(np.argsort(doubtful, kind="stable"))
    kept = kept.those(np.unique(kept.inode, return_index=True)[1])  # one name is enough
    missing = kept.inode[lost.hold(kept.inode)]
    return missing, _read_names(descriptors, kept.those(_on_the_way(kept, found, missing)), remains)


def _among(ascending: Blocks, numbers: Blocks) -> NDArray[np.bool_]:
    if not len(ascending):
        return np.zeros(len(numbers), np.bool_)
    at = np.minimum(np.searchsorted(ascending, numbers), len(ascending) - 1)
    result: NDArray[np.bool_] = ascending[at] == numbers
    return result


# ---------------------------------------------------------------------- entries


def _in_blocks(descriptors: Descriptors, found: Found, remains: Remains) -> Iterator[_Entries]:
    """What stands in blocks of their own; a block that several folders claim is read for the first of them."""
    size = descriptors.geo.block_size
    runs = found.runs[np.argsort(found.runs[:, 1], kind="stable")]
    if not len(runs):
        return
    folder, first, end = runs.T
    covered = np.concatenate([[0], np.maximum.accumulate(end)[:-1]])
    first = np.maximum(first, covered)
    length = np.maximum(end - first, 0)
    until = np.cumsum(length)
    step = max(1, _WINDOW // size)
    for at in range(0, min(int(until[-1]), MOST_NODES), step):
        number = np.arange(at, min(at + step, int(until[-1])))
        run = np.searchsorted(until, number, "right")
        places = (first[run] + number - (until[run] - length[run])) * size
        yield _entries(descriptors, folder[run], places, read_rows(remains, places, size), None)


def _in_inodes(descriptors: Descriptors, table: Table, found: Found, remains: Remains) -> Iterator[_Entries]:
    """What stands in inodes: inline data."""
    size, step = descriptors.inode_size, max(1, _WINDOW // descriptors.geo.block_size)
    for at in range(0, len(found.inline), step):
        folders = found.inline[at : at + step]
        places = inode_places(descriptors, table, folders)
        rows = read_rows(remains, places, size)
        head = np.ascontiguousarray(rows[:, _INLINE_AT:_INLINE_END])
        yield _entries(descriptors, folders, places + _INLINE_AT, head, None)
        rest = [_rest_of_inline(row.tobytes()) for row in rows]
        ends = np.array([end for _, end in rest], np.int64)
        shift = np.array([start for start, _ in rest], np.int64)
        column = shift[:, np.newaxis] + np.arange(size)
        tail = np.where(column < size, rows[np.arange(len(rows))[:, np.newaxis], np.minimum(column, size - 1)], 0)
        yield _entries(descriptors, folders, places + shift, tail, ends - shift)


def _rest_of_inline(inode: bytes) -> tuple[int, int]:
    """Where in the inode the value of the attribute system.data stands, (0, 0) where it has none."""
    start = _OLD_INODE + int.from_bytes(inode[_OLD_INODE : _OLD_INODE + 2], "little")
    if inode[start : start + 4] != _ATTRIBUTES:
        return 0, 0
    start += 4
    at = start
    while at + 16 <= len(inode) and inode[at : at + 4] != bytes(4):
        length, index = inode[at], inode[at + 1]
        if (index, inode[at + 16 : at + 16 + length]) == (_SYSTEM, _DATA):
            value = start + int.from_bytes(inode[at + 2 : at + 4], "little")
            end = value + int.from_bytes(inode[at + 8 : at + 12], "little")
            return (value, end) if value <= end <= len(inode) else (0, 0)
        at += 16 + (length + 3) // 4 * 4
    return 0, 0


def _entries(
    descriptors: Descriptors, folders: Blocks, places: Blocks, rows: Bytes, limits: Blocks | None
) -> _Entries:
    """The entries in rows of bytes, up to ``limits``; a row ends where they make no sense.  Without "." and ".."."""
    width = rows.shape[1]
    flat = np.append(np.ascontiguousarray(rows).reshape(-1), np.zeros(_SHORTEST, np.uint8))
    row = np.arange(len(rows))
    limit = np.full(len(rows), width, np.int64) if limits is None else limits
    typed = bool(descriptors.sb.s_feature_incompat & Incompat.FILETYPE)
    at = np.zeros(len(rows), np.int64)
    taken: list[_Entries] = []
    for _ in range(width // _SHORTEST):
        going = at + _SHORTEST <= limit
        row, at, limit = row[going], at[going], limit[going]
        if not len(row):
            break
        head = flat[(row * width + at)[:, np.newaxis] + np.arange(_SHORTEST)]
        inode = head[:, :4].copy().view("<u4")[:, 0].astype(np.int64)
        step, name = head[:, 4:].copy().view("<u2").T.astype(np.int64)
        if width > 0xFFFC:  # lengths of 64 KiB and more in 16 bits
            step = np.where((step == 0xFFFF) | (step == 0), width, step & 0xFFFC)
        if typed:
            name &= 0xFF
        sound = (
            (step >= _SHORTEST + name) & (step % 4 == 0) & (step > _SHORTEST) & (at + step <= limit) & (name <= 255)
        )
        row, at, limit, inode, step, name = (part[sound] for part in (row, at, limit, inode, step, name))
        start = row * width + at + _SHORTEST
        dots = (
            (name > 0)
            & (flat[start] == ord("."))
            & ((name == 1) | (name == 2) & (flat[np.minimum(start + 1, len(flat) - 1)] == ord(".")))
        )
        real = (inode > 0) & (name > 0) & ~dots
        taken.append(_Entries(inode[real], folders[row[real]], (places[row] + at + _SHORTEST)[real], name[real]))
        at = at + step
    nothing = np.zeros(0, np.int64)
    return _Entries(*(np.concatenate([nothing, *(getattr(t, field) for t in taken)]) for field in _Entries.__slots__))


# ---------------------------------------------------------------------- names


def _on_the_way(entries: _Entries, found: Found, missing: Blocks) -> Blocks:
    """The entries, by their place in ``entries``, that stand for what is hit or missing, and for folders above it."""
    level = np.flatnonzero(_among(found.hit, entries.inode) | _among(missing, entries.inode))
    needed = np.zeros(len(entries.inode), np.bool_)
    while len(level):
        needed[level] = True
        above = np.unique(entries.folder[level])
        at = np.searchsorted(entries.inode, above)
        level = at[_among(entries.inode, above)]
        level = level[~needed[level]]
    return np.flatnonzero(needed)


def _read_names(descriptors: Descriptors, entries: _Entries, remains: Remains) -> Links:
    """Names from the disk; one with a slash or a zero byte is no name."""
    links: Links = {}
    size = descriptors.geo.block_size
    order = np.argsort(entries.place, kind="stable")
    step = max(1, _WINDOW // size)
    for at in range(0, len(order), step):
        part = entries.those(order[at : at + step])
        blocks, of = np.unique(part.place // size, return_inverse=True)
        flat = read_rows(remains, blocks * size, size).tobytes()
        starts = of * size + part.place % size
        for inode, folder, start, length in zip(
            part.inode.tolist(), part.folder.tolist(), starts.tolist(), part.length.tolist(), strict=True
        ):
            name = flat[start : start + length]
            if b"/" not in name and b"\0" not in name:
                links[inode] = folder, printable(name.decode("utf-8", "backslashreplace"))
    return links
