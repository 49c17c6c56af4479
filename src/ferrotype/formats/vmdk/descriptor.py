"""The descriptor of a VMDK: a text that says what a disk consists of.

    # Disk DescriptorFile                  ``signs`` knows the other first lines
    version=1                              header: CID names the content, parentCID the parent's (ffffffff: none)
    CID=fffffffe
    parentCID=ffffffff
    createType="twoGbMaxExtentSparse"

    RW 4192256 SPARSE "disk-s001.vmdk"     extents: access, sectors, type, file, first sector in it
    RW 2097152 FLAT "disk-f002.vmdk" 0

    ddb.adapterType = "lsilogic"           disk database: what the virtual machine's software remembers

It is a file of its own, or stands inside a sparse extent.  Written from VMware's "Virtual Disk Format 5.0", section
"The Descriptor File".
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ferrotype.errors import InvalidImage, UnsupportedError, UsageError
from ferrotype.formats import MAX_SIZE, Spec

__all__ = ["ADAPTERS", "MAX_DESCRIPTOR", "NO_PARENT", "SECTOR", "Descriptor", "Extent", "parse", "render"]

SECTOR: Final = 512  # bytes, whatever the disk says to its machine
MAX_DESCRIPTOR: Final = 1 << 20  # bytes
MAX_EXTENTS: Final = 10_000  # each is a file that is held open
NO_PARENT: Final = 0xFFFFFFFF
ADAPTERS: Final = ("ide", "buslogic", "lsilogic", "legacyESX")
_MAX_LINE: Final = 8192  # characters; a path has up to 4096

_ENCODING: Final = re.compile(rb'^[ \t]*encoding[ \t]*=[ \t]*"?([A-Za-z0-9_.-]{1,40})', re.MULTILINE | re.IGNORECASE)
_ENCODINGS: Final = re.compile(
    r"utf-?8|(windows|cp)-?\d{3,4}|iso-?8859-\d\d?|gbk|gb2312|gb18030|big5|shift_?jis|euc-?\w\w"
)
_LINES: Final = re.compile(r"\r\n|\n|\r")
_EXTENT: Final = re.compile(
    r'(RW|RDONLY|NOACCESS)\s+(\d{1,19})\s+([A-Za-z]+)(?:\s+(?:"([^"]*)"|([^"\s]+)))?(?:\s+(\d{1,19}))?(\s+\S.*)?',
    re.IGNORECASE,
)
_SETTING: Final = re.compile(r'([A-Za-z][\w.:-]*)\s*=\s*(?:"(.*)"|(.*))')
_CID: Final = re.compile(r"(?:0x)?([0-9a-fA-F]{1,8})")


@dataclass(frozen=True, slots=True)
class Extent:
    """A line of the extent section."""

    access: str  # RW, RDONLY or NOACCESS
    sectors: int
    type: str  # in upper case: FLAT, SPARSE, ZERO, VMFS, VMFSSPARSE, SESPARSE, VMFSRDM ...
    name: str | None  # of the file, relative to the descriptor's
    offset: int | None  # sectors; where the extent begins in its file
    rest: str = ""  # further words, such as the identity of a device

    @property
    def size(self) -> int:
        """Bytes."""
        return self.sectors * SECTOR


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A descriptor, parsed."""

    create_type: str
    cid: int | None
    parent_cid: int
    parent_hint: str | None  # name of the parent's file
    extents: tuple[Extent, ...]
    database: dict[str, str]  # of the ddb lines, keys in lower case without the prefix

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return sum(extent.size for extent in self.extents)


def parse(data: bytes) -> Descriptor:
    """The descriptor that ``data`` holds, up to its first zero byte.

    Cases, blanks, quotes and ends of lines are taken as they come.  Raises InvalidImage where a line means nothing or
    what must be there is missing, UnsupportedError for an encrypted disk or a newer version.
    """
    settings: dict[str, str] = {}
    extents: list[Extent] = []
    for number, line in enumerate(_LINES.split(_text(data.split(b"\0", 1)[0])), 1):
        line = line.strip().lstrip("\ufeff")
        if not line or line.startswith("#"):
            continue
        if len(line) > _MAX_LINE:
            raise InvalidImage(f"line {number} of the descriptor has {len(line)} characters")
        if found := _EXTENT.fullmatch(line):
            extents.append(_extent(found, number))
        elif setting := _SETTING.fullmatch(line):
            _keep(settings, setting[1].lower(), setting[2] if setting[2] is not None else setting[3].strip(), number)
        else:
            raise InvalidImage(f"line {number} of the descriptor means nothing: {line[:60]!r}")
        if len(extents) > MAX_EXTENTS:
            raise InvalidImage(f"the descriptor has more than {MAX_EXTENTS} extents")
    return _descriptor(settings, tuple(extents))


def _text(data: bytes) -> str:
    """Decoded as the text itself says, UTF-8 where it does not; bytes that are not come back out as they were."""
    found = _ENCODING.search(data)
    name = found[1].decode("ascii").lower() if found else "utf-8"
    if not _ENCODINGS.fullmatch(name):
        name = "utf-8"
    try:
        return data.decode(name.replace("windows-", "cp"))
    except (LookupError, UnicodeDecodeError):
        return data.decode("utf-8", "surrogateescape")


