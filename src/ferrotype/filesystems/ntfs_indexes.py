"""What the folders of an NTFS volume say of records of $MFT that are lost: their names, and the folders they are in.

    folder's record    $INDEX_ROOT       16 bytes | header | entry | entry ...                 resident
                       $INDEX_ALLOCATION runs ──> nodes: "INDX" | fix-ups | header | entry | entry ...
    entry              file reference | length | ... | $FILE_NAME: parent, name

Each entry repeats the $FILE_NAME of the file it leads to, so the order of the nodes does not matter.  A node that the
folder no longer uses may hold names out of date: of two references to a record the one with the later sequence
number counts.

R. Russon, Y. Fledel, "NTFS Documentation" (Linux-NTFS project: Concepts, index record; Attributes, $INDEX_ROOT).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from ferrotype.filesystems.ntfs_batches import (
    Attributes,
    Bytes,
    Flags,
    Places,
    attributes,
    entries,
    fix_up,
    number_at,
    runs,
)
from ferrotype.filesystems.ntfs_mft import Geometry
from ferrotype.filesystems.ntfs_names import Link
from ferrotype.filesystems.ntfs_records import (
    IN_USE,
    INDEX_ALLOCATION,
    INDEX_ROOT,
    SEGMENT,
    IndexBuffer,
    IndexEntry,
    IndexRoot,
)
from ferrotype.filesystems.ntfs_table import Table
from ferrotype.filesystems.remains import Remains
from ferrotype.units import GiB, MiB

__all__ = ["lost_names"]

_I30: Final = int.from_bytes("$I30".encode("utf-16-le"), "little")  # the name of a folder's index
_BATCH: Final = 4 * MiB  # bytes of index nodes taken at once
_MOST_READ: Final = 16 * GiB  # bytes of index nodes; about 100 million files
_MOST_NAMES: Final = 1 << 20


def lost_names(table: Table, geometry: Geometry, remains: Remains, lost: Flags) -> dict[int, tuple[int, Link]]:
    """For lost records, by number: the sequence number of the reference to it, and its name."""
    names: dict[int, tuple[int, Link]] = {}
    for flat, places in _nodes(table, geometry, remains):
        references = flat.view("<i8")[places // 8]
        numbers = references & SEGMENT
        wanted = numbers < len(lost)
        wanted[wanted] = lost[numbers[wanted]]
        for at, reference in zip(places[wanted].tolist(), references[wanted].tolist(), strict=True):
            number, sequence = reference & SEGMENT, reference >> 48 & 0xFFFF
            length = int(flat[at + 8]) | int(flat[at + 9]) << 8
            link = Link.parse(flat[at + IndexEntry.SIZE : at + length].tobytes())
            known = names.get(number)
            if link and (known is None or (sequence, not link.dos) > (known[0], not known[1].dos)):
                names[number] = sequence, link
        if len(names) > _MOST_NAMES:
            break
    return names


def _nodes(table: Table, geometry: Geometry, remains: Remains) -> Iterator[tuple[Bytes, Places]]:
    """Bytes, and where in them entries with a name begin, until every folder was looked at."""
    left = min(_MOST_READ, geometry.clusters * geometry.cluster_size)
    for _, batch in table.batches():
        head = batch.view("<u2")[:, 11]  # flags
        used = fix_up(batch, b"FILE") & (head & IN_USE != 0)
        flat = batch.reshape(-1)
        found = attributes(batch, np.flatnonzero(used))
        name_at = found.at + number_at(flat, found.at + 10, 2)
        ours = (flat[found.at + 9] == len("$I30")) & (number_at(flat, name_at, 8) == _I30)
        yield flat, _root_entries(flat, found.take(ours & (found.type_code == INDEX_ROOT) & ~found.nonresident))
        below = found.take(ours & (found.type_code == INDEX_ALLOCATION) & found.nonresident)
        for nodes in _read(flat, below, geometry, remains, left):
            left -= len(nodes)
            yield nodes, _node_entries(nodes, geometry.index_size)
        if left <= 0:
            return


def _root_entries(flat: Bytes, roots: Attributes) -> Places:
    header = roots.at + number_at(flat, roots.at + 20, 2) + IndexRoot.SIZE  # value_offset
    first, free = number_at(flat, header, 4), number_at(flat, header + 4, 4)
    return entries(flat, header + first, np.minimum(header + free, roots.end))


def _node_entries(flat: Bytes, size: int) -> Places:
    nodes = np.flatnonzero(fix_up(flat.reshape(-1, size), b"INDX")) * size
    header = nodes + IndexBuffer.SIZE
    first, free = number_at(flat, header, 4), number_at(flat, header + 4, 4)
    return entries(flat, header + first, np.minimum(header + free, nodes + size))


def _read(flat: Bytes, of: Attributes, geometry: Geometry, remains: Remains, most: int) -> Iterator[Bytes]:
    """The index nodes of some folders, whole ones, in pieces of about 4 MiB; ``most`` bytes."""
    found, unit, size = runs(flat, of, geometry.clusters), geometry.cluster_size, geometry.index_size
    out, last = bytearray(), -1
    for owner, lcn, length in zip(found.owner.tolist(), found.lcn.tolist(), found.length.tolist(), strict=True):
        if owner != last:
            del out[len(out) // size * size :]  # a folder's nodes begin on their own
            last = owner
        start, end = lcn * unit, (lcn + length) * unit
        while start < end and most > 0:
            step = min(end - start, _BATCH)
            if step % size or not remains.blank(start, step):
                out += remains.read(start, step)
            most -= step
            start += step
            if len(out) >= _BATCH:
                whole = len(out) // size * size
                yield np.frombuffer(bytes(out[:whole]), np.uint8).copy()
                del out[:whole]
    whole = len(out) // size * size
    if whole:
        yield np.frombuffer(bytes(out[:whole]), np.uint8).copy()
