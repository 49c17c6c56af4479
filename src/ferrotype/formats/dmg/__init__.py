"""Apple's disk images (UDIF, ``.dmg``): a disk in runs, each zeros, bytes as they are, or packed.

    data fork                                 property list (XML)         trailer
    +---------------------------------------+ +-------------------------+ +------+
    | run | run | run | ...  in any order   | | blkx: MBR | GPT | HFS+  | | koly |   the last 512 bytes,
    +---------------------------------------+ +------|-----|-----|------+ +------+   seldom the first ones
                                                     tables of runs: sectors <- offset, length

    UDRO raw | UDCO ADC | UDZO zlib | UDBZ bzip2 | ULFO LZFSE | ULMO xz

An image may be split: disk.dmg holds the tables, disk.002.dmgpart and so on the rest of the data fork, each with a
trailer.  Encrypted, sparse and bundle images are recognised and refused.  Written from the public descriptions of the
format, as Apple published none; checksums as its own images have them.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import numpy as np

from ferrotype.block import Source, Traits, read
from ferrotype.block.views import Concat, Slice, Unavailable
from ferrotype.errors import FerrotypeError, InvalidImage, UnsupportedError
from ferrotype.formats import MAX_SIZE, Image
from ferrotype.formats.dmg.blocks import SECTOR, Checksum, Table, from_fork, from_property_list
from ferrotype.formats.dmg.check import checker
from ferrotype.formats.dmg.runs import CODECS, DmgLayout
from ferrotype.formats.mapped import MappedSource
from ferrotype.formats.outside import attempt
from ferrotype.formats.related import Related
from ferrotype.formats.signs import trailer_place
from ferrotype.records import Record, b4, b16, record, u32, u64
from ferrotype.units import MiB

__all__ = ["open", "open_folder", "probe", "probe_folder"]

MOST_SEGMENTS: Final = 1000

_REFUSED: Final = {
    b"encrcdsa": "the image is encrypted (version 2)",
    b"cdsaencr": "the image is encrypted (version 1)",
    b"sprs": "this is a sparse image (.sparseimage)",
}


@record(endian=">", size=512)
class Koly(Record):
    """The trailer."""

    signature: b4
    version: u32
    header_size: u32
    flags: u32
    running_data_fork_offset: u64  # where this segment's part begins in the data fork of all
    data_fork_offset: u64
    data_fork_length: u64
    rsrc_fork_offset: u64
    rsrc_fork_length: u64
    segment_number: u32
    segment_count: u32
    segment_id: b16
    data_checksum_type: u32
    data_checksum_bits: u32
    data_checksum: Annotated[bytes, "128s"]
    xml_offset: u64
    xml_length: u64
    reserved: Annotated[bytes, "120s"]
    checksum_type: u32
    checksum_bits: u32
    checksum: Annotated[bytes, "128s"]
    image_variant: u32
    sector_count: u64
    reserved_2: Annotated[bytes, "12s"]


def probe(file: Source) -> bool:
    """Whether there is a trailer, or one of the forms that are refused."""
    return _refusal(file) is not None or _find(file) is not None


def probe_folder(path: Path) -> bool:
    """Whether the folder is a sparse bundle, which is refused."""
    return path.suffix == ".sparsebundle" or ((path / "bands").is_dir() and (path / "token").exists())


def open_folder(path: Path, related: Related) -> Image:  # noqa: ARG001  the protocol's signature
    """Refuse it: a sparse bundle's bands are in no documented order of time."""
    raise UnsupportedError("this is a sparse bundle (.sparsebundle); convert it to a .dmg with hdiutil first")


def open(file: Source, related: Related) -> Image:
    """The disk in the image.  Raises UnsupportedError for what is encrypted or sparse.  ``missing``: a segment."""
    refusal = _refusal(file)
    if refusal is not None:
        raise UnsupportedError(f"{refusal}; convert it to a plain .dmg with hdiutil first")
    found = _find(file)
    if found is None:
        raise InvalidImage("the image has no trailer", offset=max(0, file.size - Koly.SIZE))
    place, koly = found
    _check(koly, place, file.size)
    with ExitStack() as stack:
        data, missing = _data_fork(file, koly, related, stack)
        tables = _tables(file, koly)
        size = _disk_size(koly, tables)
        layout = DmgLayout(tables, data, size)
        keep = stack.pop_all()
    keep.callback(file.close)
    source = MappedSource(data, layout, size, name="dmg", traits=Traits(preferred_size=MiB))
    return Image(
        "dmg",
        source,
        facts=_facts(koly, tables, layout),
        check=checker(layout, tables, _checksums(koly), data, koly.data_fork_length),
        close=keep.close,
        missing=missing,
    )


def _checksums(koly: Koly) -> tuple[int | None, int | None]:
    """CRC-32 of the data fork of this file, and that of the tables' checksums; None where it is not stated."""
    return (
        Checksum(koly.data_checksum_type, koly.data_checksum_bits, koly.data_checksum).crc32(),
        Checksum(koly.checksum_type, koly.checksum_bits, koly.checksum).crc32(),
    )


# ---------------------------------------------------------------------- the trailer


