"""VMDK extents laid out by hand, independently of the code under test: what no tool at hand writes.

Grains stand in shuffled order, so that a reader which takes them as they come is wrong.
"""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from ferrotype.block import read
from ferrotype.errors import FormatError, InvalidImage
from tests.formats.judges import opened

SECTOR = 512
PER_TABLE = 512
GRAIN = 64 << 10
AT_END = (1 << 64) - 1


def pad(data: bytes, size: int = SECTOR) -> bytes:
    return data + bytes(-len(data) % size)


def descriptor_text(lines: list[str], create_type: str, **more: str) -> str:
    settings = {"CID": "12345678", "parentCID": "ffffffff", "createType": f'"{create_type}"'} | more
    head = ["# Disk DescriptorFile", "version=1", *(f"{key}={value}" for key, value in settings.items())]
    return "\n".join([*head, "", "# Extent description", *lines, "", 'ddb.adapterType = "lsilogic"', ""])


def write_descriptor(path: Path, lines: list[str], create_type: str, **more: str) -> Path:
    path.write_text(descriptor_text(lines, create_type, **more))
    return path


def grains_of(content: bytes, grain: int) -> list[bytes]:
    return [content[at : at + grain].ljust(grain, b"\0") for at in range(0, len(content), grain)]


def shuffled(numbers: list[int], seed: int) -> list[int]:
    random.Random(seed).shuffle(numbers)
    return numbers


