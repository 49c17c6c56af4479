"""GPT tables made by sfdisk and sgdisk, read whole, damaged and on disks of another size."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from ferrotype.block.memory import MemoryDisk
from ferrotype.errors import InvalidImage
from ferrotype.units import MiB, TiB
from ferrotype.volumes import Table, gpt
from ferrotype.volumes.scan import scan
from tests.machine import loop, run
from tests.volumes.disks import FileDisk, blank, by_partx, by_sfdisk, rows, sfdisk

LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
THREE = f"""label: gpt
label-id: 5E7B1A3C-0000-4000-8000-0123456789AB
start=4096, size=100, type={LINUX}, name="zwei é世😀", uuid=AAAAAAAA-0000-0000-0000-000000000002
start=2048, size=2048, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name="EFI system"
start=9000, size=1
"""


def gpt_disk(sector_size: int = 512, entry_size: int = 128, count: int = 128, sectors: int = 256) -> bytearray:
    """A GPT laid out here, byte by byte, for what no tool makes; three partitions at 100, 120 and 200."""
    array = bytearray(entry_size * count)
    for i, (first, last) in enumerate(((120, 139), (100, 119), (200, 200))):
        raw = bytes(range(i + 1, i + 17)) + bytes(range(i + 33, i + 49)) + struct.pack("<QQQ", first, last, 0)
        array[entry_size * i : entry_size * i + 128] = raw + f"part {i}".encode("utf-16-le").ljust(72, b"\0")
    length = -(-len(array) // sector_size)
    disk = bytearray(sectors * sector_size)
    disk[446:462] = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff" * 3, 1, sectors - 1)
    disk[510:512] = b"\x55\xaa"
    for mine, other, where in ((1, sectors - 1, 2), (sectors - 1, 1, sectors - 1 - length)):
        facts = (b"EFI PART", 0x10000, 92, 0, 0, mine, other, 2 + length, sectors - 2 - length, b"G" * 16, where)
        fields = (*facts, count, entry_size, zlib.crc32(array))
        header = bytearray(struct.pack("<8sIIIIQQQQ16sQIII", *fields))
        struct.pack_into("<I", header, 16, zlib.crc32(header))
        disk[mine * sector_size : mine * sector_size + 92] = header
        disk[where * sector_size : where * sector_size + len(array)] = array
    return disk


def forge(disk: bytearray, index: int, first: int, last: int) -> bytearray:
    """Change an entry in both copies and make all checksums right again."""
    sectors = len(disk) // 512
    for lba in (1, sectors - 1):
        at = struct.unpack_from("<Q", disk, lba * 512 + 72)[0] * 512
        struct.pack_into("<QQ", disk, at + 128 * index + 32, first, last)
        struct.pack_into("<I", disk, lba * 512 + 88, zlib.crc32(disk[at : at + 16384]))
        disk[lba * 512 + 16 : lba * 512 + 20] = bytes(4)
        struct.pack_into("<I", disk, lba * 512 + 16, zlib.crc32(disk[lba * 512 : lba * 512 + 92]))
    return disk


def whole(disk: bytearray | bytes, sector_size: int = 512) -> Table:
    table = gpt.read(MemoryDisk(disk), sector_size)
    assert table is not None
    return table


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_agrees_with_sfdisk(tmp_path: Path, sector_size: int) -> None:
    image = blank(tmp_path / "disk.img", 48 * MiB)
    with loop(image, sector_size=sector_size) as device:
        sfdisk(device, THREE)
        expected = by_sfdisk(device)
        table = scan(FileDisk(device, sector_size=sector_size))
    assert table is not None
    assert len(expected) == 3
    assert rows(table) == expected
    assert [p.index for p in table.partitions] == [2, 1, 3]  # by start, with the numbers they have
    assert (table.kind, table.sector_size, table.warnings) == ("gpt", sector_size, ())
    assert table.disk_id == "5E7B1A3C-0000-4000-8000-0123456789AB"
    array = 16384 // sector_size
    last = image.stat().st_size
    assert table.metadata == (
        (0, (2 + array) * sector_size),
        (last - (1 + array) * sector_size, (1 + array) * sector_size),
    )
    plain = scan(FileDisk(image))  # the same bytes as a plain file, whose sector size nobody tells
    assert plain == table


def test_128_partitions_and_gaps(tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.img")
    script = "label: gpt\n" + "".join(f'start={2048 + 17 * i}, size={1 + i % 9}, name="p{i}"\n' for i in range(128))
    sfdisk(image, script)
    table = scan(FileDisk(image))
    assert table is not None
    assert len(table.partitions) == 128
    assert rows(table) == by_sfdisk(image)
    assert [(p.index, p.start, p.size, (p.uuid or "").lower()) for p in table.partitions] == by_partx(image)


def test_large_table_of_sgdisk_and_numbers_with_holes(tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.img", 64 * MiB)
    run(
        "sgdisk",
        "-S",
        "400",
        "-n",
        "300:4096:+1M",
        "-c",
        "300:drei",
        "-n",
        "7:40960:+3M",
        "-n",
        "12:20480:+2M",
        image,
    )
    table = scan(FileDisk(image))
    assert table is not None
    assert [p.index for p in table.partitions] == [300, 12, 7]
    assert rows(table) == by_sfdisk(image)
    assert table.warnings == ()


def test_beyond_32_bit_sectors(tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.img", 3 * TiB)
    sfdisk(image, "label: gpt\nstart=2048, size=2048\nstart=5000000000, size=1000000000\n")
    table = scan(FileDisk(image))
    assert table is not None
    assert rows(table) == by_sfdisk(image)
    assert table.partitions[1].start == 5_000_000_000 * 512


def test_hybrid_mbr(tmp_path: Path) -> None:
    image = blank(tmp_path / "disk.img")
    sfdisk(image, THREE)
    run("sgdisk", "-h", "1:2", image)
    table = scan(FileDisk(image))
    assert table is not None
    assert rows(table) == by_sfdisk(image)
    assert [w for w in table.warnings if w.startswith("hybrid MBR")] == list(table.warnings)
    assert len(table.warnings) == 1


@pytest.mark.parametrize("sector_size", [512, 1024, 2048, 4096])
@pytest.mark.parametrize("entry_size", [128, 256, 1024])
def test_entry_and_sector_sizes(sector_size: int, entry_size: int) -> None:
    disk = MemoryDisk(gpt_disk(sector_size, entry_size, 8))
    disk.traits = FileDisk(Path("/dev/null"), size=0).traits  # a plain file: the size has to be found out
    table = scan(disk)
    assert table is not None
    assert table.sector_size == sector_size
    assert table.warnings == ()
    found = [(p.index, p.start // sector_size, p.size // sector_size, p.label) for p in table.partitions]
    assert found == [(2, 100, 20, "part 1"), (1, 120, 20, "part 0"), (3, 200, 1, "part 2")]


@pytest.mark.parametrize("entry_size", [0, 64, 127, 129, 384, 1 << 31])
@pytest.mark.parametrize("count", [3, 16385, 0xFFFFFFFF])
def test_impossible_arrays_are_refused(entry_size: int, count: int) -> None:
    disk = gpt_disk()
    for lba in (1, 255):
        struct.pack_into("<II", disk, lba * 512 + 80, count, entry_size)
        disk[lba * 512 + 16 : lba * 512 + 20] = bytes(4)
        struct.pack_into("<I", disk, lba * 512 + 16, zlib.crc32(disk[lba * 512 : lba * 512 + 92]))
    with pytest.raises(InvalidImage, match="both copies"):
        scan(MemoryDisk(disk))


def test_table_with_room_for_no_entry() -> None:
    disk = gpt_disk()
    for lba in (1, 255):
        struct.pack_into("<III", disk, lba * 512 + 80, 0, 128, zlib.crc32(b""))
        disk[lba * 512 + 16 : lba * 512 + 20] = bytes(4)
        struct.pack_into("<I", disk, lba * 512 + 16, zlib.crc32(disk[lba * 512 : lba * 512 + 92]))
    table = whole(disk)
    assert (table.partitions, table.warnings) == ((), ())
    assert table.metadata == ((0, 1024), (255 * 512, 512))


# ---------------------------------------------------------------------- damage


def test_every_flip_in_either_copy_is_survived() -> None:
    """One byte anywhere in the headers or the arrays: the same partitions, from the other copy, and a warning."""
    golden = gpt_disk()
    expected = whole(golden)
    assert expected.warnings == ()
    regions = [range(512, 604), range(1024, 1024 + 16384), range(255 * 512, 255 * 512 + 92)]
    regions += [range(223 * 512, 223 * 512 + 16384, 7)]
    rng = np.random.default_rng(1)
    for at in (at for region in regions for at in region):
        disk = MemoryDisk(golden)
        disk.data[at] ^= int(rng.integers(1, 256))
        table = gpt.read(disk, 512)
        assert table is not None, at
        assert table.partitions == expected.partitions, at
        assert table.disk_id == expected.disk_id, at
        assert table.warnings, at


@pytest.mark.parametrize("header", [1, 255])
@pytest.mark.parametrize("array", [2, 223])
def test_header_of_one_half_with_array_of_the_other(header: int, array: int) -> None:
    disk = gpt_disk()
    expected = whole(disk)
    disk[header * 512 + 30] ^= 1
    disk[array * 512 + 200] ^= 1
    table = whole(disk)
    assert table.partitions == expected.partitions
    assert table.warnings


def test_both_copies_damaged() -> None:
    disk = gpt_disk()
    disk[512 + 30] ^= 1
    disk[255 * 512 + 30] ^= 1
    with pytest.raises(InvalidImage, match="both copies of the GPT are damaged"):
        scan(MemoryDisk(disk))


def test_unreadable_sectors_count_as_damage(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(gpt_disk())
    expected = rows(whole(gpt_disk()))
    for bad in (0, 512, 3000, 225 * 512, 255 * 512):
        table = gpt.read(FileDisk(image, bad=(bad,)), 512)
        assert table is not None
        assert rows(table) == expected
        assert table.warnings, bad


def test_cut_and_grown_disks() -> None:
    disk = gpt_disk()
    expected = rows(whole(disk))
    grown = whole(disk + bytes(64 * 512))
    assert rows(grown) == expected
    assert any("larger" in w for w in grown.warnings)
    assert grown.metadata[-1] == (223 * 512, 33 * 512)  # where the backup really is
    cut = whole(disk[: 150 * 512])
    assert rows(cut) == expected[:2]  # the third lies in what was cut off
    assert any("smaller" in w for w in cut.warnings)
    assert any("3 lie outside the disk" in w for w in cut.warnings)
    disk[512 + 30] ^= 1
    with pytest.raises(InvalidImage):
        gpt.read(MemoryDisk(disk[: 150 * 512]), 512)
    disk[512:520] = b"EFI PORT"
    assert gpt.read(MemoryDisk(disk[: 150 * 512]), 512) is None  # not a trace of a GPT


def test_leftovers_are_not_believed() -> None:
    disk = gpt_disk()
    zeroed = bytes(512) + disk[512:]
    assert rows(whole(zeroed)) == rows(whole(disk))  # the primary proves itself
    assert any("protective MBR is missing" in w for w in whole(zeroed).warnings)
    assert gpt.read(MemoryDisk(bytes(1024) + disk[1024:]), 512) is None  # a backup alone does not
    other = bytearray(disk)
    other[450] = 0x83  # an MBR table was written over it
    table = scan(MemoryDisk(other))
    assert table is not None
    assert table.kind == "mbr"
    fat = bytearray(disk)
    fat[:64] = b"\xeb\x3c\x90mkfs.fat\0\2\4\1\0\2\0\2\0\x50\xf8".ljust(64, b"\0")
    fat[446:510] = bytes(64)
    assert scan(MemoryDisk(fat)) is None


# ---------------------------------------------------------------------- entries that cannot be trusted


@pytest.mark.parametrize(
    ("index", "first", "last", "left", "words"),
    [
        (0, 110, 130, {3}, "1, 2"),  # overlaps the second: neither is used
        (0, 0, 255, {2, 3}, "1 lie on the partition table"),
        (0, 36, 34, {2, 3}, "1 lie outside"),
        (0, 256, 300, {2, 3}, "1 lie outside"),
        (0, 150, 2**64 - 1, {2, 3}, "1 lie outside"),
        (0, 2**63, 2**63 + 5, {2, 3}, "1 lie outside"),
        (0, 33, 40, {2, 3}, "1 lie on"),
        (0, 100, 119, {3}, "1, 2"),
    ],
)
def test_untrusted_entries(index: int, first: int, last: int, left: set[int], words: str) -> None:
    table = whole(forge(gpt_disk(), index, first, last))
    assert {p.index for p in table.partitions} == left
    assert any(words in w for w in table.warnings)


def test_outside_the_usable_range_is_kept_with_a_warning() -> None:
    disk = gpt_disk()
    for lba in (1, 255):
        struct.pack_into("<Q", disk, lba * 512 + 40, 110)
        disk[lba * 512 + 16 : lba * 512 + 20] = bytes(4)
        struct.pack_into("<I", disk, lba * 512 + 16, zlib.crc32(disk[lba * 512 : lba * 512 + 92]))
    table = whole(disk)
    assert [p.index for p in table.partitions] == [2, 1, 3]
    assert table.warnings == ("partitions 2 lie outside the range the GPT calls usable",)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", None),
        (b"a\0\0\0b\0", "a"),
        (b"\x3d\xd8a\0", "�a"),  # a high surrogate without its pair
        (b"\x00\xdea\0", "�a"),  # a low one
        (b"\x3d\xd8\x00\xde", "😀"),
        (b"x\0" * 36, "x" * 36),
        (b"x\0" * 35 + b"\x3d\xd8", "x" * 35 + "�"),
    ],
)
def test_names(raw: bytes, expected: str | None) -> None:
    disk = gpt_disk()
    for at in (1024, 223 * 512):
        disk[at + 56 : at + 128] = raw.ljust(72, b"\0")
    table = whole(forge(disk, 0, 120, 139))
    assert next(p.label for p in table.partitions if p.index == 1) == expected
