"""The content hash against a plain reading of its definition."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from blake3 import blake3

from ferrotype.block.device import open_source
from ferrotype.block.memory import MemoryDisk
from ferrotype.engine.checksum import checksum
from ferrotype.extents import ExtentMap, State
from ferrotype.job import NullJob
from ferrotype.repository.source import SnapshotSource
from ferrotype.units import MiB, TiB
from tests.engine.images import back_up, in_memory


def by_definition(content: bytes | bytearray) -> str:
    level = [blake3(content[at : at + MiB]).digest() for at in range(0, len(content), MiB)] or [blake3(b"").digest()]
    while len(level) > 1:
        level = [blake3(b"".join(level[at : at + 256])).digest() for at in range(0, len(level), 256)]
    return blake3(b"ferrotype content hash v1" + len(content).to_bytes(8, "little") + level[0]).hexdigest()


class Holes(MemoryDisk):
    """Knows which aligned stretches are zero, and must not be asked for them."""

    def __init__(self, content: bytes | bytearray, unit: int) -> None:
        super().__init__(content)
        self._zero = [
            (at, min(at + unit, len(content)))
            for at in range(0, len(content), unit)
            if not content[at : at + unit].strip(b"\0")
        ]

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        starts = [start for start, _ in self._zero]
        ends = [end for _, end in self._zero]
        return ExtentMap.from_runs(offset, length, starts, ends, State.ZERO)


SIZES = [0, 1, 511, MiB - 1, MiB, MiB + 1, 2 * MiB, 5 * MiB + 7, 256 * MiB, 257 * MiB + 1]


@pytest.mark.parametrize("size", SIZES)
def test_as_defined(size: int) -> None:
    content = bytearray(size)
    for at in range(0, size, 3 * MiB):
        content[at : at + 5] = b"bytes"[: size - at]
    wanted = by_definition(bytes(content))
    assert checksum(MemoryDisk(content), NullJob()) == wanted
    assert checksum(Holes(content, 4096 if size < 16 * MiB else MiB), NullJob(), workers=1) == wanted


@pytest.mark.parametrize("where", ["start", "end", "nowhere"])
def test_what_is_known_to_be_zero_hashes_as_if_it_were_read(where: str) -> None:
    size = 260 * MiB + 100
    content = bytearray(size)
    at = {"start": 0, "end": size - 1}.get(where)
    if at is not None:
        content[at] = 1
    assert checksum(Holes(content, MiB), NullJob()) == by_definition(content)


def test_size_counts() -> None:
    hashes = {checksum(MemoryDisk(size), NullJob()) for size in (0, 1, MiB, MiB + 1, 2 * MiB, 512 * MiB)}
    assert len(hashes) == 6


def test_a_huge_disk_of_holes(tmp_path: Path) -> None:
    path = tmp_path / "huge.img"
    with path.open("wb") as file:
        file.truncate(12 * TiB)
        file.seek(7 * TiB + 3)
        file.write(b"here")
    source = open_source(path)
    first = checksum(source, NullJob())
    source.close()
    with path.open("r+b") as file:
        file.seek(7 * TiB + 4)
        file.write(b"E")
    source = open_source(path)
    assert checksum(source, NullJob()) != first
    source.close()


def test_a_snapshot_hashes_as_what_it_was_made_of() -> None:
    content = bytearray(random.Random(1).randbytes(9 * MiB + 777))
    content[2 * MiB : 5 * MiB] = bytes(3 * MiB)
    repository = in_memory()
    record = back_up(repository, MemoryDisk(content)).disks[0]
    assert checksum(SnapshotSource(repository, record), NullJob()) == by_definition(content)


def test_progress_is_told() -> None:
    counted: list[int] = []

    class Meter(NullJob):
        def advance(self, count: int, /) -> None:
            counted.append(count)

    checksum(MemoryDisk(5 * MiB + 9), Meter())
    assert sum(counted) == 5 * MiB + 9
