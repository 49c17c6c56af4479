"""zip archives that hold disk images: as downloads come.

Stored members are read where they stand; others are unpacked once, and their CRC-32 is proven before the first byte
is handed out.  AFF4 volumes, which are zip files as well, have a module of their own.
"""

from __future__ import annotations

import zlib
from typing import Final

from ferrotype.block import Source, read
from ferrotype.block.views import Slice
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats import Image
from ferrotype.formats.archive import Entry, archive_image, disks_among
from ferrotype.formats.compressed import unpack
from ferrotype.formats.related import Related
from ferrotype.formats.zipfile import ZipFile
from ferrotype.job import Job
from ferrotype.units import MiB

__all__ = ["open", "probe"]

_METHODS: Final = {8: "deflate", 12: "bz2", 93: "zst", 95: "xz"}  # APPNOTE.TXT, section 4.4.5
_STORED: Final = 0


def probe(file: Source) -> bool:
    """Whether a zip file begins here."""
    return file.size >= 22 and read(file, 0, 4) in (b"PK\3\4", b"PK\5\6")


def open(file: Source, related: Related) -> Image:
    """The disk in it, or all of them by their names.  Encrypted archives are refused."""
    archive = ZipFile(file)
    raw = {name.decode("utf-8", "replace"): name for name in archive.names() if not name.endswith(b"/")}
    names = disks_among(list(raw))
    entries = [Entry(name, lambda within, name=name: _content(archive, raw[name], within)) for name in names]  # type: ignore[misc]
    return archive_image(
        "zip", file, related, entries, check=lambda job: _damages(archive, {name: raw[name] for name in names}, job)
    )


def _damages(archive: ZipFile, names: dict[str, bytes], job: Job) -> list[str]:
    """A sentence for each disk whose CRC-32 is another."""
    found = []
    for name, raw in names.items():
        member = archive.find(raw)
        if member is None or member.method != _STORED:
            job.advance(member.packed_size if member is not None else 0)
            continue  # proven when it is unpacked
        crc = 0
        for at in range(0, member.size, MiB):
            piece = read(archive.file, member.offset + at, min(MiB, member.size - at))
            crc = zlib.crc32(piece, crc)
            job.advance(len(piece))
        if crc != member.crc:
            found.append(f"{name}: its CRC-32 is not the one in the zip archive")
    return found


def _content(archive: ZipFile, name: bytes, related: Related) -> Source:
    member = archive.find(name)
    if member is None:
        raise InvalidImage("the zip archive has lost a member")
    packed = Slice(archive.file, member.offset, member.packed_size)
    if member.method == _STORED:
        return packed
    compression = _METHODS.get(member.method)
    if compression is None:
        raise UnsupportedError(f"zip method {member.method} is not read: take it out with 7z x", field="method")
    crc = 0

    def hear(piece: bytes) -> None:
        nonlocal crc
        crc = zlib.crc32(piece, crc)

    scratch = unpack(packed, compression, related, "take it out with unzip", heard=hear)
    if scratch.size != member.size or crc != member.crc:
        scratch.close()
        raise InvalidImage("a member of the zip archive is damaged: its CRC-32 or its size is another")
    return scratch
