"""tar archives: where their members stand.

    | header, 512 | content, to a multiple of 512 | header | content | ... | two blocks of zeros |

Written from POSIX.1-2017, "pax", sections "ustar Interchange Format" and "pax Header Block", and GNU tar's manual on
long names and large numbers.  Nothing is unpacked; links and devices are none of the members.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Final

from ferrotype.block import Source, read
from ferrotype.errors import InvalidImage
from ferrotype.records import Record, b8, record
from ferrotype.units import MiB

__all__ = ["Member", "members"]

_BLOCK: Final = 512
_MOST: Final = 100_000  # headers
_MOST_WORDS: Final = MiB  # bytes of a long name, or of a pax header
_REGULAR: Final = (b"0", b"\0", b"7")
_SPARSE: Final = b"S"


@record(endian="<", size=512)
class Header(Record):
    name: Annotated[bytes, "100s"]
    mode: b8
    uid: b8
    gid: b8
    size: Annotated[bytes, "12s"]
    mtime: Annotated[bytes, "12s"]
    chksum: b8
    typeflag: Annotated[bytes, "1s"]
    linkname: Annotated[bytes, "100s"]
    magic: b8
    uname: Annotated[bytes, "32s"]
    gname: Annotated[bytes, "32s"]
    devmajor: b8
    devminor: b8
    prefix: Annotated[bytes, "155s"]
    rest: Annotated[bytes, "12s"]


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file."""

    name: str
    offset: int  # of its content in the archive
    size: int
    sparse: bool  # kept without its holes, in a way of its own


def members(file: Source) -> tuple[list[Member], bool]:
    """All regular files, and whether the mark of the archive's end is there.  Raises InvalidImage."""
    found: list[Member] = []
    at, words = 0, dict[str, str]()
    for _ in range(_MOST):
        if at + _BLOCK > file.size:
            return found, False
        block = read(file, at, _BLOCK)
        if not any(block):
            return found, True
        header = _checked(block, at)
        kind, start = header.typeflag, at + _BLOCK
        size = _number(header.size, at)
        if kind in _REGULAR and "size" in words:
            size = _decimal(words["size"], at)
        if start + size > file.size:
            raise InvalidImage(f"the tar archive is cut short: {size} bytes at {start} are not there", offset=at)
        at = start + -(-size // _BLOCK) * _BLOCK
        if kind in (b"L", b"x"):
            if size > _MOST_WORDS:
                raise InvalidImage(f"a name of {size} bytes in the tar archive", offset=start)
            content = read(file, start, size)
            words.update({"path": _text(content)} if kind == b"L" else dict(_pax(content, start)))
            continue
        if kind in (b"K", b"g"):
            continue
        if kind in (*_REGULAR, _SPARSE):
            sparse = kind == _SPARSE or any(key.startswith("GNU.sparse.") for key in words)
            found.append(Member(words.get("path") or _name(header), start, size, sparse))
        words = {}
    raise InvalidImage(f"the tar archive has more than {_MOST} members")


def _checked(block: bytes, at: int) -> Header:
    header = Header.unpack(block)
    total = sum(block) - sum(header.chksum) + 8 * 0x20
    if header.magic[:5] != b"ustar" or _number(header.chksum, at) != total:
        raise InvalidImage("a header of the tar archive is damaged", offset=at, field="chksum")
    return header


def _number(field: bytes, at: int) -> int:
    if field[0] & 0x80:  # GNU: a large number, as it is
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.strip(b" \0")
    if text.strip(b"01234567"):
        raise InvalidImage("a number in the tar archive is none", offset=at)
    return int(text or b"0", 8)


def _decimal(text: str, at: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise InvalidImage("a number in the tar archive is none", offset=at)
    return int(text)


def _pax(content: bytes, at: int) -> Iterator[tuple[str, str]]:
    """The records of a pax header: ``25 path=a name`` and a new line."""
    while content:
        length, _, _ = content[:20].partition(b" ")
        count = int(length) if length.isdigit() else 0
        key, equals, value = content[len(length) + 1 : count].rstrip(b"\n").partition(b"=")
        if not equals or count > len(content):
            raise InvalidImage("a header of the tar archive is damaged", offset=at)
        yield _text(key), _text(value)
        content = content[count:]


def _name(header: Header) -> str:
    prefix = _text(header.prefix) if header.magic == b"ustar\x0000" else ""
    return f"{prefix}/{_text(header.name)}" if prefix else _text(header.name)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")
