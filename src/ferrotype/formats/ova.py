"""OVA: a virtual machine in one tar archive, and other tar archives with disk images.

    | vm.ovf | vm.mf | vm-disk1.vmdk | vm-disk2.vmdk | ...

The descriptor (.ovf) says which files are disks; without one, their names do.  The manifest (.mf) has a hash of every
file.  A disk may be compressed (gzip) or stand in chunks (NAME.000000000 ...).  Disks are read where they stand:
nothing is taken out of the archive.  Written from DMTF DSP0243, version 2.1.1, sections 6 and 7.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Final
from xml.etree import ElementTree as ET

from ferrotype.block import Source, read
from ferrotype.block.views import Concat, Slice
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats import Image
from ferrotype.formats.archive import Entry, archive_image, disks_among
from ferrotype.formats.related import Related
from ferrotype.formats.tar import Member, members
from ferrotype.job import Job
from ferrotype.units import MiB

__all__ = ["open", "probe"]

_MOST_TEXT: Final = MiB  # bytes of a descriptor or a manifest
_CHUNK: Final = re.compile(r"(.+)\.(\d{9})", re.DOTALL)
_LINE: Final = re.compile(r"\s*(SHA1|SHA256|SHA512)\s*\((.+)\)\s*=\s*([0-9a-f]+)\s*", re.IGNORECASE)
_PIECE: Final = MiB


def probe(file: Source) -> bool:
    """Whether the first block is a tar header."""
    return file.size > 512 and read(file, 257, 5) == b"ustar"


def open(file: Source, related: Related) -> Image:
    """The disk in it, or all of them by their names."""
    found, complete = members(file)
    files = {member.name.removeprefix("./"): member for member in found}
    parts = _joined(files)
    warnings = () if complete else ("the tar archive has no end mark, and may be cut short",)
    descriptor = next((name for name in files if name.lower().endswith(".ovf")), None)
    names = None
    if descriptor is not None:
        names = _disks_told(_text(file, files[descriptor]))
    if not names:
        names = disks_among([name for name in parts if not name.lower().endswith((".ovf", ".mf", ".cert"))])
    lost = next((name for name in names if name not in parts), None)
    if lost is not None:
        raise InvalidImage(f"the descriptor names the disk {lost!r}, which the archive does not hold")
    entries = [Entry(name, lambda _, name=name: _content(file, parts[name])) for name in names]  # type: ignore[misc]
    manifest = next((name for name in files if name.lower().endswith(".mf")), None)
    stated = _stated(_text(file, files[manifest])) if manifest is not None else {}
    return archive_image(
        "ova",
        file,
        related,
        entries,
        warnings=warnings,
        check=(lambda job: _damages(file, files, stated, job)) if stated else None,
    )


def _joined(files: dict[str, Member]) -> dict[str, list[Member]]:
    """Every file with its chunks in order.  Raises InvalidImage where one is missing."""
    parts: dict[str, list[Member]] = {}
    for name in sorted(files):
        match = _CHUNK.fullmatch(name)
        whole = match[1] if match is not None else name
        if match is not None and int(match[2]) != len(parts.get(whole, ())):
            raise InvalidImage(f"chunk {len(parts.get(whole, ()))} of {whole!r} is not in the archive")
        parts.setdefault(whole, []).append(files[name])
    return {name: parts[name] for name in dict.fromkeys(_CHUNK.sub(r"\1", one) for one in files)}


def _content(file: Source, parts: Sequence[Member]) -> Source:
    if any(part.sparse for part in parts):
        raise UnsupportedError("sparse members of tar archives are not read: take it out with tar -xf first")
    slices = [Slice(file, part.offset, part.size) for part in parts]
    return slices[0] if len(slices) == 1 else Concat(slices)


def _text(file: Source, member: Member) -> bytes:
    if member.size > _MOST_TEXT or member.sparse:
        raise InvalidImage(f"{member.name!r} has {member.size} bytes, which is no text", offset=member.offset)
    return read(file, member.offset, member.size)


def _disks_told(text: bytes) -> list[str]:
    """The names of the files that the descriptor's disks stand in, in the order of its references."""
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise InvalidImage("the OVF descriptor has a document type, which none has")
    try:
        tree = ET.fromstring(text)  # noqa: S314  no document type, so no entities
    except (ET.ParseError, ValueError, LookupError) as error:
        raise InvalidImage(f"the OVF descriptor is damaged: {error}") from None
    wanted = {_attributes(element).get("fileRef") for element in tree.iter() if _tag(element.tag) == "Disk"}
    files = [_attributes(element) for element in tree.iter() if _tag(element.tag) == "File"]
    named = [file.get("href", "") for file in files if file.get("id") in wanted]
    return [name.removeprefix("./") for name in dict.fromkeys(named) if name and PurePosixPath(name).name]


def _tag(name: str) -> str:
    return name.rpartition("}")[2]


def _attributes(element: ET.Element) -> dict[str, str]:
    return {_tag(key): value for key, value in element.attrib.items()}


def _stated(text: bytes) -> dict[str, tuple[str, str]]:
    """What the manifest says: algorithm and hex digits of each file."""
    matches = (_LINE.fullmatch(line) for line in text.decode("utf-8", "replace").splitlines())
    return {match[2]: (match[1].lower(), match[3].lower()) for match in matches if match is not None}


def _damages(file: Source, files: dict[str, Member], stated: dict[str, tuple[str, str]], job: Job) -> list[str]:
    """A sentence for each file that is not what the manifest says."""
    found = []
    for name, (algorithm, digits) in stated.items():
        member = files.get(name.removeprefix("./"))
        if member is None:
            found.append(f"{name}: the manifest names it, and the archive does not hold it")
            continue
        known = hashlib.new(algorithm)
        for at in range(0, member.size, _PIECE):
            piece = read(file, member.offset + at, min(_PIECE, member.size - at))
            known.update(piece)
            job.advance(len(piece))
        if known.hexdigest() != digits:
            found.append(f"{name}: its {algorithm.upper()} is not the one in the manifest")
    return found
