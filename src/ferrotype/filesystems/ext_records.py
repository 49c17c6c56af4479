"""On-disk structures of ext2, ext3 and ext4: superblock, group descriptors, feature bits, and the geometry they give.

    superblock, 1024 bytes at byte 1024
    0x000 counts, sizes   0x038 magic, state   0x05C features, UUID, label   0x0E8 orphans   0x0FE descriptor size
    0x150 upper halves    0x24C backup groups  0x270 checksum seed           0x3FC crc32c of all before it

    group descriptor, 32 bytes, or s_desc_size (64 and more) with 64bit
    0x00 where block bitmap, inode bitmap and inode table lie    0x0C free counts    0x12 flags
    0x18 bitmap checksums    0x1E its own checksum    0x20 upper halves of all of these

Written from "ext4 Data Structures and Algorithms" (Linux documentation, filesystems/ext4).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import Annotated, Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.records import Record, b16, record, u8, u16, u32, u64

Blocks = NDArray[np.int64]  # block or cluster numbers, or counts of them

SUPERBLOCK: Final = 1024  # byte at which the superblock stands
MAGIC: Final = 0xEF53
MAX_GROUPS: Final = 1 << 22  # 512 TiB of 4 KiB blocks; bounds what a made-up superblock can cost
MAX_SIZE: Final = 1 << 61  # bytes; leaves room to add and to tag block numbers in 64 bits


@record(endian="<", size=1024)
class Superblock(Record):
    """Section "Super Block"; ``skip_`` fields do not matter here."""

    s_inodes_count: u32
    s_blocks_count_lo: u32
    skip_counts: Annotated[bytes, "12s"]
    s_first_data_block: u32
    s_log_block_size: u32
    s_log_cluster_size: u32
    s_blocks_per_group: u32
    s_clusters_per_group: u32
    s_inodes_per_group: u32
    skip_mtime: u32
    s_wtime: u32
    skip_mounts: u32
    s_magic: u16
    s_state: u16
    skip_errors: Annotated[bytes, "16s"]
    s_rev_level: u32
    skip_reserved_ids: u32
    s_first_ino: u32
    s_inode_size: u16
    s_block_group_nr: u16
    s_feature_compat: u32
    s_feature_incompat: u32
    s_feature_ro_compat: u32
    s_uuid: b16
    s_volume_name: b16
    skip_last_mounted: Annotated[bytes, "70s"]
    s_reserved_gdt_blocks: u16
    skip_journal: Annotated[bytes, "16s"]
    s_journal_inum: u32
    skip_journal_dev: u32
    s_last_orphan: u32
    skip_hash: Annotated[bytes, "18s"]
    s_desc_size: u16
    s_default_mount_opts: u32
    s_first_meta_bg: u32
    skip_journal_inode: Annotated[bytes, "72s"]
    s_blocks_count_hi: u32
    skip_counts_hi: Annotated[bytes, "12s"]
    s_flags: u32
    skip_raid: u16
    skip_mmp_interval: u16
    s_mmp_block: u64
    skip_raid_stripe_width: u32
    s_log_groups_per_flex: u8
    s_checksum_type: u8
    s_reserved_pad: u16
    s_kbytes_written: u64
    skip_snapshots_errors: Annotated[bytes, "192s"]
    s_usr_quota_inum: u32
    s_grp_quota_inum: u32
    skip_overhead: u32
    s_backup_bgs_0: u32
    s_backup_bgs_1: u32
    skip_encryption: Annotated[bytes, "24s"]
    s_prj_quota_inum: u32
    s_checksum_seed: u32
    skip_times: Annotated[bytes, "12s"]
    s_orphan_file_inum: u32
    skip_rest: Annotated[bytes, "376s"]
    s_checksum: u32


# Section "Block Group Descriptors": the first 32 bytes, and what 64bit appends.
DESC_LO: Final = {
    "bg_block_bitmap_lo": ("<u4", 0x00),
    "bg_inode_bitmap_lo": ("<u4", 0x04),
    "bg_inode_table_lo": ("<u4", 0x08),
    "bg_free_blocks_count_lo": ("<u2", 0x0C),
    "bg_free_inodes_count_lo": ("<u2", 0x0E),
    "bg_flags": ("<u2", 0x12),
    "bg_block_bitmap_csum_lo": ("<u2", 0x18),
    "bg_itable_unused_lo": ("<u2", 0x1C),
    "bg_checksum": ("<u2", 0x1E),
}
DESC_HI: Final = {
    "bg_block_bitmap_hi": ("<u4", 0x20),
    "bg_inode_bitmap_hi": ("<u4", 0x24),
    "bg_inode_table_hi": ("<u4", 0x28),
    "bg_free_blocks_count_hi": ("<u2", 0x2C),
    "bg_free_inodes_count_hi": ("<u2", 0x2E),
    "bg_itable_unused_hi": ("<u2", 0x32),
    "bg_block_bitmap_csum_hi": ("<u2", 0x38),
}
INODE_UNINIT: Final = 0x1  # bg_flags
BLOCK_UNINIT: Final = 0x2

# s_state and s_flags
VALID_FS: Final = 1
ERROR_FS: Final = 2
ORPHAN_FS: Final = 4
TEST_FILESYS: Final = 4


class Compat(IntFlag):
    """s_feature_compat: does not concern who only reads the map, bar these."""

    HAS_JOURNAL = 0x4
    RESIZE_INODE = 0x10
    SPARSE_SUPER2 = 0x200


class Incompat(IntFlag):
    """s_feature_incompat: those that leave the map readable as described above, and two that are refused by name."""

    COMPRESSION = 0x1
    FILETYPE = 0x2
    RECOVER = 0x4
    JOURNAL_DEV = 0x8
    META_BG = 0x10
    EXTENTS = 0x40
    BIT64 = 0x80
    MMP = 0x100
    FLEX_BG = 0x200
    EA_INODE = 0x400
    DIRDATA = 0x1000
    CSUM_SEED = 0x2000
    LARGEDIR = 0x4000
    INLINE_DATA = 0x8000
    ENCRYPT = 0x10000
    CASEFOLD = 0x20000


class RoCompat(IntFlag):
    """s_feature_ro_compat.  A reader of files may ignore unknown ones; a reader of bitmaps may not (see bigalloc)."""

    SPARSE_SUPER = 0x1
    LARGE_FILE = 0x2
    BTREE_DIR = 0x4
    HUGE_FILE = 0x8
    GDT_CSUM = 0x10
    DIR_NLINK = 0x20
    EXTRA_ISIZE = 0x40
    HAS_SNAPSHOT = 0x80
    QUOTA = 0x100
    BIGALLOC = 0x200
    METADATA_CSUM = 0x400
    REPLICA = 0x800
    READONLY = 0x1000
    PROJECT = 0x2000
    SHARED_BLOCKS = 0x4000
    VERITY = 0x8000
    ORPHAN_PRESENT = 0x10000


# ext2 and ext3 know these; anything more makes it ext4 (blkid's rule)
EXT3_INCOMPAT: Final = Incompat.FILETYPE | Incompat.RECOVER | Incompat.META_BG
EXT3_RO_COMPAT: Final = RoCompat.SPARSE_SUPER | RoCompat.LARGE_FILE | RoCompat.BTREE_DIR


def kind_of(sb: Superblock) -> str:
    """blkid's name for it: what the oldest driver is called that knows all its features."""
    more = sb.s_feature_incompat & ~EXT3_INCOMPAT or sb.s_feature_ro_compat & ~EXT3_RO_COMPAT
    if more:
        return "ext4dev" if sb.s_flags & TEST_FILESYS else "ext4"
    return "ext3" if sb.s_feature_compat & Compat.HAS_JOURNAL else "ext2"


