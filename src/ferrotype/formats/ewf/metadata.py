"""What an EWF image says about the disk and how it was taken: the media, the case, dates, hashes.

The values stand in small texts of tab separated columns, one line of names over one of values:

    1                               categories
    main                            name of the first
    c    n    a    e    t ...       identifiers
    42   1    ...                   values

Source: "Expert Witness Compression Format specification", Header section, Header2 section, Header values, Xheader;
version 2 of it, Device information and Case data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import FormatError
from ferrotype.formats.codecs import inflate_sealed
from ferrotype.formats.ewf.bzip2 import bunzip2_sealed
from ferrotype.units import MiB

__all__ = [
    "MEDIA_TYPES",
    "NAMED",
    "Case",
    "Media",
    "drive_type",
    "facts",
    "header_values",
    "keep_values",
    "sectors_sentence",
    "text_of",
]

_LARGEST_TEXT: Final = 4 * MiB  # bytes of a header when opened; what people type stays far below
_LISTED: Final = 1000  # unreadable ranges named one by one

MEDIA_TYPES: Final = {0x00: "removable", 0x01: "fixed", 0x03: "optical", 0x0E: "logical evidence", 0x10: "memory"}
_DRIVE_TYPES: Final = {
    "a": "RAM disk",
    "c": "optical",
    "f": "fixed",
    "l": "logical evidence",
    "m": "memory",
    "p": "PALM",
    "r": "removable",
}

_NAMES: Final = {  # identifiers of header and header2
    "c": "case_number",
    "n": "evidence_number",
    "a": "description",
    "e": "examiner_name",
    "t": "notes",
    "md": "model",
    "sn": "serial_number",
    "l": "label",
    "av": "program_version",
    "ov": "os",
    "m": "acquired",
    "u": "system_date",
    "p": "password",
}
_NAMES_2: Final = {  # of device information and case data
    "cn": "case_number",
    "en": "evidence_number",
    "nm": "description",
    "ex": "examiner_name",
    "nt": "notes",
    "md": "model",
    "sn": "serial_number",
    "lb": "label",
    "av": "program_version",
    "os": "os",
    "at": "acquired",  # the specification likens it to the system date, libewf, whom users compare with, does not
    "tt": "system_date",
}
_NAMES_X: Final = {  # elements of xheader
    "case_number": "case_number",
    "evidence_number": "evidence_number",
    "description": "description",
    "examiner_name": "examiner_name",
    "notes": "notes",
    "model": "model",
    "serial_number": "serial_number",
    "acquiry_operating_system": "os",
    "acquiry_software": "program",
    "acquiry_software_version": "program_version",
    "acquiry_date": "acquired",
    "system_date": "system_date",
}
NAMED: Final = frozenset(_NAMES.values())  # what values are called in facts
_ESCAPED: Final = {1: "\n", 2: "\r", 3: "\t"}  # of version 2: what divides lines and columns, within a value
_UNPACK: Final[Mapping[str, Callable[[bytes, int], bytes]]] = {
    "none": lambda data, _: data,
    "zlib": inflate_sealed,
    "bzip2": bunzip2_sealed,
}
_ELEMENT: Final = re.compile(r"<(\w+)>([^<]*)</\1>")


@dataclass(frozen=True, slots=True)
class Media:
    """The disk that was taken.  Raises nothing; whoever makes one has checked it."""

    sectors: int
    sector_size: int  # bytes
    chunk_sectors: int
    media_type: str
    physical: bool = True
    write_blocker: str = ""
    level: str = ""  # of compression, as the image states it
    error_granularity: int = 0  # sectors
    set_identifier: bytes = bytes(16)

    @property
    def size(self) -> int:
        return self.sectors * self.sector_size

    @property
    def chunk_size(self) -> int:
        return self.chunk_sectors * self.sector_size

    @property
    def chunks(self) -> int:
        return -(-self.sectors // self.chunk_sectors)

    def within(self, unreadable: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Rows of first sector and count as (start, length) in bytes, as far as they lie on the disk."""
        first = np.clip(unreadable[:, 0], 0, self.sectors)
        count = np.clip(unreadable[:, 1], 0, self.sectors - first)
        kept = count > 0
        columns = (first[kept] * self.sector_size).tolist(), (count[kept] * self.sector_size).tolist()
        return list(zip(*columns, strict=True))


@dataclass(slots=True)
class Case:
    """What was found about the acquiry while the sections were walked through."""

    values: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    unreadable: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))  # sector, count
    sessions: list[tuple[int, bool]] = field(default_factory=list)  # first sector, audio?
    warnings: list[str] = field(default_factory=list)


