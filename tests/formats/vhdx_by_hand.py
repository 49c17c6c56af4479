"""VHDX files put together and taken apart by hand, from [MS-VHDX] alone: nothing here is ferrotype's.

0     1M          2M     3M          4M
| heads | BAT ... | log  | metadata  | sector bitmaps, blocks from the last one to the first |
"""

from __future__ import annotations

import itertools
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

KiB, MiB = 1024, 1 << 20
NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, PRESENT, PARTIAL = 0, 1, 2, 3, 6, 7

BAT = "2dc27766-f623-4200-9d64-115e9bfd4a08"
METADATA = "8b7ca206-4790-4b9a-b8fe-575f050f886e"
PARAMETERS = "caa16737-fa36-4d43-b3b6-33f0aa44e76b"
SIZE = "2fa54224-cd1b-4876-b211-5dbed83bf4b8"
DISK_ID = "beca12ab-b2e6-4523-93ef-c309e000c746"
LOGICAL = "8141bf1d-a96f-4709-ba47-f233a8faab5f"
PHYSICAL = "cda348c7-445d-4471-9cc9-e9885251c556"
LOCATOR = "a8d35f2d-b30b-454d-abf7-d3d84834ab0c"
LOCATOR_TYPE = "b04aefb7-d19e-4a81-b789-25b8e9445913"

_TABLE = []
for _octet in range(256):
    for _ in range(8):
        _octet = _octet >> 1 ^ (0x82F63B78 if _octet & 1 else 0)
    _TABLE.append(_octet)


def crc(data: bytes) -> int:
    """CRC-32C."""
    register = 0xFFFFFFFF
    for octet in data:
        register = _TABLE[(register ^ octet) & 0xFF] ^ register >> 8
    return register ^ 0xFFFFFFFF


def seal(data: bytes) -> bytes:
    """With the checksum in bytes 4 to 8."""
    blank = data[:4] + bytes(4) + data[8:]
    return blank[:4] + struct.pack("<I", crc(blank)) + blank[8:]


def reseal(path: Path, at: int, length: int) -> None:
    """Make the checksum of a structure in a file right again."""
    with path.open("r+b") as file:
        file.seek(at)
        sealed = seal(file.read(length))
        file.seek(at)
        file.write(sealed)


