"""The inodes of ext2, ext3 and ext4: which of them have a block in lost ranges, and where folders keep their names.

    inode    0x00 mode   0x1A links   0x20 flags   0x28 i_block, 60 bytes   0x68 i_file_acl   0x7C checksum
    i_block  extents     header | 4 entries         leaf entry: first block, length; index entry: the next node
             block map   12 blocks | 1 | 1 | 1      a block of block numbers, of such blocks, and of those
             neither     short symlinks and inline data, which stand in the inode, and devices

Tables are read in windows, and all inodes of a window are looked at together.  Blocks of extent trees and of block
numbers are gathered and read in the order of the disk, a level at a time; each level is one deep less, so that
circles end, and a block that several inodes claim is followed for one of them.

Written from "ext4 Data Structures and Algorithms" (Linux documentation, filesystems/ext4), sections "Index Nodes",
"The Contents of inode.i_block" and "Extended Attributes".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import InvalidImage
from ferrotype.filesystems.ext_checksums import CRC32C, Bytes, crc
from ferrotype.filesystems.ext_groups import Descriptors, Table, read_rows
from ferrotype.filesystems.ext_records import Blocks, Incompat, RoCompat
from ferrotype.filesystems.remains import NOWHERE, Intact, Ranges, Remains
from ferrotype.units import MiB

__all__ = ["MOST_NODES", "Found", "Numbers", "Walked", "in_lost_slots", "inode_places", "search", "walk"]

Flags = NDArray[np.bool_]

_BAD_BLOCKS: Final = 1  # its inode has no mode and no links
_FOLDER, _REGULAR, _SYMLINK = 4, 8, 10  # i_mode, upper four bits
_KINDS: Final = (1, 2, _FOLDER, 6, _REGULAR, _SYMLINK, 12)  # with pipes, devices and sockets
_FIRST_INODE: Final = 11  # of revision 0; those below are reserved
_EXTENTS, _INLINE = 0x80000, 0x10000000  # i_flags
_MAGIC: Final = 0xF30A  # eh_magic
_MOST_DEPTH: Final = 5  # eh_depth
_UNWRITTEN: Final = 1 << 15  # ee_len above it: reserved, reads as zeros
_MAP: Final = 0x10  # added to the level of a block of block numbers, to tell it from one of an extent tree

_TABLE_WINDOW: Final = 8 * MiB  # of inodes looked at together
_NODE_WINDOW: Final = 4 * MiB
_MANY_NODES: Final = 1 << 20  # gathered before they are followed
MOST_NODES: Final = 1 << 23  # blocks of trees, and of folders, that are read; a full ext3 of 16 TiB has half as many
_MOST_RUNS: Final = 1 << 24  # runs of blocks that are kept for all folders together

_FIELDS: Final = {
    "i_mode": ("<u2", 0x00),
    "i_size_lo": ("<u4", 0x04),
    "i_dtime": ("<u4", 0x14),
    "i_links_count": ("<u2", 0x1A),
    "i_flags": ("<u4", 0x20),
    "i_block": ("V60", 0x28),
    "i_file_acl_lo": ("<u4", 0x68),
    "i_obso_faddr": ("<u4", 0x70),
    "i_file_acl_high": ("<u2", 0x76),
}


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """Inode numbers in intervals: lows[i] up to highs[i], both ascending."""

    lows: Blocks
    highs: Blocks

    def hold(self, numbers: Blocks) -> Flags:
        """Which of the numbers lie in an interval."""
        if not len(self.highs):
            return np.zeros(len(numbers), np.bool_)
        at = np.minimum(np.searchsorted(self.highs, numbers, "right"), len(self.highs) - 1)
        result: Flags = (self.lows[at] <= numbers) & (numbers < self.highs[at])
        return result


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a search of the inodes found; numbers ascend."""

    hit: Blocks  # inodes that have a block in a lost range, or lie in one themselves
    folders: Blocks  # inodes of all folders
    runs: NDArray[np.int64]  # (folder, first block, end) of the blocks that hold their names
    inline: Blocks  # folders that hold their names in the inode
    whole: bool  # whether all was looked at that had to be: no more than a file system that makes sense can have


