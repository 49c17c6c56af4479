"""Group descriptors of ext2, ext3 and ext4: where they and their copies lie, what they say, and their checksums.

    without meta_bg   superblock | descriptors of all groups, one block behind the other       and so in each copy
    with meta_bg      one block describes a run of groups; it stands in the run's first group, behind the superblock
                      if there is one, and again in the second and in the last group of the run

Written from "ext4 Data Structures and Algorithms" (Linux documentation, filesystems/ext4), sections "Block Group
Descriptors", "Meta Block Groups" and "Checksums".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read
from ferrotype.errors import ReadError
from ferrotype.filesystems.ext_checksums import CRC16, CRC32C, LARGE, SMALL, Bytes, Checksums, crc, row
from ferrotype.filesystems.ext_records import (
    DESC_HI,
    DESC_LO,
    INODE_UNINIT,
    Blocks,
    Compat,
    Geometry,
    Incompat,
    RoCompat,
    Superblock,
)
from ferrotype.filesystems.remains import Ranges, Remains
from ferrotype.units import MiB

__all__ = ["Descriptors", "Table", "read_rows", "read_table"]

_WINDOW: Final = 4 * MiB  # bytes read in one go
_ASKED: Final = 4  # copies of the superblock that are asked whether it is alive
_MOST_COPIES: Final = 16  # of a descriptor block that are looked for; without sparse_super every group has one


@dataclass(frozen=True, slots=True)
class Descriptors:
    """How a file system's descriptors are laid out and protected."""

    sb: Superblock
    geo: Geometry

    @property
    def inode_size(self) -> int:
        return self.sb.s_inode_size if self.sb.s_rev_level else 128

    @property
    def per_block(self) -> int:
        return self.geo.block_size // self.geo.desc_size

    @property
    def has_flags(self) -> bool:
        """Whether bg_flags and bg_itable_unused mean anything: without checksums they do not."""
        return bool(self.sb.s_feature_ro_compat & (RoCompat.METADATA_CSUM | RoCompat.GDT_CSUM))

    @property
    def seed(self) -> Checksums:
        """The state that the crc32c of everything but the superblock begins with."""
        if self.sb.s_feature_incompat & Incompat.CSUM_SEED:
            return np.array([self.sb.s_checksum_seed], np.uint32)
        return crc(CRC32C, LARGE, row(self.sb.s_uuid))

    # ------------------------------------------------------------------ where they lie

    def backup_groups(self) -> Blocks:
        """Groups that hold the superblock or a copy of it, ascending."""
        sb, count = self.sb, self.geo.groups
        if sb.s_feature_compat & Compat.SPARSE_SUPER2:
            named = {0, sb.s_backup_bgs_0, sb.s_backup_bgs_1}
        elif sb.s_feature_ro_compat & RoCompat.SPARSE_SUPER:
            named = {0, 1} | {base**power for base in (3, 5, 7) for power in range(1, 15)}
        else:
            return np.arange(count, dtype=np.int64)
        return np.array(sorted(group for group in named if group < count), np.int64)

    def vouched_for(self, source: Source) -> bool:
        """Whether a copy of the superblock is this file system's; one without copies needs none.

        What took the place of a file system writes over its copies; a leftover superblock is left alone with itself.
        """
        sb, size = self.sb, self.geo.block_size
        copies = [int(group) for group in self.backup_groups() if group][:_ASKED]
        places = [(sb.s_first_data_block + group * sb.s_blocks_per_group) * size for group in copies]
        read_whole = [at for at in places if at + Superblock.SIZE <= source.size]
        return not read_whole or any(self._is_copy(source, at) for at in read_whole)

    def _is_copy(self, source: Source, at: int) -> bool:
        try:
            raw = read(source, at, Superblock.SIZE)
        except ReadError:
            return True  # says nothing against it
        if not any(raw):
            return True  # nothing was written over it: images of the metadata alone leave copies out
        copy = Superblock.unpack(raw)
        return copy.s_magic == self.sb.s_magic and copy.s_uuid == self.sb.s_uuid

    @property
    def together(self) -> int:
        """How many of the descriptor blocks stand in one row behind the superblock."""
        if self.sb.s_feature_incompat & Incompat.META_BG:
            return min(self.sb.s_first_meta_bg, self.geo.desc_blocks)
        return self.geo.desc_blocks

    def blocks(self) -> Blocks:
        """The blocks of the primary descriptor table, in order."""
        index = np.arange(self.geo.desc_blocks, dtype=np.int64)
        return np.where(index < self.together, self.geo.super_block + 1 + index, self._apart(index, 0))

    def copies(self) -> Iterator[Blocks]:
        """For each descriptor block a block that holds a copy of it, or -1; then the next copies."""
        geo, index = self.geo, np.arange(self.geo.desc_blocks, dtype=np.int64)
        groups = self.backup_groups()
        for group in groups[groups > 0][:_MOST_COPIES].tolist():
            start = geo.first_block + group * geo.group_blocks
            yield np.where(index < self.together, start + 1 + index, -1)
        yield from self.apart()

    def apart(self) -> Iterator[Blocks]:
        """With meta_bg: the two copies of each descriptor block that stands apart, -1 where there is none."""
        index = np.arange(self.geo.desc_blocks, dtype=np.int64)
        if self.together < len(index):
            for step in (1, self.per_block - 1):
                yield np.where(index < self.together, -1, self._apart(index, step))

    def _apart(self, index: Blocks, step: int) -> Blocks:
        """With meta_bg: where descriptor blocks stand in the group that is ``step`` behind their run's first."""
        group = index * self.per_block + step
        there = self.geo.start_of(group) + np.isin(group, self.backup_groups())
        return np.where(group < self.geo.groups, there, -1)

    # ------------------------------------------------------------------ what they say

    def table(self, rows: Bytes) -> NDArray[Any]:
        """Descriptors, one a row of bytes, as a table of their fields."""
        fields = DESC_LO | (DESC_HI if self.geo.desc_size >= 64 else {})
        formats, offsets = zip(*fields.values(), strict=True)
        dtype = np.dtype(
            {"names": list(fields), "formats": formats, "offsets": offsets, "itemsize": self.geo.desc_size}
        )
        return np.ascontiguousarray(rows).view(dtype).reshape(-1)

    def joined(self, table: NDArray[Any], name: str, shift: int) -> Blocks:
        """A field together with its upper half, ``shift`` bits further up, where 64bit has added one."""
        value: Blocks = table[name + "_lo"].astype(np.int64)
        return value | table[name + "_hi"].astype(np.int64) << shift if self.geo.desc_size >= 64 else value

    def outside(self, place: Blocks, length: int) -> NDArray[np.bool_]:
        """Which of the pieces of metadata, ``length`` blocks each, do not lie in the file system."""
        outside: NDArray[np.bool_] = (place < self.geo.first_block) | (place > self.geo.blocks - length)
        return outside

    def wrong(self, rows: Bytes, groups: Blocks) -> NDArray[np.bool_]:
        """Which descriptors contradict their checksum; ``groups`` are their numbers."""
        number = groups.astype("<u4").view(np.uint8).reshape(-1, 4)
        if self.sb.s_feature_ro_compat & RoCompat.METADATA_CSUM:
            blank = np.zeros((len(rows), 2), np.uint8)
            state = crc(CRC32C, self.seed, np.hstack([number, rows[:, :0x1E], blank, rows[:, 0x20:]]))
        elif self.sb.s_feature_ro_compat & RoCompat.GDT_CSUM:
            uuid_state = crc(CRC16, SMALL, row(self.sb.s_uuid))
            state = crc(CRC16, uuid_state, np.hstack([number, rows[:, :0x1E], rows[:, 0x20:]]))
        else:
            return np.zeros(len(rows), np.bool_)
        stored: NDArray[np.uint16] = self.table(rows)["bg_checksum"]
        wrong: NDArray[np.bool_] = (state & 0xFFFF) != stored
        return wrong


