"""MBR tables made by sfdisk, and what only looks like one."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from ferrotype.block.memory import MemoryDisk
from ferrotype.units import MiB
from ferrotype.volumes import Table, mbr
from ferrotype.volumes.scan import scan
from tests.machine import loop, run
from tests.volumes.disks import FileDisk, blank, by_partx, by_sfdisk, rows, sfdisk

Fields = tuple[int, int, int]  # type, start, size


def sector(*entries: Fields, disk_id: int = 0x12345678, flag: int = 0) -> bytes:
    raw = b"".join(struct.pack("<B3xB3xII", flag, *entry) for entry in entries)
    return bytes(440) + struct.pack("<IH", disk_id, 0) + raw.ljust(64, b"\0") + b"\x55\xaa"


def disk_of(sectors: dict[int, bytes], count: int = 4096) -> MemoryDisk:
    disk = MemoryDisk(count * 512)
    for lba, data in sectors.items():
        disk.data[lba * 512 : lba * 512 + len(data)] = data
    return disk


def whole(disk: MemoryDisk) -> Table:
    table = mbr.read(disk, 512)
    assert table is not None
    return table


def test_primary_partitions_agree_with_sfdisk(tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.img")
    script = "label: dos\nlabel-id: 0x00c0ffee\n4: start=2048, size=100, type=7, bootable\n"
    sfdisk(image, script + "1: start=9000, size=17, type=ef\n2: start=4000, size=1, type=c\n")
    table = scan(FileDisk(image))
    assert table is not None
    assert rows(table) == by_sfdisk(image)
    assert [p.index for p in table.partitions] == [4, 2, 1]
    assert (table.kind, table.disk_id, table.metadata, table.warnings) == ("mbr", "00c0ffee", ((0, 512),), ())


@pytest.mark.parametrize("container", ["5", "f", "85"])
def test_twenty_logical_partitions(tmp_path: Path, container: str) -> None:
    image = blank(tmp_path / "disk.img", 64 * MiB)
    lines = ["label: dos", "start=2048, size=2048, type=83", f"start=6144, type={container}", "start=4096, size=99"]
    lines[3], lines[2] = lines[2], lines[3]
    lines += [f"start={8192 + 4000 * i}, size={100 + i}, type={'7' if i % 2 else '83'}" for i in range(20)]
    sfdisk(image, "\n".join(lines) + "\n")
    table = scan(FileDisk(image))
    assert table is not None
    assert rows(table) == by_sfdisk(image)
    assert [p.index for p in table.partitions] == [1, 2, *range(5, 25)]
    assert table.warnings == ()
    assert len(table.metadata) == 21
    boot_records = [start for start, _ in table.metadata]
    data = image.read_bytes()
    assert all(data[at + 510 : at + 512] == b"\x55\xaa" for at in boot_records)
    # libblkid lists the container too, and its ids are the PARTUUIDs of udev
    listed = [row for row in by_partx(image) if row[0] != 3]
    assert [(p.index, p.start, p.size, p.uuid) for p in sorted(table.partitions, key=lambda p: p.index)] == listed


def test_logical_partitions_on_4096_byte_sectors(tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.img", 64 * MiB)
    with loop(image, sector_size=4096) as device:
        sfdisk(device, "label: dos\nsize=1M, type=83\ntype=5\nsize=2M, type=83\nsize=3M, type=7\nsize=1M, type=83\n")
        expected = by_sfdisk(device)
        table = scan(FileDisk(device, sector_size=4096))
    assert table is not None
    assert len(expected) == 4
    assert rows(table) == expected
    assert rows(scan(FileDisk(image), sector_size=4096) or table) == expected


def test_plain_file_with_4096_byte_sectors_is_found_by_its_volumes(tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.img", 64 * MiB)
    with loop(image, sector_size=4096) as device:
        sfdisk(device, "label: dos\nstart=512, size=4096, type=83\n")
    unknown = scan(FileDisk(image))
    assert unknown is not None
    assert unknown.sector_size == 512  # nothing tells, so the usual size it is
    with loop(image, offset=512 * 4096, size=4096 * 4096) as part:
        run("mkfs.ext4", "-q", part)
    found = scan(FileDisk(image))
    assert found is not None
    assert (found.sector_size, found.partitions[0].start) == (4096, 512 * 4096)


# ---------------------------------------------------------------------- what ends in 55 AA and is no table


@pytest.mark.parametrize(
    "mkfs",
    [
        ("mkfs.fat", "-F", "12"),
        ("mkfs.fat", "-F", "16"),
        ("mkfs.fat", "-F", "32"),
        ("mkfs.ntfs", "-q", "-F", "-f"),
        ("mkfs.exfat",),
    ],
    ids=" ".join,
)
def test_volumes_on_the_whole_disk_have_no_table(tmp_path: Path, mkfs: tuple[str, ...]) -> None:
    image = blank(tmp_path / "disk.img", 40 * MiB)
    run(*mkfs, image)
    assert image.read_bytes()[510:512] == b"\x55\xaa"
    assert " TYPE=" in run("blkid", "-p", image)
    assert scan(FileDisk(image)) is None


def test_implausible_records_are_no_table() -> None:
    good = sector((0x83, 8, 8))
    assert whole(disk_of({0: good})).partitions
    assert mbr.read(disk_of({0: good[:510] + b"\xaa\x55"}), 512) is None
    assert mbr.read(disk_of({0: sector((0x83, 8, 8), flag=0x20)}), 512) is None
    assert mbr.read(disk_of({0: sector(disk_id=0)}), 512) is None
    assert mbr.read(MemoryDisk(100), 512) is None
    assert whole(disk_of({0: sector()})).partitions == ()  # a new, empty table has its id


def test_beside_a_boot_sector_only_entries_that_fit_count() -> None:
    bpb = b"\xeb\x3c\x90mkfs.fat\0\2\4\1\0\2\0\2\0\x50\xf8"
    for entries, believed in (
        ([(0x0C, 64, 4000)], True),
        ([(0x0C, 64, 5000)], False),
        ([(0x0C, 64, 100), (0x0C, 150, 100)], False),
        ([], False),
    ):
        raw = sector(*entries)
        assert (mbr.read(disk_of({0: bpb + raw[len(bpb) :]}), 512) is not None) == believed


def test_partition_over_its_own_table() -> None:
    """Hybrid ISO images have one partition from sector 0 to the end."""
    assert rows(whole(disk_of({0: sector((0x17, 0, 4096))})))[0][1:3] == (0, 4096 * 512)


def test_protective_entry_without_a_gpt() -> None:
    table = whole(disk_of({0: sector((0xEE, 1, 4095), (0x83, 100, 100))}))
    assert [p.type for p in table.partitions] == ["83"]
    assert any("GPT" in w for w in table.warnings)


# ---------------------------------------------------------------------- damage and malice


def test_overlap_and_outside() -> None:
    table = whole(disk_of({0: sector((0x83, 10, 100), (0x83, 109, 5), (0x83, 4000, 97), (0x07, 200, 100))}))
    assert [p.index for p in table.partitions] == [4]
    assert any("1, 2 overlap" in w for w in table.warnings)
    assert any("3 reach beyond" in w for w in table.warnings)
    far = whole(disk_of({0: sector((0x83, 0xFFFFFFFF, 0xFFFFFFFF))}))
    assert far.partitions == ()


def chain(second: bytes) -> MemoryDisk:
    return disk_of({0: sector((0x05, 100, 3000)), 100: sector((0x83, 1, 9), (0x05, 50, 60)), 150: second})


@pytest.mark.parametrize(
    ("second", "numbers", "words"),
    [
        (sector((0x83, 1, 9)), [5, 6], None),
        (sector((0x83, 1, 9), (0x05, 0, 60)), [5, 6], "circle"),
        (sector((0x83, 1, 9), (0x05, 50, 60)), [5, 6], "circle"),
        (sector((0x83, 1, 9), (0x05, 3000, 60)), [5, 6], "outside the extended"),
        (sector((0x83, 1, 9), (0x05, 0xFFFFFFFF, 60)), [5, 6], "outside the extended"),
        (bytes(512), [5], "no extended boot record"),
        (sector((0x83, 1, 9), flag=7), [5], "no extended boot record"),
        (sector((0x83, 1, 0xFFFFFFFF)), [5], "reach beyond"),
        (sector((0x83, 1, 9), (0, 0, 0), (0x83, 9, 0xFFFFFF00)), [5, 6], None),  # garbage in the third entry
    ],
)
def test_broken_chains_keep_what_was_read(second: bytes, numbers: list[int], words: str | None) -> None:
    table = whole(chain(second))
    assert [p.index for p in table.partitions] == numbers
    assert all(words in " ".join(table.warnings) for words in ([words] if words else []))
    assert bool(table.warnings) == (words is not None)


def test_unreadable_boot_record_ends_the_chain(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(chain(sector((0x83, 1, 9))).data)
    table = mbr.read(FileDisk(image, bad=(150 * 512,)), 512)
    assert table is not None
    assert [p.index for p in table.partitions] == [5]
    assert table.warnings


def test_endless_chain_is_bounded() -> None:
    sectors = {0: sector((0x0F, 1, 4000))}
    sectors |= {1 + 2 * i: sector((0x83, 1, 1), (0x05, 2 * (i + 1), 2)) for i in range(1999)}
    table = whole(disk_of(sectors))
    assert len(table.partitions) == 1024
    assert any("more than 1024 links" in w for w in table.warnings)


def test_secured_extended_partition_is_followed_only_where_there_is_one() -> None:
    first = sector((0xC5, 100, 3000))
    assert [p.index for p in whole(disk_of({0: first, 100: sector((0x83, 1, 9))})).partitions] == [5]
    assert [(p.index, p.type) for p in whole(disk_of({0: first})).partitions] == [(1, "c5")]
