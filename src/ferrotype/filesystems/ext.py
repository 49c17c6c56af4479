"""ext2, ext3 and ext4: which blocks (or, with bigalloc, clusters) are free.

    byte 1024       s_first_data_block + g * s_blocks_per_group
    +------------+--+------------------------------------------------------------------------------+- -
    | superblock |  | group g                                                                      |
    +------------+--+------------------------------------------------------------------------------+- -
                    | superblock | descriptors, | block  | inode  | inode table  | blocks of files |
                    | copy       | room to grow | bitmap | bitmap |              | and folders     |
                      only in the groups that       anywhere in the flex group, or
                      sparse_super[2] names         where resizing found room

    descriptors     32 bytes a group, s_desc_size with 64bit; all together behind the superblock, or with meta_bg
                    one block for each run of groups, in the first, the second and the last group of the run
    block bitmap    one bit a cluster, the least significant first, 1 = in use; the last group's is padded
    BLOCK_UNINIT    the bitmap was never written: only metadata is in use, and where that lies is computed

Written from "ext4 Data Structures and Algorithms" (Linux documentation, filesystems/ext4), sections "Super Block",
"Block Group Descriptors", "Block and Inode Bitmaps", "Meta Block Groups", "Bigalloc" and "Checksums".

Believing a damaged bitmap would lose data, so each group has to prove itself: descriptor and bitmap by checksum where
the file system has them, the bitmap by the number of free clusters in its descriptor, and by showing as used all
blocks known to hold metadata.  The superblock's own count of free blocks proves nothing: Linux brings it up to date
on unmounting only, so it is stale after a journal was replayed.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read, read_exactly, read_exactly_into
from ferrotype.errors import InvalidImage
from ferrotype.extents import BitmapRuns, ExtentMap, Offsets, State
from ferrotype.filesystems import Claims, Facts
from ferrotype.filesystems.ext_bitmaps import bytes_of, fill_behind, in_rows, ones, paint
from ferrotype.filesystems.ext_checksums import CRC32C, LARGE, Bytes, Checksums, crc, row
from ferrotype.filesystems.ext_files import files_at
from ferrotype.filesystems.ext_groups import Descriptors, read_table
from ferrotype.filesystems.ext_inodes import walk
from ferrotype.filesystems.ext_records import (
    BLOCK_UNINIT,
    ERROR_FS,
    MAGIC,
    ORPHAN_FS,
    SUPERBLOCK,
    VALID_FS,
    Blocks,
    Geometry,
    Incompat,
    RoCompat,
    Superblock,
    kind_of,
    refuse_unknown,
)
from ferrotype.filesystems.remains import NOWHERE, Intact, Ranges
from ferrotype.units import MiB

__all__ = ["Ext", "open", "probe"]

WINDOW: Final = 16 * MiB  # of descriptors or bitmaps held at once


@dataclass(frozen=True, slots=True)
class _Groups:
    """What the descriptors say, one entry a group."""

    block_bitmap: Blocks
    inode_bitmap: Blocks
    inode_table: Blocks
    free: NDArray[np.uint32]  # clusters
    uninit: NDArray[np.bool_]
    bitmap_csum: Checksums


# ---------------------------------------------------------------------- the file system


class Ext:
    """An opened ext2, ext3 or ext4 file system."""

    def __init__(self, source: Source, sb: Superblock, raw: bytes) -> None:
        self._source = source
        self._sb = sb
        self._geo = Geometry.of(sb)
        self._descriptors = Descriptors(sb, self._geo)
        self._csum = bool(sb.s_feature_ro_compat & RoCompat.METADATA_CSUM)
        self._seed = self._descriptors.seed
        if self._csum and int(crc(CRC32C, LARGE, row(raw[:-4]))[0]) != sb.s_checksum:
            raise InvalidImage("the ext superblock's checksum does not match", offset=SUPERBLOCK, field="s_checksum")
        self._facts = _facts(sb, self._geo, source.size)

    @property
    def facts(self) -> Facts:
        return self._facts

    def swap_files(self) -> ExtentMap:
        """All DATA: Linux's swap files are only known by the running system's configuration."""
        return ExtentMap.uniform(0, self._source.size)

    def files_at(self, starts: Offsets, ends: Offsets, /) -> tuple[str, ...]:
        """See ``ext_files``.  An inode stands as ``<inode 12>``, one of the file system's own as ``<journal>``."""
        return files_at(self._source, self._descriptors, Ranges(starts, ends), clean=self._facts.unclean is None)

    def claims(self) -> Iterator[Claims]:
        """See FileSystem.  What the superblock and the descriptors place, and the blocks of every inode with links.

        An inode's checksum has to be right where there are checksums, and each group has to hold as many inodes in
        use as its descriptor knows of.  All of the tables is read that was ever written.
        """
        size, end = self._geo.block_size, self._geo.blocks * self._geo.block_size
        starts, ends = self._metadata(self._read_groups())
        yield Claims(starts * size, ends * size)
        mmp = self._sb.s_mmp_block if self._sb.s_feature_incompat & Incompat.MMP else 0
        if mmp >= self._geo.blocks:
            raise InvalidImage("the block for multiple mount protection lies outside", field="s_mmp_block")
        fixed = np.array([[0, SUPERBLOCK + Superblock.SIZE], [mmp * size, (mmp + 1) * size]], np.int64)
        yield Claims(fixed[:, 0], fixed[:, 1])
        remains = Intact(self._source)
        table = read_table(self._descriptors, NOWHERE, remains)
        if not table.sound.all() or table.stale.any():
            raise InvalidImage("group descriptors contradict their checksums or each other")
        for walked in walk(self._descriptors, table, remains):
            yield Claims(walked.firsts * size, np.minimum(walked.ends * size, end), walked.inodes)

    def allocation(self) -> ExtentMap:
        """FREE where bitmaps that prove themselves say so, to the block or cluster, up to the file system's end.

        Cost follows the bitmaps that were ever written, and the groups that hold metadata; of the rest only the
        descriptors are read.
        """
        geo = self._geo
        if not self._descriptors.vouched_for(self._source):
            raise InvalidImage("no copy of its superblock is there, so it may be a leftover under something else")
        groups = self._read_groups()
        starts, ends = self._metadata(groups)
        rows = self._rows(groups, starts, ends)
        metadata = in_rows(geo, rows, starts, ends)
        free = BitmapRuns()
        step = max(1, WINDOW // geo.block_size)
        for first in range(0, len(rows), step):
            window = range(first, min(first + step, len(rows)))
            used = self._bitmaps(window, rows, groups, metadata)
            np.invert(used, out=used)
            free.add(used.reshape(-1), used.size * 8)
        starts, ends = (bytes_of(geo, rows, run) for run in free.finish())
        return ExtentMap.from_runs(0, self._source.size, starts, ends, State.FREE)

    # ------------------------------------------------------------------ descriptors

    def _read_groups(self) -> _Groups:
        geo = self._geo
        result = _Groups(
            block_bitmap=np.empty(geo.groups, np.int64),
            inode_bitmap=np.empty(geo.groups, np.int64),
            inode_table=np.empty(geo.groups, np.int64),
            free=np.empty(geo.groups, np.uint32),
            uninit=np.zeros(geo.groups, np.bool_),
            bitmap_csum=np.empty(geo.groups, np.uint32),
        )
        step = WINDOW // geo.block_size
        blocks = self._descriptors.blocks()
        for at in range(0, len(blocks), step):
            first = at * self._descriptors.per_block
            rows = self._read_blocks(blocks[at : at + step], geo.block_size, "a block of group descriptors")
            rows = rows.reshape(-1, geo.desc_size)[: geo.groups - first]
            self._take_descriptors(rows, first, result)
        return result

    def _take_descriptors(self, rows: Bytes, first: int, into: _Groups) -> None:
        """Check one window of descriptors and keep what matters."""
        descriptors = self._descriptors
        wrong = descriptors.wrong(rows, np.arange(first, first + len(rows)))
        if wrong.any():
            group = first + int(wrong.argmax())
            raise InvalidImage(f"the checksum of group {group}'s descriptor does not match", field="bg_checksum")
        table, part = descriptors.table(rows), slice(first, first + len(rows))
        into.block_bitmap[part] = descriptors.joined(table, "bg_block_bitmap", 32)
        into.inode_bitmap[part] = descriptors.joined(table, "bg_inode_bitmap", 32)
        into.inode_table[part] = descriptors.joined(table, "bg_inode_table", 32)
        into.free[part] = descriptors.joined(table, "bg_free_blocks_count", 16)
        into.bitmap_csum[part] = descriptors.joined(table, "bg_block_bitmap_csum", 16)
        if descriptors.has_flags:
            into.uninit[part] = (table["bg_flags"] & BLOCK_UNINIT) != 0
        for what, place, length in (
            ("block bitmap", into.block_bitmap[part], 1),
            ("inode bitmap", into.inode_bitmap[part], 1),
            ("inode table", into.inode_table[part], self._geo.table_blocks),
        ):
            outside = descriptors.outside(place, length)
            if outside.any():
                raise InvalidImage(f"the {what} of group {first + int(outside.argmax())} is outside the file system")

    # ------------------------------------------------------------------ where metadata lies

    def _metadata(self, groups: _Groups) -> tuple[Blocks, Blocks]:
        """Starts and ends, in blocks and ascending, of all that the superblock and the descriptors place.

        Raises InvalidImage where two of them overlap, which also bounds what painting them can cost.
        """
        geo, sb = self._geo, self._sb
        backups = self._descriptors.backup_groups()
        per_block = geo.block_size // geo.desc_size
        if sb.s_feature_incompat & Incompat.META_BG:
            old, old_groups = sb.s_first_meta_bg, sb.s_first_meta_bg * per_block
        else:
            old, old_groups = geo.desc_blocks + sb.s_reserved_gdt_blocks, geo.groups
        # A range is one number, its start and which of these lengths it has, so that one sort in place orders all.
        lengths = np.array([1, geo.table_blocks, 1 + old], np.int64)
        later = np.arange(min(old_groups, geo.groups), geo.groups, dtype=np.int64)
        later = later[np.isin(later % per_block, (0, 1, per_block - 1))]
        tagged = np.concatenate(
            [
                groups.block_bitmap << 2,
                groups.inode_bitmap << 2,
                groups.inode_table << 2 | 1,
                geo.start_of(backups[backups < old_groups]) << 2 | 2,
                geo.start_of(backups[backups >= old_groups]) << 2,
                geo.start_of(later) + np.isin(later, backups) << 2,
            ]
        )
        tagged.sort()
        starts = tagged >> 2
        tagged &= 3
        ends = lengths[tagged]
        ends += starts
        np.minimum(ends, geo.blocks, out=ends)  # a last group may be too short for all of its copy
        some = starts < ends
        starts, ends = starts[some], ends[some]
        overlap = ends[:-1] > starts[1:]
        if overlap.any():
            raise InvalidImage(f"two pieces of metadata claim block {int(starts[1:][overlap.argmax()])}")
        return starts, ends

    def _rows(self, groups: _Groups, starts: Blocks, ends: Blocks) -> Blocks:
        """The groups to look at, ascending: those with a bitmap or with metadata, the last one, and the first one of
        each stretch of others, which are free as a whole, and for which it stands.

        Raises InvalidImage where the descriptor of one of those others does not say so.
        """
        geo = self._geo
        first = (starts - geo.first_block) // geo.group_blocks
        last = (ends - 1 - geo.first_block) // geo.group_blocks
        looked_at = ~groups.uninit
        looked_at[first] = looked_at[last] = looked_at[[0, -1]] = True
        long = last - first > 1
        if long.any():
            changes = np.zeros(geo.groups, np.int32)
            np.add.at(changes, first[long], 1)
            np.add.at(changes, last[long], -1)
            looked_at |= np.cumsum(changes) > 0
        wrong = ~looked_at & (groups.free != geo.group_clusters)
        if wrong.any():
            if self._facts.unclean is None:
                raise self._contradiction(int(wrong.argmax()))
            looked_at |= wrong
        looked_at[1:] |= looked_at[:-1]
        return np.flatnonzero(looked_at)

    # ------------------------------------------------------------------ bitmaps

    def _bitmaps(self, window: range, rows: Blocks, groups: _Groups, metadata: tuple[Blocks, Blocks]) -> Bytes:
        """The proven bitmaps of a window of rows; of an unclean file system, all in use where the proof fails."""
        geo, part = self._geo, rows[window.start : window.stop]
        must = paint(geo, window, metadata)
        written = np.flatnonzero(~groups.uninit[part])
        read = self._read_blocks(groups.block_bitmap[part[written]], geo.group_clusters // 8, "a block bitmap")
        wrong = np.zeros(len(window), np.bool_)
        if self._csum:
            mask = 0xFFFFFFFF if geo.desc_size >= 64 else 0xFFFF
            wrong[written] = (crc(CRC32C, self._seed, read) & mask) != groups.bitmap_csum[part[written]]
        if len(written) == len(window):
            used = read
        else:
            used = must.copy()
            used[written] = read
        if window.stop == len(rows):
            fill_behind(used[-1], geo.clusters - (geo.groups - 1) * geo.group_clusters)
        wrong |= geo.group_clusters - ones(used) != groups.free[part]
        np.bitwise_and(must, ~used, out=must)
        wrong |= must.any(1)
        if wrong.any():
            if self._facts.unclean is None:
                raise self._contradiction(int(part[wrong.argmax()]))
            used[wrong] = 0xFF
        return used

    def _contradiction(self, group: int) -> InvalidImage:
        return InvalidImage(f"the block bitmap of group {group} contradicts what is known of the group")

    def _read_blocks(self, blocks: Blocks, width: int, what: str) -> Bytes:
        """The first ``width`` bytes of each block, one row each; neighbours are read together."""
        size = self._geo.block_size
        order = np.argsort(blocks, kind="stable")
        ascending = blocks[order]
        data = np.empty((len(blocks), size), np.uint8)
        for low, high in _neighbours(ascending):
            read_exactly_into(self._source, int(ascending[low]) * size, data[low:high].reshape(-1).data, what)
        rows = data[:, :width]
        if (order[1:] > order[:-1]).all():
            return rows
        unsorted = np.empty((len(blocks), width), np.uint8)
        unsorted[order] = rows
        return unsorted


def _neighbours(ascending: Blocks) -> Iterator[tuple[int, int]]:
    """Index ranges of consecutive numbers."""
    if len(ascending):
        cuts = (np.flatnonzero(np.diff(ascending) != 1) + 1).tolist()
        yield from zip([0, *cuts], [*cuts, len(ascending)], strict=True)


# ---------------------------------------------------------------------- opening


def _unclean(sb: Superblock, geo: Geometry, volume: int) -> str | None:
    orphans = sb.s_last_orphan or sb.s_state & ORPHAN_FS or sb.s_feature_ro_compat & RoCompat.ORPHAN_PRESENT
    reasons = [
        reason
        for reason, holds in (
            ("it was not cleanly unmounted", not sb.s_state & VALID_FS),
            ("its journal has to be replayed", sb.s_feature_incompat & Incompat.RECOVER),
            ("errors were found in it", sb.s_state & ERROR_FS),
            ("deleted files still wait for their release", orphans),
            ("it is larger than its volume", geo.blocks * geo.block_size > volume),
        )
        if holds
    ]
    return "; ".join(reasons) or None


def _facts(sb: Superblock, geo: Geometry, volume: int) -> Facts:
    return Facts(
        kind=kind_of(sb),
        label=sb.s_volume_name.split(b"\0")[0].rstrip().decode("utf-8", "replace") or None,
        uuid=str(uuid.UUID(bytes=sb.s_uuid)) if any(sb.s_uuid) else None,
        block_size=geo.block_size * geo.ratio,
        size=geo.blocks * geo.block_size,
        unclean=_unclean(sb, geo, volume),
        written=sb.s_wtime or None,
    )


def probe(source: Source) -> bool:
    """Whether the superblock says ext2, ext3, ext4 or an external journal (which ``open`` refuses by name)."""
    if source.size < SUPERBLOCK + Superblock.SIZE:
        return False
    sb = Superblock.unpack(read(source, SUPERBLOCK, Superblock.SIZE))
    return sb.s_magic == MAGIC and sb.s_log_block_size <= 6 and sb.s_rev_level <= 1


def open(source: Source) -> Ext:
    """Raises InvalidImage where it is no sound ext file system, UnsupportedError for features not read here."""
    raw = read_exactly(source, SUPERBLOCK, Superblock.SIZE, "the ext superblock")
    sb = Superblock.unpack(raw)
    if sb.s_magic != MAGIC:
        raise InvalidImage("no ext superblock", offset=SUPERBLOCK, field="s_magic")
    refuse_unknown(sb)
    return Ext(source, sb, raw)
