"""Which files of an ext2, ext3 or ext4 volume stand in given ranges of it.

    group descriptors ──> inode tables ──> inodes in use ──> their blocks: are any hit?        (ext_inodes)
    folders' blocks ──> entries that name what is hit, or what lay in a lost inode table ──> paths   (ext_folders)

What counts as a file's: the blocks of its content, those reserved for it and not yet written among them, the blocks
of its extent tree or block map, the block of its extended attributes, and its inode.  An inode that is lost is known
by the folder that names it.

Everything is read once, in the order of the disk, and looked at with numpy: about 2 us for an inode in use, and 20 us
for each block of an extent tree or of a folder that stands alone.  Memory grows with the number of folders (some 100
bytes each) and of files that are hit.  Inodes never used cost nothing where the file system says which they are.

What cannot be read reads as zeros here: no inode, no extent, no entry.  Group descriptors that are lost or wrong are
taken from a copy.  Bytes of names that are not UTF-8 are told as ``\\xff``.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from ferrotype.block import Source
from ferrotype.filesystems.ext_folders import ROOT, Links, names
from ferrotype.filesystems.ext_groups import Descriptors, Table, read_table
from ferrotype.filesystems.ext_inodes import in_lost_slots, search
from ferrotype.filesystems.ext_records import SUPERBLOCK, Blocks, Compat, Incompat, Superblock
from ferrotype.filesystems.remains import Paths, Ranges, Remains

__all__ = ["files_at"]

_MOST_DEPTH: Final = 512  # folders in a path; Linux opens paths of 4096 bytes
_JOURNAL_INODE: Final = 8
_BAD_BLOCKS, _RESIZE = 1, 7  # inodes


def files_at(source: Source, descriptors: Descriptors, ranges: Ranges, *, clean: bool) -> tuple[str, ...]:
    """The answer of ``FileSystem.files_at``.  ``clean``: it was unmounted, so that its inode bitmaps are right."""
    if not len(ranges.starts):
        return ()
    remains, paths = Remains(source, ranges), Paths()
    table = read_table(descriptors, ranges, remains)
    _structures(descriptors, table, ranges, paths)
    lost = in_lost_slots(descriptors, table, ranges)
    found = search(descriptors, table, ranges, remains, clean=clean)
    missing, links = names(descriptors, table, found, lost, ranges, remains)
    own = _own_inodes(descriptors.sb)
    always = np.array(sorted(own), np.int64)
    always = always[lost.hold(always)]
    own[_BAD_BLOCKS] = "<bad blocks>"
    above: dict[int, str] = {ROOT: ""}
    for number in np.unique(np.concatenate([found.hit, missing, always])).tolist():
        paths.add(own[number] if number in own and number not in links else _path(number, links, above))
        if paths.full:
            break
    if not found.whole:
        paths.stop()
    return paths.sorted()


def _own_inodes(sb: Superblock) -> dict[int, str]:
    """The inodes in use that no folder names, as a rule: they hold what is the file system's own."""
    own = {
        sb.s_usr_quota_inum: "<user quota>",
        sb.s_grp_quota_inum: "<group quota>",
        sb.s_prj_quota_inum: "<project quota>",
        sb.s_orphan_file_inum: "<orphan file>",
        ROOT: "<root folder>",
    }
    if sb.s_feature_compat & Compat.HAS_JOURNAL:
        own[sb.s_journal_inum or _JOURNAL_INODE] = "<journal>"
    if sb.s_feature_compat & Compat.RESIZE_INODE:
        own[_RESIZE] = "<resize inode>"
    return {number: name for number, name in own.items() if number}


def _path(number: int, links: Links, above: dict[int, str]) -> str:
    """The path of an inode.  Where the way up is lost, or a circle, it begins with the last inode reached."""
    way: list[int] = []
    here = number
    while here not in above and here in links and len(way) < _MOST_DEPTH:
        way.append(here)
        here = links[here][0]
    path = above.get(here, f"<inode {here}>")
    for step in reversed(way):
        path = f"{path}/{links[step][1]}" if path else links[step][1]
        if step != number:
            above[step] = path
    return path


def _structures(descriptors: Descriptors, table: Table, ranges: Ranges, paths: Paths) -> None:
    """Tell which of the file system's own structures are hit."""
    geo, sb = descriptors.geo, descriptors.sb
    if ranges.touches(0, SUPERBLOCK):
        paths.add("<boot block>")
    if ranges.touches(SUPERBLOCK, SUPERBLOCK + Superblock.SIZE):
        paths.add("<superblock>")

    def tell(name: str, blocks: Blocks, length: int) -> None:
        blocks = blocks[blocks > 0]
        ends = np.minimum(blocks + length, geo.blocks) * geo.block_size
        if ranges.touch(blocks * geo.block_size, ends).any():
            paths.add(name)

    groups = descriptors.backup_groups()
    copies = geo.start_of(groups[groups > 0])
    with_all = copies[groups[groups > 0] < descriptors.together * descriptors.per_block]
    tell("<copy of the superblock>", copies, 1)
    tell("<group descriptors>", descriptors.blocks(), 1)
    tell("<copy of the group descriptors>", with_all + 1, descriptors.together)
    for blocks in descriptors.apart():
        tell("<copy of the group descriptors>", blocks, 1)
    tell("<block bitmap>", table.block_bitmap[table.sound], 1)
    tell("<inode bitmap>", table.inode_bitmap[table.sound], 1)
    tell("<inode table>", table.inode_table[table.sound], geo.table_blocks)
    if sb.s_feature_incompat & Incompat.MMP:
        tell("<multiple mount protection>", np.array([sb.s_mmp_block], np.uint64).astype(np.int64), 1)
