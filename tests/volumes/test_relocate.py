"""A GPT moved to a larger disk, judged by sgdisk and sfdisk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ferrotype.block.memory import MemoryDisk
from ferrotype.errors import InvalidImage, UsageError
from ferrotype.units import MiB, TiB
from ferrotype.volumes.relocate import moved_backup
from ferrotype.volumes.scan import scan
from tests.machine import loop, run
from tests.volumes.disks import FileDisk, blank, by_sfdisk, rows, sfdisk
from tests.volumes.test_gpt import THREE, gpt_disk
from tests.volumes.test_mbr import disk_of, sector


def grow(image: Path, new_size: int, sector_size: int, target: Path) -> Path:
    """A copy of ``image`` of ``new_size`` bytes with its table moved."""
    writes = moved_backup(FileDisk(image), new_size, sector_size)
    assert [offset for offset, _ in writes] == sorted(offset for offset, _ in writes)
    shutil.copy(image, target)
    with target.open("r+b") as file:
        file.truncate(new_size)
        for offset, data in writes:
            assert len(data) % sector_size == 0
            assert offset + len(data) <= new_size
            file.seek(offset)
            file.write(data)
    return target


def judge(device: Path, expected: list[object], sector_size: int) -> None:
    """No complaint by either tool, the same partitions, and nothing left to warn of."""
    verdict = run("sgdisk", "-v", device)
    assert "No problems found" in verdict, verdict
    verdict = run("sfdisk", "-V", device)
    assert "No errors detected" in verdict, verdict
    assert by_sfdisk(device) == expected
    table = scan(FileDisk(device), sector_size=sector_size)
    assert table is not None
    assert rows(table) == expected
    assert table.warnings == ()


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize("more", [4096, 33 * 4096, 50 * MiB + 4096])
def test_tools_accept_the_moved_table(tmp_path: Path, sector_size: int, more: int) -> None:
    image = blank(tmp_path / "small.img", 48 * MiB)
    with loop(image, sector_size=sector_size) as device:
        sfdisk(device, THREE)
        expected = by_sfdisk(device)
    target = grow(image, 48 * MiB + more, sector_size, tmp_path / "large.img")
    with loop(target, sector_size=sector_size) as device:
        judge(device, list(expected), sector_size)
        # all of the new room is usable
        free = run("sfdisk", "-F", device)
        assert str(target.stat().st_size // sector_size - 2 - 16384 // sector_size) in free
    data = target.read_bytes()
    assert data.count(b"EFI PART") == 2  # the old backup is gone


def test_protective_entry_is_capped(tmp_path: Path) -> None:
    image = blank(tmp_path / "small.img")
    sfdisk(image, THREE)
    expected = by_sfdisk(image)
    target = blank(tmp_path / "large.img", 3 * TiB)
    with target.open("r+b") as file:
        file.write(image.read_bytes())
        for offset, data in moved_backup(FileDisk(image), 3 * TiB, 512):
            file.seek(offset)
            file.write(data)
        file.seek(446 + 8)
        assert file.read(8) == bytes.fromhex("01000000ffffffff")
    judge(target, list(expected), 512)


def test_hybrid_entries_stay(tmp_path: Path) -> None:
    image = blank(tmp_path / "small.img")
    sfdisk(image, THREE)
    run("sgdisk", "-h", "1:2", image)
    target = grow(image, 32 * MiB, 512, tmp_path / "large.img")
    assert target.read_bytes()[:512] == image.read_bytes()[:512]
    assert by_sfdisk(target) == by_sfdisk(image)
    assert "No problems found" in run("sgdisk", "-v", target)


@pytest.mark.parametrize("damage", [512 + 60, 1024 + 40, 16 * MiB - 512 + 60, 16 * MiB - 33 * 512 + 40])
def test_damage_is_mended_on_the_way(tmp_path: Path, damage: int) -> None:
    image = blank(tmp_path / "small.img")
    sfdisk(image, THREE)
    expected = by_sfdisk(image)
    with image.open("r+b") as file:
        file.seek(damage)
        file.write(b"\xff")
    judge(grow(image, 24 * MiB, 512, tmp_path / "large.img"), list(expected), 512)


def test_nothing_to_move() -> None:
    disk = MemoryDisk(gpt_disk())
    assert moved_backup(disk, disk.size, 512) == ()
    assert moved_backup(disk, disk.size + 511, 512) == ()
    assert moved_backup(disk_of({0: sector((0x83, 8, 8))}), 1 << 30, 512) == ()
    assert moved_backup(MemoryDisk(MiB), 2 * MiB, 512) == ()


def test_what_cannot_be_moved() -> None:
    disk = MemoryDisk(gpt_disk())
    with pytest.raises(UsageError, match="does not fit"):
        moved_backup(disk, disk.size - 512, 512)
    disk.data[512 + 30] ^= 1
    disk.data[255 * 512 + 30] ^= 1
    with pytest.raises(InvalidImage):
        moved_backup(disk, disk.size * 2, 512)
