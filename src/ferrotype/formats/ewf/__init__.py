"""EWF, the Expert Witness Compression Format: E01 of EnCase, FTK Imager and linen, S01 of SMART, Ex01 of EnCase 7.

    disk.E01   | header, case | volume | sectors, table, table2 | ... | next |
    disk.E02   | data | sectors, table, table2 | ... | MD5, SHA-1 | done |

Forensic images: the disk in chunks, mostly 32 KiB, deflated one by one, each with a checksum, with the hashes of the
whole disk and what the examiner wrote down.  Every byte that is read is proven by its chunk's Adler-32.

``sections`` and ``tables`` read version 1, ``ewf2`` version 2, ``writer`` makes E01.
Logical evidence (L01, Lx01), which holds files instead of a disk, and encrypted images are refused.

Source: "Expert Witness Compression Format specification" and "... version 2 specification" (libyal).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

from ferrotype.block import Source, Traits, read
from ferrotype.errors import UnsupportedError
from ferrotype.formats import Image
from ferrotype.formats.ewf import ewf2 as version2
from ferrotype.formats.ewf import records
from ferrotype.formats.ewf import sections as version1
from ferrotype.formats.ewf.check import check_image
from ferrotype.formats.ewf.chunks import ChunkLayout
from ferrotype.formats.ewf.counts import behind_the_end, settled
from ferrotype.formats.ewf.metadata import facts, sectors_sentence
from ferrotype.formats.ewf.segments import Segments
from ferrotype.formats.ewf.tables import Tables
from ferrotype.formats.ewf.writer import OPTIONS, create
from ferrotype.formats.mapped import MappedSource
from ferrotype.formats.related import Related

__all__ = ["OPTIONS", "create", "open", "probe"]

_SAID: Final = 100  # warnings
_LOGICAL: Final = b"LVF\x09\x0d\x0a\xff\x00"
_ENCRYPTED: Final = b"ADCRYPT\0"


def probe(file: Source) -> bool:
    """Whether the file is a segment of an EWF image, logical evidence included."""
    known = (records.SIGNATURE, version2.SIGNATURE, version2.LOGICAL, _LOGICAL, _ENCRYPTED)
    return file.size >= 8 and read(file, 0, 8) in known


def open(file: Source, related: Related) -> Image:
    """The disk in the segment and those that follow it; their sections are walked through, their chunks not read.

    ``missing``: a segment.
    """
    signature = read(file, 0, min(file.size, 8))
    if signature in (_LOGICAL, version2.LOGICAL):
        raise UnsupportedError("a logical evidence file holds files, no disk", offset=0, field="signature")
    if signature == _ENCRYPTED:
        raise UnsupportedError("the image is encrypted by AD Encryption", offset=0, field="signature")
    segments = Segments(file, related)
    try:
        if signature == version2.SIGNATURE:
            return _open_version2(file, segments)
        return _open_version1(file, segments)
    except BaseException:
        segments.close_rest()
        raise


def _open_version1(file: Source, segments: Segments) -> Image:
    found = version1.gather(file, segments)
    tables = Tables(found.tables, segments, found.media.chunk_size)
    return _image(file, segments, tables, found, found.subformat, "zlib", tables.prove_some())


def _open_version2(file: Source, segments: Segments) -> Image:
    found = version2.gather(file, segments)
    tables = version2.SectorTables(found.tables, segments, found.packed)
    return _image(file, segments, tables, found, "EWF2-Ex01", found.compression)


def _image(
    file: Source,
    segments: Segments,
    chunks: Tables | version2.SectorTables,
    found: version1.Contents | version2.Contents,
    subformat: str,
    compression: str,
    mended: Sequence[str] = (),
) -> Image:
    case = found.case
    media, doubts = settled(found.media, found.said, chunks.count if found.missing is None else None)
    layout = ChunkLayout(media.size, media.chunk_size, segments, chunks)
    if found.missing is None:
        doubts += behind_the_end(layout, media)
    traits = Traits(sector_size=media.sector_size, sector_known=True)
    damage = case.warnings[:_SAID]
    if len(case.warnings) > _SAID:
        damage.append(f"{len(case.warnings) - _SAID} more sections are damaged")
    warnings = [*damage, *mended, *doubts]
    if len(case.unreadable):
        warnings.append(sectors_sentence(case.unreadable))
    return Image(
        "ewf",
        MappedSource(
            file,
            layout,
            media.size,
            name=segments.names[0],
            traits=traits,
            row=media.chunk_size,
            unreadable=media.within(case.unreadable),
        ),
        facts=facts(media, case, subformat, compression, segments.names),
        hashes=case.hashes,
        warnings=tuple(warnings),
        check=partial(check_image, layout, chunks, case.hashes, damage),
        close=segments.close,
        missing=found.missing,
    )
