"""COWD, the sparse extents of ESX, which its snapshots were until seSparse came.

| header | directory | tables and grains, as they were needed ... |

Written from VMware's "Virtual Disk Format 5.0", section "ESXi Host Sparse Extents".
"""

# ruff: noqa: N815  the fields are called as the specification calls them

from __future__ import annotations

from typing import Annotated, Final

from ferrotype.block import Source, read_exactly
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats.vmdk.sparse import UNCLEAN, SectorGrains, Sparse, Stored, checked_shape, directory_of
from ferrotype.formats.vmdk.tables import GrainTables, KeptGrains
from ferrotype.records import Record, b4, record, u32

__all__ = ["COWD_MAGIC", "open_cowd"]

COWD_MAGIC: Final = b"COWD"
_PER_TABLE: Final = 4096
_ROOT, _CHECK_CAPABLE, _INCONSISTENT = 1, 2, 4
_FLAGS: Final = _ROOT | _CHECK_CAPABLE | _INCONSISTENT


@record(endian="<", size=2048)
class CowdHeader(Record):
    """ESXi Host Sparse Extents."""

    magicNumber: b4
    version: u32
    flags: u32
    numSectors: u32
    grainSize: u32  # sectors
    gdOffset: u32  # sectors
    numGDEntries: u32
    freeSector: u32
    parent: Annotated[bytes, "1028s"]  # of a delta: file name and generation; else the geometry
    generation: u32
    name: Annotated[bytes, "60s"]
    description: Annotated[bytes, "512s"]
    savedGeneration: u32
    reserved: Annotated[bytes, "8s"]
    uncleanShutdown: u32
    padding: Annotated[bytes, "396s"]


def open_cowd(file: Source, kept: KeptGrains | None = None) -> Sparse:
    """The extent in a file that begins with ``COWD_MAGIC``."""
    header = CowdHeader.unpack(read_exactly(file, 0, CowdHeader.SIZE, "the header"))
    if header.version != 1:
        raise UnsupportedError(f"COWD extents of version {header.version} cannot be read", offset=4, field="version")
    if header.flags & ~_FLAGS:
        raise UnsupportedError(f"the flags {header.flags:#x} mean something unknown", offset=8, field="flags")
    shape = checked_shape(header.numSectors, header.grainSize, _PER_TABLE, "<u4")
    if header.numGDEntries < shape.tables:
        raise InvalidImage(
            f"{header.numGDEntries} grain tables are too few for {header.numSectors} sectors",
            offset=24,
            field="numGDEntries",
        )
    directory = directory_of(file, header.gdOffset, shape, "grain directory", "gdOffset")
    decode = SectorGrains(file.size, CowdHeader.SIZE, 0)
    tables = GrainTables(file, shape, directory, decode, kept=kept)
    dirty = bool(header.uncleanShutdown or header.flags & _INCONSISTENT)
    return Sparse(
        "vmfsSparse",
        Stored(tables),
        shape,
        dirty=dirty,
        warnings=(UNCLEAN,) if dirty else (),
        delta=not header.flags & _ROOT and header.parent[:1] != b"\0",
    )