def _extent(found: re.Match[str], number: int) -> Extent:
    access, sectors, kind, quoted, bare, offset, rest = found.groups()
    extent = Extent(
        access.upper(),
        int(sectors),
        kind.upper(),
        quoted if quoted is not None else bare,
        int(offset) if offset is not None else None,
        (rest or "").strip(),
    )
    if not 0 < extent.size <= MAX_SIZE or (extent.offset or 0) * SECTOR > MAX_SIZE:
        raise InvalidImage(f"line {number} of the descriptor names an extent of {sectors} sectors at {offset or 0}")
    return extent


def _keep(settings: dict[str, str], key: str, value: str, number: int) -> None:
    if key in settings and settings[key] != value and not key.startswith("ddb."):
        raise InvalidImage(f"line {number} of the descriptor says another {key} than a line before", field=key)
    settings[key] = value


def _descriptor(settings: dict[str, str], extents: tuple[Extent, ...]) -> Descriptor:
    if any(key.startswith("encryption.") or key.endswith(".keysafe") for key in settings):
        raise UnsupportedError("the disk is encrypted by VMware, which cannot be read")
    version = settings.get("version")
    if version not in ("1", "2", "3", "4"):
        known = "has no version" if version is None else f"is of version {version[:20]!r}"
        raise (InvalidImage if version is None else UnsupportedError)(f"the descriptor {known}", field="version")
    if "createtype" not in settings:
        raise InvalidImage("the descriptor does not say of what type the disk is", field="createType")
    if not extents:
        raise InvalidImage("the descriptor names no extents")
    descriptor = Descriptor(
        settings["createtype"],
        _cid(settings, "CID"),
        parent if (parent := _cid(settings, "parentCID")) is not None else NO_PARENT,
        settings.get("parentfilenamehint") or None,
        extents,
        {key[4:]: value for key, value in settings.items() if key.startswith("ddb.")},
    )
    if descriptor.size > MAX_SIZE:
        raise InvalidImage(f"the extents of the descriptor make a disk of {descriptor.size} bytes")
    return descriptor


def _cid(settings: dict[str, str], field: str) -> int | None:
    text = settings.get(field.lower())
    if text is None:
        return None
    found = _CID.fullmatch(text)
    if found is None:
        raise InvalidImage(f"{text[:20]!r} is no content identifier", field=field)
    return int(found[1], 16)


# ---------------------------------------------------------------------- writing


def render(create_type: str, extents: Sequence[Extent], spec: Spec) -> bytes:
    """The descriptor of a new disk without a parent.  Raises UsageError where a name cannot stand in it."""
    adapter, hardware_version = spec.get("adapter_type", "lsilogic"), spec.get("hardware_version", 4)
    cid = secrets.randbelow(NO_PARENT - 1)  # neither ffffffff nor fffffffe, which mean something
    lines = [
        "# Disk DescriptorFile",
        "version=1",
        'encoding="UTF-8"',
        f"CID={cid:08x}",
        f"parentCID={NO_PARENT:08x}",
        f'createType="{create_type}"',
        "",
        "# Extent description",
        *map(_extent_line, extents),
        "",
        "# The Disk Data Base",
        "#DDB",
        "",
        f'ddb.adapterType = "{adapter}"',
        *_geometry(sum(extent.sectors for extent in extents), adapter),
        f'ddb.longContentID = "{secrets.token_hex(12)}{cid:08x}"',
        f'ddb.uuid = "{_uuid()}"',
        f'ddb.virtualHWVersion = "{hardware_version}"',
        "",
    ]
    return "\n".join(lines).encode()


def _extent_line(extent: Extent) -> str:
    name = extent.name or ""
    try:
        name.encode()
    except UnicodeEncodeError:
        name = "\n"
    if any(character == '"' or character < " " for character in name):
        raise UsageError(f"{extent.name!r} cannot be named in a VMDK descriptor; choose a plainer file name")
    place = "" if extent.offset is None else f" {extent.offset}"
    return f'{extent.access} {extent.sectors} {extent.type} "{name}"{place}'


def _geometry(sectors: int, adapter: str) -> list[str]:
    """What a BIOS is told: 16 heads on IDE, and on SCSI as many as the adapters' own translation gives."""
    if adapter == "ide":
        heads, per_track, most = 16, 63, 16383
    else:
        heads, per_track, most = 255, 63, 65535
        for limit, few, shorter in ((1 << 21, 64, 32), (1 << 22, 128, 32)):  # below 1 GiB, below 2 GiB
            if sectors < limit:
                heads, per_track = few, shorter
                break
    cylinders = min(max(sectors // (heads * per_track), 1), most)
    return [
        f'ddb.geometry.cylinders = "{cylinders}"',
        f'ddb.geometry.heads = "{heads}"',
        f'ddb.geometry.sectors = "{per_track}"',
    ]


def _uuid() -> str:
    """Sixteen bytes in VMware's own range, as VMware writes them."""
    octets = b"\x60\x00\xc2" + bytes([0x90 | secrets.randbelow(16)]) + secrets.token_bytes(12)
    return f"{octets[:8].hex(' ')}-{octets[8:].hex(' ')}"
