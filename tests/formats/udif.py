"""Builds UDIF images (.dmg) of every kind of run, in any order, from the published descriptions of the format."""

from __future__ import annotations

import bz2
import lzma
import plistlib
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from pathlib import Path

SECTOR = 512
ZERO, RAW, IGNORE, COMMENT, END = 0, 1, 2, 0x7FFFFFFE, 0xFFFFFFFF
KINDS = {
    "UDRO": RAW,
    "UDCO": 0x80000004,
    "UDZO": 0x80000005,
    "UDBZ": 0x80000006,
    "ULFO": 0x80000007,
    "ULMO": 0x80000008,
}


def adc(data: bytes) -> bytes:
    """Greedy: matches of three bytes and more, from the last place the three were seen."""
    out, plain = bytearray(), bytearray()
    seen: dict[bytes, int] = {}
    at = 0

    def flush() -> None:
        for start in range(0, len(plain), 128):
            piece = plain[start : start + 128]
            out.append(0x80 | len(piece) - 1)
            out.extend(piece)
        plain.clear()

    while at < len(data):
        key = data[at : at + 3]
        back, seen[key] = at - seen.get(key, -(1 << 20)), at
        count = 0
        if back <= 65536 and len(key) == 3:
            while count < 67 and at + count < len(data) and data[at + count] == data[at + count - back]:
                count += 1
        if count >= 3 and back <= 1024 and count <= 18:
            flush()
            out += bytes([(count - 3) << 2 | (back - 1) >> 8, (back - 1) & 255])
        elif count >= 4:
            flush()
            out += bytes([0x40 | count - 4, (back - 1) >> 8, (back - 1) & 255])
        else:
            plain.append(data[at])
            count = 1
        at += count
    flush()
    return bytes(out)


def lzvn(data: bytes) -> bytes:
    """One "bvxn" block: literals, and runs of one byte as matches."""
    out, at = bytearray(), 0
    while at < len(data):
        count = 1
        while count < 250 and at + count < len(data) and data[at + count] == data[at]:
            count += 1
        if count >= 20:  # a literal, three bytes from one before, the rest from the same distance
            out += bytes([0x40 | 0 << 3, 1, data[at]]) + bytes([0xF0, count - 4 - 16])
            at += count
        else:
            piece = data[at : at + (271 if at % 3 else 15)]
            out += (bytes([0xE0, len(piece) - 16]) if len(piece) > 15 else bytes([0xE0 | len(piece)])) + piece
            at += len(piece)
    out += b"\x06" + bytes(7)
    return b"bvxn" + struct.pack("<II", len(data), len(out)) + bytes(out) + b"bvx$"


def lzfse_stored(data: bytes) -> bytes:
    return b"bvx-" + struct.pack("<I", len(data)) + data + b"bvx$"


def lzfse(data: bytes) -> bytes:
    """By the reference implementation where it is installed."""
    try:
        library = import_module("lzfse")
    except ImportError:
        return lzvn(data)
    return bytes(library.compress(data))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "UDRO": bytes,
    "UDCO": adc,
    "UDZO": zlib.compress,
    "UDBZ": bz2.compress,
    "ULFO": lzfse,
    "ULMO": lzma.compress,
}