def _refusal(file: Source) -> str | None:
    head, tail = read(file, 0, min(file.size, 8)), read(file, max(0, file.size - 8), min(file.size, 8))
    return _REFUSED.get(head) or _REFUSED.get(head[:4]) or _REFUSED.get(tail)


def _find(file: Source) -> tuple[int, Koly] | None:
    """The trailer and its place: at the end but for padding, or at the start of images that were made so."""
    if file.size < Koly.SIZE:
        return None
    padded = trailer_place(file, b"koly")
    for place in (file.size - Koly.SIZE, *([] if padded is None else [padded]), 0):
        koly = Koly.unpack(read(file, place, Koly.SIZE))
        if koly.signature == b"koly" and koly.header_size == Koly.SIZE:
            return place, koly
    return None


def _check(koly: Koly, place: int, size: int) -> None:
    if koly.version != 4:
        raise UnsupportedError(f"version {koly.version} of the format is not known", offset=place, field="Version")
    parts = {
        "DataForkOffset": (koly.data_fork_offset, koly.data_fork_length),
        "RsrcForkOffset": (koly.rsrc_fork_offset, koly.rsrc_fork_length),
        "XMLOffset": (koly.xml_offset, koly.xml_length),
    }
    for field, (start, length) in parts.items():
        if start + length > size:
            raise InvalidImage(f"{length} bytes at {start} lie outside the file of {size}", offset=place, field=field)
    if koly.sector_count > MAX_SIZE // SECTOR:
        raise InvalidImage(f"a disk of {koly.sector_count} sectors cannot be", offset=place, field="SectorCount")


def _tables(file: Source, koly: Koly) -> list[Table]:
    if koly.xml_length:
        return from_property_list(file, koly.xml_offset, koly.xml_length)
    if koly.rsrc_fork_length:
        return from_fork(file, koly.rsrc_fork_offset, koly.rsrc_fork_length)
    raise InvalidImage("the image has neither a property list nor a resource fork", field="XMLLength")


def _disk_size(koly: Koly, tables: list[Table]) -> int:
    end = max((table.first + table.count for table in tables), default=0)
    if not tables:
        raise InvalidImage("the image has no block table", field="blkx")
    if koly.sector_count and end > koly.sector_count:
        raise InvalidImage(
            f"the block tables reach to sector {end} of a disk that has {koly.sector_count}", field="SectorCount"
        )
    if end > MAX_SIZE // SECTOR:
        raise InvalidImage(f"a disk of {end} sectors cannot be", field="SectorCount")
    return (koly.sector_count or end) * SECTOR


# ---------------------------------------------------------------------- segments


def _data_fork(file: Source, koly: Koly, related: Related, stack: ExitStack) -> tuple[Source, FerrotypeError | None]:
    """The whole data fork, of this file or of all segments one behind the other, and why one cannot be had."""
    first = Slice(file, koly.data_fork_offset, koly.data_fork_length)
    if koly.segment_count <= 1:
        return first, None
    if koly.segment_number != 1:
        raise UnsupportedError("this is a later segment; open the first one, which is called .dmg")
    if koly.segment_count > MOST_SEGMENTS:
        raise InvalidImage(f"{koly.segment_count} segments are too many", field="SegmentCount")
    if related.path is None:
        raise UnsupportedError("an image of several segments must be a file with the others beside it")
    stem = re.sub(r"\.dmg\Z", "", related.path.name, flags=re.IGNORECASE)
    parts: list[Source] = [first]
    for number in range(2, koly.segment_count + 1):
        name = f"{stem}.{number:03}.dmgpart"
        part, refused = attempt(partial(related.sibling, name, "segment"))
        if part is None:
            missing = refused or InvalidImage(f"segment {number} of {koly.segment_count} is missing: {name}")
            return Unavailable(MAX_SIZE, Traits(), missing), missing  # nothing says how long it all is
        stack.callback(part.close)
        found = _find(part)
        if found is None:
            raise InvalidImage(f"the segment {name} has no trailer")
        _check(found[1], found[0], part.size)
        _same_image(koly, found[1], name, number, sum(one.size for one in parts))
        parts.append(Slice(part, found[1].data_fork_offset, found[1].data_fork_length))
    return Concat(parts), None


def _same_image(first: Koly, other: Koly, name: str, number: int, start: int) -> None:
    same = (first.segment_id, first.segment_count, number, start)
    if same != (other.segment_id, other.segment_count, other.segment_number, other.running_data_fork_offset):
        raise InvalidImage(f"{name} is not segment {number} of this image", field="SegmentID")


# ---------------------------------------------------------------------- what is told


def _facts(koly: Koly, tables: list[Table], layout: DmgLayout) -> dict[str, object]:
    used = [CODECS[kind] for kind in np.unique(layout.kinds).tolist() if kind in CODECS]
    sizes = (layout.ends - layout.starts)[layout.packed]
    data, master = _checksums(koly)
    return {
        "subformat": "+".join(one[0] for one in used) or "UDRO",
        "compression": "+".join(one[1] for one in used) or "none",
        "unit": int(sizes.max()) if len(sizes) else SECTOR,
        "segments": max(1, koly.segment_count),
        "tables": [table.name.strip() for table in tables[:128]],
        "data_crc32": None if data is None else f"{data:08x}",
        "master_crc32": None if master is None else f"{master:08x}",
        "encrypted": False,
    }