def text_of(data: bytes, *, wide: bool, packed: str = "zlib") -> str:
    """The text of a header section: UTF-16 (``wide``), or a narrow encoding, packed by zlib, bzip2 or "none".

    Raises InvalidImage where the stream is damaged.
    """
    plain = _UNPACK[packed](data, _LARGEST_TEXT)
    if wide or plain[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return plain.decode("utf-16" if plain[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-16-le", "replace")
    try:
        return plain.decode("utf-8-sig")
    except UnicodeDecodeError:
        return plain.decode("cp1252", "replace")


def header_values(text: str, kind: str) -> dict[str, str]:
    """The values of a header by the names facts use.  Empty ones are left out; dates are made ISO 8601.

    ``kind``: ``header`` (and ``header2``), ``xheader``, ``main`` of version 2, whose identifiers nobody renamed stay.
    """
    if kind == "xheader":
        pairs = [(_NAMES_X.get(name, ""), value) for name, value in _ELEMENT.findall(text)]
    else:
        names = _NAMES if kind == "header" else _NAMES_2
        keep = kind == "main"
        pairs = [(names.get(key, key if keep else ""), value) for key, value in _columns(text)]
    if kind == "main":
        pairs = [(name, value.translate(_ESCAPED)) for name, value in pairs]
    values = {name: value.strip() for name, value in pairs if name and value.strip()}
    if values.get("password") == "0":
        del values["password"]
    for name in ("acquired", "system_date"):
        if name in values:
            values[name] = _date(values[name])
    return values


def _columns(text: str) -> list[tuple[str, str]]:
    lines = text.replace("\r", "").split("\n")
    at = lines.index("main") if "main" in lines else 1
    keys = lines[at + 1].split("\t") if len(lines) > at + 1 else []
    values = lines[at + 2].split("\t") if len(lines) > at + 2 else []
    return list(zip(keys, values, strict=False))


def _date(text: str) -> str:
    """A POSIX time as RFC 3339; year, month ... second as local time of the acquiring system; others as they are."""
    parts = text.split()
    with suppress(ValueError):  # as xheader has them: Sat Jan 20 18:32:08 2007 CET
        spoken = datetime.strptime(" ".join(parts[1:5]), "%b %d %H:%M:%S %Y").isoformat()  # noqa: DTZ007
        return spoken + "Z" if parts[5:] == ["UTC"] else spoken
    if not all(part.isascii() and part.isdigit() and len(part) < 12 for part in parts):
        return text
    try:
        if len(parts) == 1:
            return datetime.fromtimestamp(int(parts[0]), UTC).isoformat().replace("+00:00", "Z")
        return datetime(*map(int, parts[:6])).isoformat()  # type: ignore[arg-type]  # noqa: DTZ001
    except (ValueError, OverflowError, TypeError, OSError):
        return text


def sectors_sentence(unreadable: NDArray[np.int64]) -> str:
    """What the user must know of the unreadable sectors before believing the disk."""
    return (
        f"{int(unreadable[:, 1].sum())} sectors in {len(unreadable)} ranges could not be read when the image was "
        "made; they hold what the acquiring program put there, mostly zeros"
    )


def facts(media: Media, case: Case, subformat: str, compression: str, names: Sequence[str]) -> Mapping[str, object]:
    """All of it for people and scripts."""
    values = dict(case.values)
    password = values.pop("password", None)
    found: dict[str, object] = {
        "subformat": subformat,
        "unit": media.chunk_size,
        "compression": compression,
        "segments": len(names),
        "files": list(names[1:]),
        "media_type": media.media_type,
        "physical": media.physical,
        "sectors": media.sectors,
        "bytes_per_sector": media.sector_size,
        **values,
    }
    if "acquired" in values:
        found["created"] = values["acquired"]
    if password is not None:
        found["password"] = True  # a word asked for by some programs; nothing is encrypted by it
    if media.level:
        found["compression_level"] = media.level
    if media.error_granularity:
        found["error_granularity"] = media.error_granularity
    if media.write_blocker:
        found["write_blocker"] = media.write_blocker
    if any(media.set_identifier):
        found["set_identifier"] = media.set_identifier.hex()
    if len(case.unreadable):
        found["unreadable_sectors"] = case.unreadable[:_LISTED].tolist()  # [first, count]
    if case.sessions:
        found["sessions"] = [{"start": start, "audio": audio} for start, audio in case.sessions]
    return found


def keep_values(case: Case, data: bytes, kind: str, *, wide: bool) -> None:
    """Add what a header section says; the first to name a value is believed.  A damaged one is a warning."""
    try:
        found = header_values(text_of(data, wide=wide), kind)
    except FormatError as error:
        case.warnings.append(f"a header section is damaged, case data may be missing: {error}")
        return
    for name, value in found.items():
        case.values.setdefault(name, value)


def drive_type(letter: str) -> str:
    """Version 2's drive type in words."""
    return _DRIVE_TYPES.get(letter, letter)