@dataclass(slots=True)
class Udif:
    """What an image is to be like."""

    content: bytes
    kinds: tuple[str, ...] = ("UDZO",)  # of which runs are chosen at random
    seed: int = 0
    largest: int = 200  # sectors of a run
    fork: bool = False  # tables in a resource fork
    at_start: bool = False  # the trailer at the start
    checksums: bool = True
    tables: int = 4
    packers: dict[str, Callable[[bytes], bytes]] = field(default_factory=lambda: dict(PACKERS))
    before: int = 0  # bytes before the data fork
    shuffled: bool = True  # runs in any order in their table, with gaps, which other programs do not read
    moved: int = 0  # what the offsets of every other table are relative to

    def build(self) -> bytes:
        rng = random.Random(self.seed)
        total = len(self.content) // SECTOR
        cuts = sorted({0, total, *(rng.randrange(1, total) for _ in range(self.tables - 1))})
        plans = [self._plan(rng, first, last) for first, last in pairwise(cuts)]
        fork, places = self._fork(rng, plans)
        tables = [self._table(number, plan, places) for number, plan in enumerate(plans)]
        master = zlib.crc32(b"".join(table[72:76] for table in tables))
        base = 512 if self.at_start else self.before
        body = (resource_fork if self.fork else property_list)(tables)
        koly = self._koly(base, fork, body, master, total)
        return koly + fork + body if self.at_start else bytes(self.before) + fork + body + koly

    def _plan(self, rng: random.Random, first: int, last: int) -> list[tuple[int, int, int, bytes, str]]:
        """(kind, sector, count, packed, name) of a table's runs."""
        runs, at = [], first
        while at < last:
            count = min(rng.randint(1, self.largest), last - at)
            piece = self.content[at * SECTOR : (at + count) * SECTOR]
            if piece.count(0) == len(piece):
                choice = rng.randrange(4 if self.shuffled else 3)
                if choice < 3:
                    runs.append(((ZERO, IGNORE, IGNORE)[choice], at, count, b"", ""))
            else:
                name = rng.choice(self.kinds)
                runs.append((KINDS[name], at, count, self.packers[name](piece), name))
            at += count
        place = rng.randint(0, len(runs))
        runs.insert(place, (COMMENT, runs[place][1] if place < len(runs) else last, 0, b"", "+beg"))
        if self.shuffled:
            rng.shuffle(runs)
        return [*runs, (END, last, 0, b"", "")]

    @staticmethod
    def _fork(
        rng: random.Random, plans: list[list[tuple[int, int, int, bytes, str]]]
    ) -> tuple[bytes, dict[int, int]]:
        """The data fork with the packed runs in shuffled order and gaps between, and where each is by its sector."""
        stored = [(run[1], run[3]) for plan in plans for run in plan if run[3]]
        rng.shuffle(stored)
        fork, places = bytearray(rng.randbytes(7)), {}
        for sector, packed in stored:
            places[sector] = len(fork)
            fork += packed + rng.randbytes(rng.randrange(20))
        return bytes(fork), places

    def _table(self, number: int, plan: list[tuple[int, int, int, bytes, str]], places: dict[int, int]) -> bytes:
        first = min(run[1] for run in plan)
        last = plan[-1][1]
        moved = self.moved if number % 2 else 0
        crc = 0
        for kind, sector, count, _, _ in sorted((run for run in plan if run[2]), key=lambda run: run[1]):
            if kind != IGNORE:
                crc = zlib.crc32(self.content[sector * SECTOR : (sector + count) * SECTOR], crc)
        head = struct.pack(">4sIQQQII24s", b"mish", 1, first, last - first, moved, 2056, number, bytes(24))
        head += checksum(crc if self.checksums else None) + struct.pack(">I", len(plan))
        for kind, sector, count, packed, _ in plan:
            place = places[sector] - moved if packed else 0
            head += struct.pack(">IIQQQQ", kind, 0, sector - first, count, place, len(packed))
        return head

    def _koly(self, base: int, fork: bytes, body: bytes, master: int, sectors: int) -> bytes:
        parts = (0, 0, base + len(fork), len(body)) if not self.fork else (base + len(fork), len(body), 0, 0)
        data = zlib.crc32(fork) if self.checksums else None
        return (
            struct.pack(
                ">4sIIIQQQQQII16s", b"koly", 4, 512, 1, 0, base, len(fork), *parts[:2], 1, 1, b"segment-id-16-by"
            )
            + checksum(data)
            + struct.pack(">QQ120s", *parts[2:], bytes(120))
            + checksum(master if self.checksums else None)
            + struct.pack(">IQ12s", 1, sectors, bytes(12))
        )

    def write(self, path: Path) -> Path:
        path.write_bytes(self.build())
        return path


def checksum(crc: int | None) -> bytes:
    return bytes(136) if crc is None else struct.pack(">III124s", 2, 32, crc, bytes(124))


def property_list(tables: list[bytes]) -> bytes:
    entries = [
        {"Attributes": "0x0050", "CFName": f"part {n}", "Data": table, "ID": str(n - 1), "Name": f"part {n}"}
        for n, table in enumerate(tables)
    ]
    return plistlib.dumps({"resource-fork": {"blkx": entries, "plst": [{"Data": b"x" * 99, "Name": "no"}]}})


def resource_fork(tables: list[bytes]) -> bytes:
    """Two types: ``blkx`` is the second."""
    data, references, names = bytearray(), bytearray(), bytearray()
    for number, table in enumerate(tables):
        references += struct.pack(">hHII", number - 1, len(names), len(data), 0)
        names += bytes([len(f"part {number}")]) + f"part {number}".encode()
        data += struct.pack(">I", len(table)) + table
    other = struct.pack(">hHII", 0, 0xFFFF, len(data), 0)
    data += struct.pack(">I", 3) + b"abc"
    types = struct.pack(">H4sHH4sHH", 1, b"plst", 0, 18, b"blkx", len(tables) - 1, 18 + len(other))
    lists = types + other + bytes(references)
    head = struct.pack(">IIII", 256, 256 + len(data), len(data), 28 + len(lists) + len(names))
    top = head + bytes(8) + struct.pack(">HH", 28, 28 + len(lists))
    return head + bytes(240) + bytes(data) + top + lists + bytes(names)
