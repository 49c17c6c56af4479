"""The Apple partition map: block 0 describes the disk, each following block one partition, the map included.

    block  0                    1                2             ...      n
           | "ER" driver        | "PM" map       | "PM" entry  |        | "PM" entry |
           | descriptor record  | itself         |             |        |            |

Source: "Inside Macintosh: Devices", chapter 3 (SCSI Manager), "Driver Descriptor Record" and "Partition Map Entry".
All fields are big-endian.  The map's unit is the block of the descriptor record, not the sector of the device.
"""

from __future__ import annotations

from typing import Annotated, Final

from ferrotype.block import Source
from ferrotype.block import read as read_bytes
from ferrotype.errors import InvalidImage
from ferrotype.records import Record, b2, record, u16, u32
from ferrotype.volumes import Partition, Table
from ferrotype.volumes.mbr import disjoint, warn_of

_MAX_ENTRIES: Final = 1024  # a usual map has room for 63
_NO_PARTITIONS: Final = frozenset({"Apple_partition_map", "Apple_Free", "Apple_Void"})  # the map itself, and gaps


@record(endian=">", size=8)
class DriverDescriptor(Record):
    """Start of the driver descriptor record (Block0)."""

    sbSig: b2  # noqa: N815
    sbBlkSize: u16  # noqa: N815
    sbBlkCount: u32  # noqa: N815


@record(endian=">", size=92)
class MapEntry(Record):
    """Start of a partition map entry (Partition); what follows is for booting."""

    pmSig: b2  # noqa: N815
    pmSigPad: u16  # noqa: N815
    pmMapBlkCnt: u32  # noqa: N815
    pmPyPartStart: u32  # noqa: N815
    pmPartBlkCnt: u32  # noqa: N815
    pmPartName: Annotated[bytes, "32s"]  # noqa: N815
    pmParType: Annotated[bytes, "32s"]  # noqa: N815
    pmLgDataStart: u32  # noqa: N815
    pmDataCnt: u32  # noqa: N815
    pmPartStatus: u32  # noqa: N815


def read(source: Source, sector_size: int) -> Table | None:
    """The Apple partition map of a disk; None where there is none.

    ``index`` is the number of the map entry, as on other systems; free space and the map itself are not listed.
    The table's sector size is the map's own block size, ``sector_size`` only where block 0 names none.  Raises
    InvalidImage where the length of the map cannot be right.
    """
    if source.size < 2 * sector_size:
        return None
    descriptor = DriverDescriptor.unpack(read_bytes(source, 0, sector_size))
    block = _block_size(source, descriptor, sector_size) if descriptor.sbSig == b"ER" else None
    if block is None:
        return None
    count = MapEntry.unpack(read_bytes(source, block, block)).pmMapBlkCnt
    if not 0 < count <= _MAX_ENTRIES:
        raise InvalidImage(f"the Apple partition map claims {count} entries", offset=block + 4, field="pmMapBlkCnt")
    return _table(source, block, count)


def _block_size(source: Source, descriptor: DriverDescriptor, sector_size: int) -> int | None:
    """Where the map starts, which is also its unit.  Disks for both kinds of drive name 2048 and count in 512."""
    for size in dict.fromkeys((descriptor.sbBlkSize, sector_size, 512)):
        if size in (512, 1024, 2048, 4096) and 2 * size <= source.size and read_bytes(source, size, 512)[:2] == b"PM":
            return size
    return None


def _table(source: Source, block: int, count: int) -> Table:
    warnings: list[str] = []
    found: list[Partition] = []
    outside: list[int] = []
    occupied = (count + 1) * block  # bytes from the start of the disk
    for index in range(1, count + 1):
        if (index + 1) * block > source.size:
            warnings.append(f"the Apple partition map ends with the disk at entry {index} of {count}")
            break
        entry = MapEntry.unpack(read_bytes(source, index * block, block))
        if entry.pmSig != b"PM":
            warnings.append(f"the Apple partition map breaks off at entry {index} of {count}")
            break
        start, size, kind = entry.pmPyPartStart * block, entry.pmPartBlkCnt * block, _text(entry.pmParType)
        if kind in _NO_PARTITIONS or size == 0:
            if kind == "Apple_partition_map" and start == block:
                occupied = max(occupied, start + size)
        elif start + size > source.size:
            outside.append(index)
        else:
            found.append(Partition(index, start, size, kind, _text(entry.pmPartName) or None))
    warn_of(outside, "reach beyond the end of the disk and are not used", warnings)
    return Table(
        kind="apm",
        sector_size=block,
        disk_id="",
        partitions=disjoint(found, warnings),
        metadata=((0, min(occupied, source.size)),),
        warnings=tuple(warnings),
    )


def _text(raw: bytes) -> str:
    """Mac OS Roman up to the first NUL."""
    return raw.partition(b"\0")[0].decode("mac_roman")
