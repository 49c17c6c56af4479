"""What an NTFS volume occupies, found without $Bitmap: the runs of every attribute of every record of $MFT in use.

    $MFT, 4 MiB at a time ──> records in use ──> attributes with clusters ──> runs
    $MFT's own bitmap     ──> which records have to be among them

NTFS's own structures are files, so their records claim them: $MFT, its mirror, $LogFile, $Bitmap, $Boot.  A file
whose runs stand in several records has each of those in use.  Each record has to be whole, its attributes have to
follow each other up to their end mark, and its run lists have to be as long as they say.

R. Russon, Y. Fledel, "NTFS Documentation" (Linux-NTFS project: Files, $MFT; Concepts, file record, data runs).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from ferrotype.block import Source
from ferrotype.errors import InvalidImage
from ferrotype.filesystems import Claims
from ferrotype.filesystems.ntfs_batches import Attributes, Bytes, Flags, Places, attributes, fix_up, number_at, runs
from ferrotype.filesystems.ntfs_mft import Geometry, MasterFileTable
from ferrotype.filesystems.ntfs_records import BITMAP, END, IN_USE
from ferrotype.filesystems.ntfs_table import Table
from ferrotype.filesystems.remains import Intact

__all__ = ["claims"]

_RESERVED: Final = range(12, 24)  # records that are kept for NTFS and may be blank, whatever the bitmap says


def claims(source: Source, geometry: Geometry, mft: MasterFileTable) -> Iterator[Claims]:
    """The answer of ``FileSystem.claims``."""
    mft.renew()
    table = Table(Intact(source), geometry, mft.data)
    if table.count * table.size < mft.data.valid - table.size + 1:
        raise InvalidImage("$MFT is longer than its runs or than can be believed")
    behind = np.array([geometry.clusters * geometry.cluster_size], np.int64)  # the backup boot sector
    yield Claims(behind, np.array([geometry.size], np.int64))
    missing = _known(mft, table.count)
    missing[_RESERVED.start : _RESERVED.stop] = False
    for first, batch in table.batches():
        here = slice(first, first + len(batch))
        used = fix_up(batch, b"FILE") & (batch.view("<u2")[:, 11] & IN_USE != 0)
        missing[here] &= ~used
        yield _claims_of(batch, first, np.flatnonzero(used), geometry)
    if missing.any():
        raise InvalidImage(f"record {int(missing.argmax())} of $MFT is in use and cannot be read as one")


def _known(mft: MasterFileTable, count: int) -> Flags:
    """Which records $MFT's own bitmap calls used."""
    bitmap = mft.content(mft.record(0), BITMAP)
    packed = b"" if bitmap is None else bitmap.read(0, (count + 7) // 8)
    if len(packed) * 8 < count:
        raise InvalidImage("the bitmap of $MFT does not cover it")
    return np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")[:count].astype(bool)


def _claims_of(batch: Bytes, first: int, rows: Places, geometry: Geometry) -> Claims:
    """The clusters of some records of a batch.  Raises InvalidImage where one of them contradicts itself."""
    flat, size = batch.reshape(-1), batch.shape[1]
    all_of = attributes(batch, rows)
    _check_ends(flat, rows, size, first, all_of)
    there = all_of.take(all_of.nonresident)
    found = runs(flat, there, geometry.clusters)
    stated = number_at(flat, there.at + 24, 8) - number_at(flat, there.at + 16, 8) + 1  # highest_vcn, lowest_vcn
    wrong = found.described != stated
    if wrong.any():
        raise InvalidImage(f"a run list in record {first + int(there.row[wrong.argmax()])} of $MFT is damaged")
    bases = number_at(flat, rows * size + 32, 8)  # base_file_record_segment
    unit = geometry.cluster_size
    return Claims(found.lcn * unit, (found.lcn + found.length) * unit, int((bases == 0).sum()))


def _check_ends(flat: Bytes, rows: Places, size: int, first: int, all_of: Attributes) -> None:
    """Whether the attributes of each record are followed by the mark of their end."""
    ends = rows * size + number_at(flat, rows * size + 20, 2)  # first_attribute_offset
    last = np.searchsorted(all_of.row, rows, "right") - 1
    some = np.flatnonzero((last >= 0) & (all_of.row[last] == rows)) if len(all_of.row) else np.zeros(0, np.int64)
    ends[some] = all_of.end[last[some]]
    wrong = (number_at(flat, ends, 4) != END) | (ends + 4 > (rows + 1) * size)
    if wrong.any():
        raise InvalidImage(f"the attributes of record {first + int(rows[wrong.argmax()])} of $MFT have no end")