def poke(path: Path, at: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


@dataclass
class Disk:
    """What a file is to say; ``payload`` holds states and contents of blocks, ``bitmaps`` those of chunks."""

    size: int
    block: int = MiB
    sector: int = 512
    physical: int = 4096
    payload: Mapping[int, tuple[int, bytes]] = field(default_factory=dict)
    bitmaps: Mapping[int, bytes] = field(default_factory=dict)
    parent: Mapping[str, str] | None = None
    data_guid: str = "11111111-2222-3333-4444-555555555555"
    log_guid: str = "00000000-0000-0000-0000-000000000000"
    log: bytes = b""
    log_length: int = MiB
    extra_items: Sequence[tuple[str, int, bytes]] = ()
    extra_regions: Sequence[tuple[str, int, int, int]] = ()

    @property
    def ratio(self) -> int:
        return (1 << 23) * self.sector // self.block

    def bat_index(self, block: int) -> int:
        return block + block // self.ratio


LOG_AT, METADATA_AT = 2 * MiB, 3 * MiB


def header(disk: Disk, sequence: int) -> bytes:
    """One header, sealed."""
    return seal(
        (
            struct.pack("<4sIQ", b"head", 0, sequence)
            + guid("99999999-0000-0000-0000-000000000001")
            + guid(disk.data_guid)
            + guid(disk.log_guid)
            + struct.pack("<HHIQ", 0, 1, disk.log_length, LOG_AT)
        ).ljust(4096, b"\0")
    )


def locator(texts: Mapping[str, str]) -> bytes:
    """A parent locator."""
    at = 20 + 12 * len(texts)
    entries, content = b"", b""
    for key, value in texts.items():
        k, v = key.encode("utf-16-le"), value.encode("utf-16-le")
        entries += struct.pack("<IIHH", at + len(content), at + len(content) + len(k), len(k), len(v))
        content += k + v
    return guid(LOCATOR_TYPE) + struct.pack("<HH", 0, len(texts)) + entries + content


def write(path: Path, disk: Disk) -> Path:
    """Write the file.  The BAT has room for 128 Ki entries, which is enough for tests."""
    regions = [(BAT, MiB, MiB, 1), (METADATA, METADATA_AT, MiB, 1), *disk.extra_regions]
    table = struct.pack("<4sIII", b"regi", 0, len(regions), 0)
    table += b"".join(guid(name) + struct.pack("<QII", *rest) for name, *rest in regions)
    items = [
        (PHYSICAL, 6, struct.pack("<I", disk.physical)),
        (SIZE, 6, struct.pack("<Q", disk.size)),
        (DISK_ID, 6, guid("12345678-9abc-def0-1234-56789abcdef0")),
        (LOGICAL, 6, struct.pack("<I", disk.sector)),
        (PARAMETERS, 4, struct.pack("<II", disk.block, 0 if disk.parent is None else 2)),
        *([(LOCATOR, 4, locator(disk.parent))] if disk.parent is not None else []),
        *disk.extra_items,
    ]
    metadata, content = struct.pack("<8sHH20x", b"metadata", 0, len(items)), b""
    for name, flags, item in items:
        metadata += guid(name) + struct.pack("<IIII", 64 * KiB + len(content), len(item), flags, 0)
        content += item
    bat: dict[int, int] = {}
    with path.open("wb") as file:

        def put(at: int, data: bytes) -> None:
            file.seek(at)
            file.write(data)

        put(0, b"vhdxfile" + "by hand".encode("utf-16-le"))
        put(64 * KiB, header(disk, 7))
        put(128 * KiB, header(disk, 6))
        for at in (192 * KiB, 256 * KiB):
            put(at, seal(table.ljust(64 * KiB, b"\0")))
        put(LOG_AT, disk.log)
        put(METADATA_AT, metadata.ljust(64 * KiB, b"\0") + content)
        end = METADATA_AT + MiB
        for chunk, bits in disk.bitmaps.items():
            put(end, bits.ljust(MiB, b"\0"))
            bat[chunk * (disk.ratio + 1) + disk.ratio] = end | 6
            end += MiB
        for block, (state, data) in sorted(disk.payload.items(), reverse=True):
            bat[disk.bat_index(block)] = state
            if state in (PRESENT, PARTIAL):
                put(end, data.ljust(disk.block, b"\0"))
                bat[disk.bat_index(block)] = end | state
                end += disk.block
        for index, entry in bat.items():
            put(MiB + index * 8, struct.pack("<Q", entry))
        file.truncate(end)
    return path


# ---------------------------------------------------------------------- the log


def log_entry(
    sequence: int,
    tail: int,
    changes: Sequence[tuple[int, bytes | int]],
    log_guid: str,
    *,
    flushed: int = 4 * MiB,
    last: int = 4 * MiB,
) -> bytes:
    """One entry: a change is an offset and 4 KiB to stand there, or the length of what is zeros there."""
    descriptors, data = b"", b""
    for at, change in changes:
        if isinstance(change, int):
            descriptors += struct.pack("<4sIQQQ", b"zero", 0, change, at, sequence)
        else:
            assert len(change) == 4096
            lead, trail = struct.unpack("<Q", change[:8])[0], struct.unpack("<I", change[-4:])[0]
            descriptors += struct.pack("<4sIQQQ", b"desc", trail, lead, at, sequence)
            data += struct.pack("<4sI", b"data", sequence >> 32) + change[8:-4]
            data += struct.pack("<I", sequence & 0xFFFFFFFF)
    leading = -(-(64 + len(descriptors)) // 4096) * 4096
    head = struct.pack(
        "<4sIIIQII16sQQ",
        b"loge",
        0,
        leading + len(data),
        tail,
        sequence,
        len(changes),
        0,
        guid(log_guid),
        flushed,
        last,
    )
    return seal((head + descriptors).ljust(leading, b"\0") + data)


# ---------------------------------------------------------------------- taking apart


def take_apart(path: Path) -> tuple[dict[str, bytes], bytes]:
    """The metadata items of a whole file without parent, and its disk.  Asserts all that a file must keep to."""
    content = path.read_bytes()
    assert len(content) % MiB == 0
    assert content[:8] == b"vhdxfile"
    heads = [content[at : at + 4096] for at in (64 * KiB, 128 * KiB)]
    for head in heads:
        assert head[:4] == b"head"
        assert seal(head) == head
        assert head[80:] == bytes(4016)
    assert len({head[8:16] for head in heads}) == 2
    head = max(heads, key=lambda one: int(struct.unpack_from("<Q", one, 8)[0]))
    assert head[16:32] != bytes(16)
    assert head[32:48] != bytes(16)
    assert head[48:64] == bytes(16)  # nothing in the log
    log_version, version, log_length, log_offset = struct.unpack_from("<HHIQ", head, 64)
    assert (log_version, version) == (0, 1)
    tables = [content[at : at + 64 * KiB] for at in (192 * KiB, 256 * KiB)]
    assert tables[0] == tables[1]
    assert seal(tables[0]) == tables[0]
    signature, _, count, _ = struct.unpack_from("<4sIII", tables[0])
    assert signature == b"regi"
    entries = [struct.unpack_from("<16sQII", tables[0], 16 + 32 * number) for number in range(count)]
    found = {name: (at, length) for name, at, length, required in entries if required == 1}
    assert set(found) == {guid(BAT), guid(METADATA)}
    used = [(0, MiB), (log_offset, log_length), *found.values()]
    at, length = found[guid(METADATA)]
    items = _items(content[at : at + length])
    block, flags = struct.unpack("<II", items[PARAMETERS])
    assert flags in (0, 1)
    (size,) = struct.unpack("<Q", items[SIZE])
    (sector,) = struct.unpack("<I", items[LOGICAL])
    disk, fresh = _disk(content, found[guid(BAT)], size, block, sector, fixed=flags == 1)
    used += fresh
    used.sort()
    for (start, length), (following, _) in itertools.pairwise(used):
        assert start + length <= following
    assert len(content) == sum(used[-1])
    for start, length in used:
        assert length
        assert start % MiB == length % MiB == 0
        assert start + length <= len(content)
    return items, disk


def _items(region: bytes) -> dict[str, bytes]:
    signature, _, count = struct.unpack_from("<8sHH", region)
    assert signature == b"metadata"
    items = {}
    needs = {PARAMETERS: 4, SIZE: 6, DISK_ID: 6, LOGICAL: 6, PHYSICAL: 6}
    for number in range(count):
        name, offset, length, flags, spare = struct.unpack_from("<16sIIII", region, 32 + 32 * number)
        text = str(uuid.UUID(bytes_le=name))
        assert flags == needs[text]
        assert spare == 0
        assert offset >= 64 * KiB
        items[text] = region[offset : offset + length]
    assert set(items) == set(needs)
    return items


def _disk(
    content: bytes, bat: tuple[int, int], size: int, block: int, sector: int, *, fixed: bool
) -> tuple[bytes, list[tuple[int, int]]]:
    ratio = (1 << 23) * sector // block
    blocks = -(-size // block)
    count = blocks + (blocks - 1) // ratio
    assert count * 8 <= bat[1]
    entries = struct.unpack_from(f"<{bat[1] // 8}Q", content, bat[0])
    assert not any(entries[count:])
    disk, used = bytearray(size), []
    for number, entry in enumerate(entries[:count]):
        chunk, inside = divmod(number, ratio + 1)
        if inside == ratio:
            assert entry == 0  # a sector bitmap, which only disks with a parent have
            continue
        assert entry & 0xFFFF8 == 0
        assert entry & 7 == 6 or (entry == 0 and not fixed)
        if entry:
            place, at = entry & ~7, (chunk * ratio + inside) * block
            used.append((place, block))
            piece = content[place : place + min(block, size - at)]
            disk[at : at + len(piece)] = piece
    return bytes(disk), used