def search(descriptors: Descriptors, table: Table, ranges: Ranges, remains: Remains, *, clean: bool) -> Found:
    """Look at every inode in use.  ``clean``: the inode bitmaps are up to date, and say which blocks to leave out."""
    lost = in_lost_slots(descriptors, table, ranges)
    content = _Content(descriptors, ranges, remains)
    for numbers, raw in _inodes(descriptors, table, ranges, remains, clean=clean):
        stale = table.stale[(numbers - 1) // descriptors.sb.s_inodes_per_group]
        content.look(numbers, raw, lost.hold(numbers), stale)
    content.follow()
    runs = np.concatenate([np.zeros((0, 3), np.int64), *content.runs])
    return Found(_unique(content.hit), _unique(content.folders), runs, _unique(content.inline), content.whole)


@dataclass(frozen=True, slots=True, eq=False)
class Walked:
    """Some of the blocks that inodes in use occupy, firsts[i] up to ends[i], and how many inodes were looked at."""

    firsts: Blocks
    ends: Blocks
    inodes: int


def walk(descriptors: Descriptors, table: Table, remains: Intact) -> Iterator[Walked]:
    """The blocks of every inode in use, its trees and attributes among them; neither kind of bitmap is looked at.

    Raises InvalidImage for whatever cannot be followed: an inode, an extent or a node that makes no sense, another
    number of inodes than a group's descriptor knows of, and with checksums an inode that contradicts its own.
    """
    sb = descriptors.sb
    content = _Content(descriptors, NOWHERE, remains, strict=True)
    in_use = np.zeros(descriptors.geo.groups, np.int64)
    for numbers, raw in _inodes(descriptors, table, NOWHERE, remains, clean=False):
        used = numbers[content.look_strictly(numbers, raw)]
        np.add.at(in_use, (used - 1) // sb.s_inodes_per_group, 1)
        yield content.taken(len(used))
    content.follow()
    yield content.taken(0)
    wrong = sb.s_inodes_per_group - in_use != table.free_inodes
    if wrong.any():
        group = int(wrong.argmax())
        raise InvalidImage(
            f"the inode table of group {group} holds {in_use[group]} inodes in use,"
            f" its descriptor knows of {sb.s_inodes_per_group - table.free_inodes[group]}"
        )


def _unique(parts: list[Blocks]) -> Blocks:
    return np.unique(np.concatenate([np.zeros(0, np.int64), *parts]))


def in_lost_slots(descriptors: Descriptors, table: Table, ranges: Ranges) -> Numbers:
    """The inodes whose place is lost: in the inode tables, or all of a group whose descriptor is."""
    geo, sb = descriptors.geo, descriptors.sb
    groups = np.flatnonzero(table.sound)
    starts = table.inode_table[groups] * geo.block_size
    ends = starts + sb.s_inodes_per_group * descriptors.inode_size
    low = np.searchsorted(ranges.ends, starts, "right")
    count = np.maximum(np.searchsorted(ranges.starts, ends, "left") - low, 0)
    which = np.repeat(np.arange(len(groups)), count)
    of = np.repeat(low - np.cumsum(count) + count, count) + np.arange(len(which))
    base = groups[which] * sb.s_inodes_per_group + 1
    first = np.maximum(ranges.starts[of] - starts[which], 0) // descriptors.inode_size
    last = -(-(np.minimum(ranges.ends[of], ends[which]) - starts[which]) // descriptors.inode_size)
    whole = np.flatnonzero(~table.sound & table.lost) * sb.s_inodes_per_group + 1
    lows = np.concatenate([base + first, whole])
    highs = np.concatenate([base + last, whole + sb.s_inodes_per_group])
    order = np.argsort(lows, kind="stable")
    return Numbers(lows[order], highs[order])


def inode_places(descriptors: Descriptors, table: Table, numbers: Blocks) -> Blocks:
    """The byte of the volume at which each inode stands."""
    group, slot = np.divmod(numbers - 1, descriptors.sb.s_inodes_per_group)
    places: Blocks = table.inode_table[group] * descriptors.geo.block_size + slot * descriptors.inode_size
    return places


# ---------------------------------------------------------------------- inode tables


def _inodes(
    descriptors: Descriptors, table: Table, ranges: Ranges, remains: Remains, *, clean: bool
) -> Iterator[tuple[Blocks, Bytes]]:
    """Windows of inodes, their numbers and their bytes; without most of those that are not in use."""
    geo, size, per_group = descriptors.geo, descriptors.inode_size, descriptors.sb.s_inodes_per_group
    per_block = geo.block_size // size
    step = max(1, _TABLE_WINDOW // (geo.block_size + geo.table_blocks * per_block))
    for start in range(0, geo.groups, step):
        window = np.arange(start, min(start + step, geo.groups))
        window = window[table.sound[window] & (table.slots[window] > 0)]
        group, block = np.nonzero(_busy(descriptors, table, ranges, remains, window, clean=clean))
        places = (table.inode_table[window[group]] + block) * geo.block_size
        first = window[group] * per_group + block * per_block + 1
        last = (window[group] + 1) * per_group  # the last block of a table may be longer than the group needs
        many = max(1, _TABLE_WINDOW // geo.block_size)
        for at in range(0, len(places), many):
            part = slice(at, at + many)
            raw = read_rows(remains, places[part], geo.block_size).reshape(-1, size)
            numbers = (first[part, np.newaxis] + np.arange(per_block)).reshape(-1)
            inside = numbers <= np.repeat(last[part], per_block)
            yield numbers[inside], raw[inside]


def _busy(
    descriptors: Descriptors, table: Table, ranges: Ranges, remains: Remains, window: Blocks, *, clean: bool
) -> Flags:
    """Which blocks of the inode tables of some groups may hold inodes in use, a row a group."""
    geo, per_group = descriptors.geo, descriptors.sb.s_inodes_per_group
    per_block = geo.block_size // descriptors.inode_size
    blocks = -(-table.slots[window] // per_block)
    busy: Flags = np.less(np.arange(geo.table_blocks), blocks[:, np.newaxis])
    if not clean or not len(window):
        return busy
    places = table.inode_bitmap[window] * geo.block_size
    packed = read_rows(remains, places, geo.block_size)
    bits = np.unpackbits(packed, axis=1, count=per_group, bitorder="little")
    free = per_group - bits.sum(axis=1, dtype=np.int64)
    proven = free == table.free_inodes[window]
    trusted = ~ranges.touch(places, places + geo.block_size) & proven
    padded = np.zeros((len(window), geo.table_blocks * per_block), np.bool_)
    padded[:, :per_group] = bits
    in_use: Flags = np.logical_or.reduce(padded.reshape(len(window), geo.table_blocks, per_block), axis=2)
    needed: Flags = busy & (in_use | ~trusted[:, np.newaxis])
    return needed


class _Content:
    """Takes what inodes occupy, and keeps which of them are hit and where folders lie.

    A ``strict`` one keeps the blocks themselves, and raises InvalidImage for what another leaves out.
    """

    def __init__(self, descriptors: Descriptors, ranges: Ranges, remains: Remains, *, strict: bool = False) -> None:
        self._strict = strict
        self._taken: list[tuple[Blocks, Blocks]] = []
        self._descriptors, self._ranges, self._remains = descriptors, ranges, remains
        self._size = descriptors.geo.block_size
        size = descriptors.inode_size
        formats, offsets = zip(*_FIELDS.values(), strict=True)
        self._dtype = np.dtype({"names": list(_FIELDS), "formats": formats, "offsets": offsets, "itemsize": size})
        self._nodes: list[NDArray[np.int64]] = []  # (inode, whether it is a folder, block, level) to be followed
        self._waiting, self._left, self._runs_left = 0, MOST_NODES, _MOST_RUNS
        self.hit: list[Blocks] = []
        self.folders: list[Blocks] = []
        self.inline: list[Blocks] = []
        self.runs: list[NDArray[np.int64]] = []

    @property
    def whole(self) -> bool:
        return self._left > 0 and self._runs_left > 0

    def look(self, numbers: Blocks, raw: Bytes, lost: Flags, stale: Flags) -> None:
        """Take a window of inodes.  Those in ``lost`` places are hit.

        What stands there has to prove itself, and so it has where the descriptor is ``stale``: it may never have been
        written.
        """
        inodes = np.ascontiguousarray(raw).view(self._dtype).reshape(-1)
        used = (inodes["i_mode"] != 0) & (inodes["i_links_count"] != 0)
        used |= (numbers == _BAD_BLOCKS) & (inodes["i_block"] != np.void(60))
        doubtful = np.flatnonzero(used & (lost | stale))
        used[doubtful[self._contradict(numbers[doubtful], raw[doubtful])]] = False
        self.hit.append(numbers[used & lost])
        self._take_inodes(numbers[used], inodes[used])
        if self._waiting > _MANY_NODES:
            self.follow()

    def look_strictly(self, numbers: Blocks, raw: Bytes) -> Flags:
        """Take a window of inodes; which of them are in use: those with links, and the reserved ones."""
        inodes = np.ascontiguousarray(raw).view(self._dtype).reshape(-1)
        reserved = numbers < (self._descriptors.sb.s_first_ino if self._descriptors.sb.s_rev_level else _FIRST_INODE)
        used: Flags = (inodes["i_links_count"] != 0) | reserved
        some = np.flatnonzero(used & ((inodes["i_links_count"] != 0) | (inodes["i_block"] != np.void(60))))
        kind = inodes["i_mode"][some] >> 12
        self._object(numbers[some], ~reserved[some] & ~np.isin(kind, _KINDS), "it is of no kind that inodes are of")
        if self._descriptors.sb.s_feature_ro_compat & RoCompat.METADATA_CSUM:
            checked = some[inodes["i_links_count"][some] != 0]
            self._object(numbers[checked], self._contradict(numbers[checked], raw[checked]), "its checksum is wrong")
        self._take_inodes(numbers[some], inodes[some])
        if self._waiting > _MANY_NODES:
            self.follow()
        return used

    def taken(self, inodes: int) -> Walked:
        """What a strict one took since it was last asked."""
        nothing = np.zeros(0, np.int64)
        columns = zip((nothing, nothing), *self._taken, strict=True)
        firsts, ends = (np.concatenate(column) for column in columns)
        self._taken, self.folders, self.inline = [], [], []
        return Walked(firsts, ends, inodes)

    def _object(self, numbers: Blocks, wrong: Flags, why: str) -> None:
        """What a strict one does not leave out in silence."""
        if self._strict and wrong.any():
            raise InvalidImage(f"inode {int(numbers[wrong.argmax()])} cannot be followed: {why}")

    def _take_inodes(self, numbers: Blocks, inodes: NDArray[Any]) -> None:
        kind, flags = inodes["i_mode"] >> 12, inodes["i_flags"]
        folder, inline, extents = kind == _FOLDER, flags & _INLINE != 0, flags & _EXTENTS != 0
        self.folders.append(numbers[folder])
        self.inline.append(numbers[folder & inline])
        acl = inodes["i_file_acl_lo"].astype(np.int64)
        if self._descriptors.sb.s_feature_incompat & Incompat.BIT64:
            acl |= inodes["i_file_acl_high"].astype(np.int64) << 32
        some = acl != 0
        self._take(numbers[some], np.zeros(int(some.sum()), np.bool_), acl[some], acl[some] + 1)
        short = (kind == _SYMLINK) & ~extents & (inodes["i_size_lo"] < 60)
        mapped = np.isin(kind, (_FOLDER, _REGULAR, _SYMLINK)) & ~inline & ~short | (numbers == _BAD_BLOCKS)
        mapped |= (kind == 0) & self._strict  # a reserved inode's, or it was objected to
        content = np.ascontiguousarray(inodes["i_block"]).view(np.uint8).reshape(-1, 60)
        for some, take in ((mapped & extents, self._take_extents), (mapped & ~extents, self._take_map)):
            take(numbers[some], folder[some], content[some])

    def _contradict(self, numbers: Blocks, raw: Bytes) -> Flags:
        """Which inodes do not have the checksum that they name, or without checksums, what no inode in use has."""
        if not self._descriptors.sb.s_feature_ro_compat & RoCompat.METADATA_CSUM:
            inodes = np.ascontiguousarray(raw).view(self._dtype).reshape(-1)
            outside = np.ascontiguousarray(raw[:, 0x28:0x64]).view("<u4") >= self._descriptors.geo.blocks
            mapped = np.isin(inodes["i_mode"] >> 12, (_FOLDER, _REGULAR)) & (
                inodes["i_flags"] & (_EXTENTS | _INLINE) == 0
            )
            stray: Flags = (inodes["i_dtime"] != 0) | (inodes["i_obso_faddr"] != 0)
            stray |= mapped & np.logical_or.reduce(outside, axis=1)
            return stray
        raw, generation = raw.copy(), raw[:, 0x64:0x68].copy()
        stored = raw[:, 0x7C:0x7E].copy().view("<u2")[:, 0].astype(np.uint32)
        mask = np.full(len(raw), 0xFFFF, np.uint32)
        raw[:, 0x7C:0x7E] = 0
        if self._descriptors.inode_size > 128:
            wide = raw[:, 0x80:0x82].copy().view("<u2")[:, 0] >= 4  # i_extra_isize
            stored[wide] |= raw[wide, 0x82:0x84].copy().view("<u2")[:, 0].astype(np.uint32) << 16
            mask[wide] = 0xFFFFFFFF
            raw[wide, 0x82:0x84] = 0
        named = numbers.astype("<u4").view(np.uint8).reshape(-1, 4)
        wrong: Flags = crc(CRC32C, self._descriptors.seed, np.hstack([named, generation, raw])) & mask != stored
        return wrong

    # ------------------------------------------------------------------ what i_block says

    def _take(self, numbers: Blocks, folder: Flags, first: Blocks, end: Blocks) -> None:
        """Blocks of files and folders; those that the file system cannot have are left out."""
        sound = (first > 0) & (first < end) & (end <= self._descriptors.geo.blocks)
        if self._strict:
            self._object(numbers, ~sound, "it has blocks that the file system does not have")
            self._taken.append((first, end))
            return
        hit = sound & self._ranges.touch(first * self._size, end * self._size)
        self.hit.append(np.unique(numbers[hit]))
        listed = np.flatnonzero(folder & sound)[: self._runs_left]
        self._runs_left -= len(listed)
        self.runs.append(np.column_stack([numbers[listed], first[listed], end[listed]]))

    def _take_extents(self, numbers: Blocks, folder: Flags, nodes: Bytes, level: int = -1) -> None:
        """Nodes of extent trees, in i_block or of a ``level`` that is known from the node above."""
        room = (nodes.shape[1] - 12) // 12
        header = np.ascontiguousarray(nodes[:, :8]).view("<u2")
        depth = header[:, 3].astype(np.int64)
        sound = (header[:, 0] == _MAGIC) & (header[:, 1] <= room)
        sound &= depth <= _MOST_DEPTH if level < 0 else depth == level
        self._object(numbers, ~sound, "its tree of extents is damaged")
        body = np.ascontiguousarray(nodes[:, 12 : 12 + room * 12]).view("<u4").reshape(-1, room, 3)
        row, column = np.nonzero((np.arange(room) < header[:, 1:2]) & sound[:, np.newaxis])
        entry = body[row, column].astype(np.int64)
        numbers, folder, depth = numbers[row], folder[row], depth[row]
        leaf, index = depth == 0, depth > 0
        length = entry[:, 1] & 0xFFFF
        length -= np.where(length > _UNWRITTEN, _UNWRITTEN, 0)
        first = entry[:, 2] | entry[:, 1] >> 16 << 32
        self._take(numbers[leaf], folder[leaf], first[leaf], (first + length)[leaf])
        below = entry[:, 1] | (entry[:, 2] & 0xFFFF) << 32
        self._wait(numbers[index], folder[index], below[index], depth[index] - 1)

    def _take_map(self, numbers: Blocks, folder: Flags, content: Bytes) -> None:
        """The block maps of ext2 and ext3."""
        blocks = content.view("<u4").astype(np.int64)
        self._take_pointers(numbers, folder, blocks[:, :12])
        row, column = np.nonzero(blocks[:, 12:])
        self._wait(numbers[row], folder[row], blocks[row, 12 + column], _MAP + 1 + column)

    def _take_pointers(self, numbers: Blocks, folder: Flags, blocks: Blocks) -> None:
        row, column = np.nonzero(blocks)
        first = blocks[row, column].astype(np.int64)
        self._take(numbers[row], folder[row], first, first + 1)

    # ------------------------------------------------------------------ nodes in blocks of their own

    def _wait(self, numbers: Blocks, folder: Flags, blocks: Blocks, level: Blocks) -> None:
        nodes = np.column_stack([numbers, folder, blocks, level])
        sound = (blocks > 0) & (blocks < self._descriptors.geo.blocks)
        self._object(numbers, ~sound, "a node of its tree stands outside the file system")
        room = max(self._left - self._waiting, 0)
        self._object(numbers, np.arange(len(numbers)) >= room, "the file system has more trees than can be believed")
        nodes = nodes[sound][:room]
        self._nodes.append(nodes)
        self._waiting += len(nodes)

    def follow(self) -> None:
        """Read all nodes that wait, and those that they lead to."""
        while self._waiting:
            nodes = np.concatenate(self._nodes)
            self._nodes, self._waiting = [], 0
            own = nodes[:, 2] * self._size
            if self._strict:
                self._taken.append((nodes[:, 2], nodes[:, 2] + 1))
            self.hit.append(np.unique(nodes[self._ranges.touch(own, own + self._size), 0]))
            nodes = nodes[np.unique(nodes[:, 2] << 5 | nodes[:, 3], return_index=True)[1]]
            self._left -= len(nodes)
            for level in np.unique(nodes[:, 3]).tolist():
                self._read_level(nodes[nodes[:, 3] == level], level)

    def _read_level(self, nodes: NDArray[np.int64], level: int) -> None:
        step = max(1, _NODE_WINDOW // self._size)
        for at in range(0, len(nodes), step):
            numbers, folder, blocks = (
                nodes[at : at + step, 0],
                nodes[at : at + step, 1] != 0,
                nodes[at : at + step, 2],
            )
            rows = read_rows(self._remains, blocks * self._size, self._size)
            if level < _MAP:
                self._take_extents(numbers, folder, rows, level)
            elif level == _MAP + 1:
                self._take_pointers(numbers, folder, rows.view("<u4"))
            else:
                row, column = np.nonzero(rows.view("<u4"))
                below = rows.view("<u4")[row, column].astype(np.int64)
                self._wait(numbers[row], folder[row], below, np.full(len(row), level - 1, np.int64))