# ---------------------------------------------------------------------- of damaged volumes


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """What can be known of the groups, an entry a group; where it is not ``sound``, nothing."""

    sound: NDArray[np.bool_]
    lost: NDArray[np.bool_]  # the group's descriptor lies in a lost range
    stale: NDArray[np.bool_]  # what is known comes from a copy
    block_bitmap: Blocks
    inode_bitmap: Blocks
    inode_table: Blocks
    slots: Blocks  # inodes from the start of the group that may be in use
    free_inodes: Blocks


def read_rows(remains: Remains, places: Blocks, width: int) -> Bytes:
    """``width`` bytes from each of the places, a row each, neighbours read together; zeros where they cannot be."""
    order = np.argsort(places, kind="stable")
    ascending = places[order]
    rows = np.empty((len(places), width), np.uint8)
    cuts = np.diff(ascending) != width
    cuts |= np.arange(1, len(places)) % max(1, _WINDOW // width) == 0
    edges = [0, *(np.flatnonzero(cuts) + 1).tolist(), len(places)] if len(places) else [0]
    for low, high in pairwise(edges):
        data = remains.read(int(ascending[low]), (high - low) * width)
        rows[order[low:high]] = np.frombuffer(data, np.uint8).reshape(-1, width)
    return rows


def read_table(descriptors: Descriptors, ranges: Ranges, remains: Remains) -> Table:
    """Every descriptor that is sound, from the first of its copies that is; tables in each other's place are not.

    Copies are written when the file system is made or resized: of them only the places of things are believed.
    What stands in a lost range is believed last, but for the primary table if there are checksums to prove it.
    """
    geo, sb, per_block = descriptors.geo, descriptors.sb, descriptors.per_block
    count = geo.groups
    flags, places = np.zeros((3, count), np.bool_), np.zeros((5, count), np.int64)
    table = Table(flags[0], flags[1], flags[2], places[0], places[1], places[2], places[3], places[4])
    primary = descriptors.blocks()

    def lost(blocks: Blocks) -> NDArray[np.bool_]:
        return ranges.touch(blocks * geo.block_size, (blocks + 1) * geo.block_size)

    table.lost[:] = np.repeat(lost(primary), per_block)[: geo.groups]
    _take_missing(
        descriptors, table, remains, primary if descriptors.has_flags else np.where(lost(primary), -1, primary)
    )
    for copy in descriptors.copies():
        _take_missing(descriptors, table, remains, np.where(lost(copy), -1, copy), stale=True)
    _take_missing(descriptors, table, remains, primary)
    order = np.flatnonzero(table.sound)
    order = order[np.argsort(table.inode_table[order], kind="stable")]
    ends = np.maximum.accumulate(table.inode_table[order] + geo.table_blocks)
    table.sound[order[1:][table.inode_table[order[1:]] < ends[:-1]]] = False
    table.slots[:] = np.clip(table.slots, 0, sb.s_inodes_per_group)
    return table


def _take_missing(
    descriptors: Descriptors, table: Table, remains: Remains, blocks: Blocks, *, stale: bool = False
) -> None:
    """Take what is sound and not known yet from one copy of the descriptors; a block of -1 is not looked at."""
    geo, per_block = descriptors.geo, descriptors.per_block
    known = np.ones(geo.desc_blocks * per_block, np.bool_)
    known[: geo.groups] = table.sound
    wanted = np.flatnonzero(~known.reshape(-1, per_block).all(axis=1) & (blocks > 0))
    step = max(1, _WINDOW // geo.block_size)
    for at in range(0, len(wanted), step):
        some = wanted[at : at + step]
        rows = read_rows(remains, blocks[some] * geo.block_size, geo.block_size).reshape(-1, geo.desc_size)
        groups = (some[:, np.newaxis] * per_block + np.arange(per_block)).reshape(-1)
        new = ~known[groups]
        _take_sound(descriptors, table, rows[new], groups[new], stale=stale)


def _take_sound(descriptors: Descriptors, into: Table, rows: Bytes, groups: Blocks, *, stale: bool) -> None:
    geo, table = descriptors.geo, descriptors.table(rows)
    places = [
        descriptors.joined(table, name, 32) for name in ("bg_block_bitmap", "bg_inode_bitmap", "bg_inode_table")
    ]
    sound = ~descriptors.wrong(rows, groups)
    for place, length in zip(places, (1, 1, geo.table_blocks), strict=True):
        sound &= ~descriptors.outside(place, length)
    slots = np.full(len(rows), descriptors.sb.s_inodes_per_group, np.int64)
    if descriptors.has_flags and not stale:
        slots -= descriptors.joined(table, "bg_itable_unused", 16)
        slots[table["bg_flags"] & INODE_UNINIT != 0] = 0
    groups = groups[sound]
    into.sound[groups] = True
    into.block_bitmap[groups], into.inode_bitmap[groups], into.inode_table[groups] = (p[sound] for p in places)
    into.slots[groups] = slots[sound]
    into.free_inodes[groups] = -1 if stale else descriptors.joined(table, "bg_free_inodes_count", 16)[sound]
    into.stale[groups] = stale