def cowd(content: bytes, *, grain: int = 512, holes: bool = True, seed: int = 1, flags: int = 3) -> bytes:
    """A COWD extent: header of 4 sectors, directory, those tables of 4096 entries that are needed, grains."""
    pieces = grains_of(content, grain)
    tables = -(-len(pieces) // 4096)
    first_table = 4 + -(-tables * 4 // SECTOR)
    entries = [0] * (tables * 4096)
    body = bytearray()
    used = sorted({n // 4096 for n, piece in enumerate(pieces) if any(piece) or not holes})
    first_grain = first_table + len(used) * 32
    for number in shuffled([n for n, piece in enumerate(pieces) if any(piece) or not holes], seed):
        entries[number] = first_grain + len(body) // SECTOR
        body += pieces[number]
    directory = [first_table + 32 * used.index(n) if n in used else 0 for n in range(tables)]
    head = struct.pack("<4s7I", b"COWD", 1, flags, len(content) // SECTOR, grain // SECTOR, 4, tables, 0)
    return (
        head.ljust(4 * SECTOR, b"\0")
        + pad(struct.pack(f"<{tables}I", *directory))
        + b"".join(struct.pack("<4096I", *entries[n * 4096 : (n + 1) * 4096]) for n in used)
        + bytes(body)
    )


def sesparse(content: bytes, zeroed: dict[int, int] | None = None, /, *, skip: int = 0, **header: int) -> bytes:
    """An seSparse extent; ``zeroed`` gives grains the types 1 or 2, both of which read as zeros.

    The first ``skip`` grains of the file are not in use.
    """
    seed = 2
    pieces = grains_of(content, 4096)
    tables = -(-len(pieces) // 4096)
    numbers = shuffled(list(range(tables)), seed + 1)  # which table stands where
    directory_sectors = -(-tables * 8 // SECTOR)
    entries = [0] * (tables * 4096)
    body = bytearray(skip * 4096)
    for number in shuffled([n for n, piece in enumerate(pieces) if any(piece)], seed):
        index = len(body) // 4096
        entries[number] = 3 << 60 | (index & 0xFFF) << 48 | index >> 12
        body += pieces[number]
    for number, kind in (zeroed or {}).items():
        entries[number] = kind << 60
    directory = [0x10000000 << 32 | numbers[n] for n in range(tables)]
    placed = bytearray(tables * 64 * SECTOR)
    for number in range(tables):
        at = numbers[number] * 64 * SECTOR
        placed[at : at + 64 * SECTOR] = struct.pack("<4096Q", *entries[number * 4096 : (number + 1) * 4096])
    tables_at = 2 + directory_sectors
    grains_at = tables_at + tables * 64
    fields: dict[str, Any] = {
        "magic": 0xCAFEBABE,
        "version": 0x200000001,
        "capacity": len(content) // SECTOR,
        "grain_size": 8,
        "grain_table_size": 64,
        "flags": 0,
        "reserved1": 0,
        "reserved2": 0,
        "reserved3": 0,
        "reserved4": 0,
        "volatile_header_offset": 1,
        "volatile_header_size": 1,
        "journal_header_offset": 0,
        "journal_header_size": 0,
        "journal_offset": 0,
        "journal_size": 0,
        "grain_dir_offset": 2,
        "grain_dir_size": directory_sectors,
        "grain_tables_offset": tables_at,
        "grain_tables_size": tables * 64,
        "free_bitmap_offset": 0,
        "free_bitmap_size": 0,
        "backmap_offset": 0,
        "backmap_size": 0,
        "grains_offset": grains_at,
        "grains_size": len(body) // SECTOR,
    }
    replay = header.pop("replay_journal", 0)
    volatile_magic = header.pop("volatile_magic", 0xCAFECAFE)
    fields |= header
    return (
        struct.pack("<26Q", *fields.values()).ljust(SECTOR, b"\0")
        + struct.pack("<4Q", volatile_magic, 0, 0, replay).ljust(SECTOR, b"\0")
        + pad(struct.pack(f"<{tables}Q", *directory))
        + bytes(placed)
        + bytes(body)
    )


def hosted_header(capacity: int, directory: int, descriptor_sectors: int, flags: int = 0x30001) -> bytes:
    head = struct.pack(
        "<4sIIQQQQIQQQB4sH", b"KDMV", 3, flags, capacity, 128, 1, descriptor_sectors, 512, 0, directory,
        128, 0, b"\n \r\n", 1,
    )  # fmt: skip
    return head.ljust(SECTOR, b"\0")


def stream(content: bytes, *, whole_last: bool = True, footer: bool = True) -> bytes:
    """A compressed stream as VMware's own tools write it; the last grain whole, or ending where the disk does."""
    capacity = len(content) // SECTOR
    text = pad(descriptor_text([f'RDONLY {capacity} SPARSE "stream.vmdk"'], "streamOptimized").encode())
    out = bytearray(pad(bytes(SECTOR) + text, GRAIN))
    directory: list[int] = []
    pieces = grains_of(content, GRAIN)
    if not whole_last and len(content) % GRAIN:
        pieces[-1] = pieces[-1][: len(content) % GRAIN]
    for first in range(0, len(pieces), PER_TABLE):
        table = [0] * PER_TABLE
        for number, piece in enumerate(pieces[first : first + PER_TABLE]):
            if any(piece):
                table[number] = len(out) // SECTOR
                packed = zlib.compress(piece, 6)
                out += pad(struct.pack("<QI", (first + number) * 128, len(packed)) + packed)
        out += pad(struct.pack("<QII", 4, 0, 1))
        directory.append(len(out) // SECTOR)
        out += struct.pack("<512I", *table)
    out += pad(struct.pack("<QII", -(-len(directory) * 4 // SECTOR), 0, 2))
    at = len(out) // SECTOR
    out += pad(struct.pack(f"<{len(directory)}I", *directory))
    out += pad(struct.pack("<QII", 1, 0, 3)) + hosted_header(capacity, at, len(text) // SECTOR) + bytes(SECTOR)
    out[:SECTOR] = hosted_header(capacity, AT_END if footer else at, len(text) // SECTOR)
    out[SECTOR : SECTOR + len(text)] = text
    return bytes(out)


def parse_stream(data: bytes) -> dict[str, Any]:
    """Walk a stream by its markers alone, and hold its tables against what was met.  Returns what it holds."""
    header = struct.unpack_from("<4sIIQQQQIQQQB4sH", data)
    magic, version, flags, capacity, grain, text_at, text_size, per_table, copy, directory_at, overhead = header[:11]
    assert (magic, version, flags, grain, per_table, copy) == (b"KDMV", 3, 0x30001, 128, 512, 0)
    assert directory_at == AT_END
    assert header[11:] == (0, b"\n \r\n", 1)
    disk = bytearray(-(-capacity // 128) * GRAIN)
    text = data[text_at * SECTOR : (text_at + text_size) * SECTOR].rstrip(b"\0").decode()
    at, last, table, directory, met = overhead * SECTOR, -1, {}, {}, []
    footer = b""
    while at < len(data):
        value, size, kind = struct.unpack_from("<QII", data, at)
        if size:
            number = value // 128
            assert value % 128 == 0
            assert number > last, "grains ascend"
            stream = zlib.decompressobj()
            plain = stream.decompress(data[at + 12 : at + 12 + size])
            assert stream.eof
            assert len(plain) == GRAIN
            assert any(plain), "grains of zeros are left out"
            disk[number * GRAIN : (number + 1) * GRAIN] = plain
            table[number] = at // SECTOR
            end = at + 12 + size
            assert not any(data[end : end + -end % SECTOR])
            last, at = number, end + -end % SECTOR
            continue
        assert not any(data[at + 16 : at + SECTOR])
        met.append(kind)
        at += SECTOR
        body = data[at : at + value * SECTOR]
        if kind == 1:
            entries = struct.unpack("<512I", body)
            numbers = {last // 512 * 512 + n: entry for n, entry in enumerate(entries) if entry}
            assert numbers == table, "a table holds the grains before it"
            directory[last // 512], table = at // SECTOR, {}
        elif kind == 2:
            count = -(-capacity // (128 * 512))
            found = struct.unpack_from(f"<{count}I", body)
            assert {n: entry for n, entry in enumerate(found) if entry} == directory
            assert value == -(-count * 4 // SECTOR)
            assert not table
            directory_at = at // SECTOR
        elif kind == 3:
            footer = body
        at += value * SECTOR
    assert met[-3:] == [2, 3, 0]
    assert at == len(data)
    expected = bytearray(data[:SECTOR])
    struct.pack_into("<Q", expected, 56, directory_at)
    assert footer == expected
    return {"content": bytes(disk[: capacity * SECTOR]), "text": text, "tables": len(directory)}


# ---------------------------------------------------------------------- looking


def refused(path: Path, words: str = "", kind: type[FormatError] = InvalidImage) -> None:
    """Opening, or reading all of it, fails as it should."""
    with pytest.raises(kind, match=words or None):
        whole(path)


def whole(path: Path) -> bytes:
    image = opened(path, "vmdk")
    try:
        image.source.extents(0, image.source.size)
        return read(image.source, 0, image.source.size)
    finally:
        image.close()


def warnings_of(path: Path) -> str:
    image = opened(path)
    image.close()
    return "; ".join(image.warnings)


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
