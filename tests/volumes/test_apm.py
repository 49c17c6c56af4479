"""The Apple partition map: built here, judged by sleuthkit and libblkid."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from ferrotype.block.memory import MemoryDisk
from ferrotype.errors import InvalidImage
from ferrotype.volumes import Table, apm
from ferrotype.volumes.scan import scan
from tests.machine import run
from tests.volumes.disks import FileDisk, by_partx

Fields = tuple[str, str, int, int]  # type, name, start, count
MAP: list[Fields] = [
    ("Apple_partition_map", "Apple", 1, 63),
    ("Apple_Driver43", "Macintosh", 64, 32),
    ("Apple_HFS", "Données", 200, 1000),
    ("Apple_Free", "", 1200, 300),
    ("Apple_UNIX_SVR2", "root", 1500, 500),
]


def apm_disk(entries: list[Fields], block: int = 512, blocks: int = 2048) -> bytearray:
    disk = bytearray(block * blocks)
    disk[:8] = struct.pack(">2sHI", b"ER", block, blocks)
    for i, (kind, name, start, count) in enumerate(entries, 1):
        texts = name.encode("mac_roman"), kind.encode()
        fields = (b"PM", 0, len(entries), start, count, *texts, 0, count, 0x33)
        disk[i * block : i * block + 92] = struct.pack(">2sHIII32s32sIII", *fields)
    return disk


def whole(disk: bytearray) -> Table:
    table = apm.read(MemoryDisk(disk), 512)
    assert table is not None
    return table


def test_agrees_with_mmls_and_libblkid(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(apm_disk(MAP))
    table = scan(FileDisk(image))
    assert table is not None
    assert (table.kind, table.sector_size, table.metadata, table.warnings) == ("apm", 512, ((0, 64 * 512),), ())
    assert [(p.index, p.type, p.label) for p in table.partitions] == [
        (2, "Apple_Driver43", "Macintosh"),
        (3, "Apple_HFS", "Données"),
        (5, "Apple_UNIX_SVR2", "root"),
    ]
    lines = [line.split(maxsplit=5) for line in run("mmls", "-t", "mac", "-a", image).splitlines() if ":" in line[:4]]
    listed = {(int(start) * 512, int(count) * 512, kind) for *_, start, _, count, kind in lines}
    ours = {(p.start, p.size, p.type) for p in table.partitions}
    assert ours == {row for row in listed if row[2] not in ("Apple_partition_map", "Apple_Free")}
    by_blkid = {row[:3] for row in by_partx(image)}
    assert {(p.index, p.start, p.size) for p in table.partitions} <= by_blkid


def test_optical_blocks() -> None:
    table = whole(apm_disk([("Apple_partition_map", "", 1, 15), ("Apple_HFS", "cd", 100, 50)], block=2048))
    assert table.sector_size == 2048
    assert [(p.start, p.size) for p in table.partitions] == [(100 * 2048, 50 * 2048)]


@pytest.mark.parametrize("count", [0, 1025, 0xFFFFFFFF])
def test_impossible_map_length(count: int) -> None:
    disk = apm_disk(MAP)
    struct.pack_into(">I", disk, 516, count)
    with pytest.raises(InvalidImage, match="claims"):
        scan(MemoryDisk(disk))


def test_damage_is_told_and_the_rest_kept() -> None:
    broken = apm_disk(MAP)
    broken[5 * 512 : 5 * 512 + 2] = b"XX"
    assert [p.index for p in whole(broken).partitions] == [2, 3]
    assert any("entry 5" in w for w in whole(broken).warnings)
    wild = whole(apm_disk([*MAP, ("Apple_HFS", "far", 0xFFFFFFFF, 0xFFFFFFFF), ("Apple_HFS", "over", 210, 2)]))
    assert [p.index for p in wild.partitions] == [2, 5]
    assert len(wild.warnings) == 2
    assert any("ends with the disk" in w for w in whole(apm_disk(MAP)[: 4 * 512]).warnings)


def test_no_map() -> None:
    assert apm.read(MemoryDisk(4096), 512) is None
    assert apm.read(MemoryDisk(100), 512) is None
    assert apm.read(MemoryDisk(apm_disk([])), 512) is None