def refuse_unknown(sb: Superblock) -> None:
    """Raises UnsupportedError for features that could change what the bitmaps mean or where they lie."""
    if sb.s_feature_incompat & Incompat.JOURNAL_DEV:
        raise UnsupportedError("this is the journal of another ext file system (jbd), not a file system")
    if sb.s_feature_incompat & Incompat.COMPRESSION:
        raise UnsupportedError("ext with compressed files (e2compr)", field="s_feature_incompat")
    for field, value, known in (
        ("s_feature_incompat", sb.s_feature_incompat, Incompat),
        ("s_feature_ro_compat", sb.s_feature_ro_compat, RoCompat),
    ):
        unknown = value & ~sum(known)
        if unknown:
            raise UnsupportedError(f"ext with unknown features {unknown:#x}", field=field)
    if sb.s_rev_level > 1:
        raise UnsupportedError(f"ext of revision {sb.s_rev_level}", field="s_rev_level")
    if sb.s_feature_ro_compat & RoCompat.METADATA_CSUM and sb.s_checksum_type != 1:
        raise UnsupportedError("ext with checksums other than crc32c", field="s_checksum_type")


# ---------------------------------------------------------------------- geometry


@dataclass(frozen=True, slots=True)
class Geometry:
    """The superblock's figures, checked, so that all that follows can compute with them."""

    block_size: int
    ratio: int  # blocks in a cluster
    blocks: int
    first_block: int  # of group 0
    super_block: int  # the block that holds the superblock's byte 1024
    group_blocks: int
    group_clusters: int  # a multiple of 8
    groups: int
    table_blocks: int  # blocks of one group's inode table
    desc_size: int
    desc_blocks: int

    @classmethod
    def of(cls, sb: Superblock) -> Geometry:
        if sb.s_log_block_size > 6:
            raise InvalidImage("ext blocks are 1 to 64 KiB", field="s_log_block_size")
        block_size = 1024 << sb.s_log_block_size
        bigalloc = bool(sb.s_feature_ro_compat & RoCompat.BIGALLOC)
        if bigalloc and not sb.s_log_block_size <= sb.s_log_cluster_size <= 20:
            raise InvalidImage("a cluster is one block to 1 GiB", field="s_log_cluster_size")
        ratio = 1 << (sb.s_log_cluster_size - sb.s_log_block_size) if bigalloc else 1
        wide = bool(sb.s_feature_incompat & Incompat.BIT64)
        blocks = sb.s_blocks_count_lo | (sb.s_blocks_count_hi << 32 if wide else 0)
        first_block = int(block_size == 1024 and not bigalloc)
        if sb.s_first_data_block != first_block:
            raise InvalidImage(f"the first group starts at block {first_block}", field="s_first_data_block")
        if not first_block + 1 < blocks <= MAX_SIZE // block_size:
            raise InvalidImage("no file system has that many blocks", field="s_blocks_count")

        group_clusters = sb.s_clusters_per_group if bigalloc else sb.s_blocks_per_group
        if not 0 < group_clusters <= 8 * block_size or group_clusters % 8:
            raise InvalidImage("a group's bitmap is one block of whole bytes", field="s_clusters_per_group")
        if sb.s_blocks_per_group != group_clusters * ratio:
            raise InvalidImage("a group is not as long as its clusters", field="s_blocks_per_group")
        groups = -(-(blocks - first_block) // sb.s_blocks_per_group)
        if not 0 < sb.s_inodes_per_group <= 8 * block_size or groups * sb.s_inodes_per_group != sb.s_inodes_count:
            raise InvalidImage("the groups do not hold the inodes", field="s_inodes_per_group")
        if groups > MAX_GROUPS:
            raise UnsupportedError(f"ext with more than {MAX_GROUPS} block groups", field="s_blocks_count")

        inode_size = sb.s_inode_size if sb.s_rev_level else 128
        if not 128 <= inode_size <= block_size or inode_size & (inode_size - 1):
            raise InvalidImage("inodes are a power of two, 128 bytes to one block", field="s_inode_size")
        desc_size = sb.s_desc_size if wide else 32
        if wide and (not 64 <= desc_size <= 1024 or desc_size & (desc_size - 1)):
            raise InvalidImage("64bit descriptors are 64 to 1024 bytes, a power of two", field="s_desc_size")
        desc_blocks = -(-groups * desc_size // block_size)
        if sb.s_feature_incompat & Incompat.META_BG and sb.s_first_meta_bg > desc_blocks:
            raise InvalidImage("meta_bg starts behind the last group", field="s_first_meta_bg")
        return cls(
            block_size=block_size,
            ratio=ratio,
            blocks=blocks,
            first_block=first_block,
            super_block=SUPERBLOCK // block_size,
            group_blocks=sb.s_blocks_per_group,
            group_clusters=group_clusters,
            groups=groups,
            table_blocks=-(-sb.s_inodes_per_group * inode_size // block_size),
            desc_size=desc_size,
            desc_blocks=desc_blocks,
        )

    @property
    def clusters(self) -> int:
        return -(-(self.blocks - self.first_block) // self.ratio)

    def start_of(self, groups: Blocks) -> Blocks:
        """Where a copy of the superblock would stand; group 0 of 1 KiB blocks has the boot block before it."""
        return np.where(groups == 0, self.super_block, self.first_block + groups * self.group_blocks)
