"""What is kept and what is left out: every sector, swap files, and file systems whose map cannot be trusted."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ferrotype.engine.backup import BackupOptions
from ferrotype.job import NullJob
from ferrotype.units import KiB, MiB
from tests import disks
from tests.disks import Disk, Volume
from tests.engine.images import bytes_of, give_back, save
from tests.machine import loop, mounted, need, run


@pytest.mark.parametrize("name", ["gpt512", "gpt4096", "mbr512"])
def test_every_sector(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    disk: Disk = request.getfixturevalue(name)
    image, out = tmp_path / "a.ferro", tmp_path / "out.img"
    snapshot = save(image, disk.path, disk.sector_size, options=BackupOptions(all_sectors=True))
    assert snapshot.disks[0].all_sectors
    assert snapshot.statistics.free_bytes == 0
    give_back(str(image), out)
    disks.check_same(out.read_bytes(), disk.image())
    assert disks.without_free(disk) != disk.image()  # there was something stale to lose


def test_every_sector_after_a_backup_without(gpt512: Disk, tmp_path: Path) -> None:
    image = tmp_path / "a.ferro"
    save(image, gpt512.path)
    save(image, gpt512.path, options=BackupOptions(all_sectors=True))
    save(image, gpt512.path)
    disks.check_same(bytes_of(f"{image}::latest~1"), gpt512.image())
    disks.check_same(bytes_of(f"{image}::latest"), disks.without_free(gpt512))


def test_swap_files_are_left_out(gpt512: Disk, tmp_path: Path) -> None:
    image, out = tmp_path / "a.ferro", tmp_path / "out.img"
    job = NullJob()
    save(image, gpt512.path)
    whole = bytes_of(f"{image}::latest")
    snapshot = save(image, gpt512.path, options=BackupOptions(exclude_swap_files=True), job=job)
    assert any("left out" in line for line in job.warnings + job.notes)
    give_back(str(image), out)
    volume = gpt512.volume("ntfs")
    part = disks.cut_out(out, volume, tmp_path / "ntfs.img")
    disks.check_clean("ntfs", part)
    found = disks.files_of("ntfs", part, tmp_path / "mount")
    assert {path for path in volume.files if found[path] != volume.files[path]} == {"pagefile.sys"}
    with disks.opened(part, "ntfs", tmp_path / "mount") as root:
        assert (root / "pagefile.sys").read_bytes() == bytes(600 * KiB)
    restored = out.read_bytes()
    differing = sum(1 for at in range(0, len(whole), 4096) if whole[at : at + 4096] != restored[at : at + 4096])
    assert differing * 4096 == 600 * KiB
    assert snapshot.statistics.free_bytes > 600 * KiB


def test_swap_files_stay_unless_that_is_asked(gpt512: Disk, tmp_path: Path) -> None:
    save(tmp_path / "a.ferro", gpt512.path)
    part = tmp_path / "part.img"
    volume = gpt512.volume("ntfs")
    give_back(f"{tmp_path / 'a.ferro'}#{volume.index}", part)
    assert disks.files_of("ntfs", part, tmp_path / "mount")["pagefile.sys"] == volume.files["pagefile.sys"]


# ---------------------------------------------------------------------- kept whole


def in_use(volume: Volume, folder: Path) -> Path:
    """A copy of an ext4 volume made while it is mounted and its journal is not empty."""
    live, copy = folder / "live.img", folder / "copy.img"
    shutil.copy(volume.path, live)
    with loop(live) as device, mounted(device, "ext4", folder / "mnt") as root:
        (root / "written").write_bytes(b"w" * 5000)
        run("sync", "-f", root)
        shutil.copy(live, copy)
    return copy


def dirty_ntfs(volume: Volume, folder: Path) -> Path:
    copy = folder / "copy.img"
    shutil.copy(volume.path, copy)
    run("ntfsfix", copy)  # marks it for checking by Windows
    return copy


def hibernated(volume: Volume, folder: Path) -> Path:
    copy = folder / "copy.img"
    shutil.copy(volume.path, copy)
    with disks.opened(copy, "ntfs", folder / "mnt") as root:
        (root / "hiberfil.sys").write_bytes(b"hibr" + random.Random(1).randbytes(100 * KiB))
    return copy


def with_error(volume: Volume, folder: Path) -> Path:
    """A superblock that says errors were found."""
    need("debugfs")
    copy = folder / "copy.img"
    shutil.copy(volume.path, copy)
    run("debugfs", "-w", "-R", "set_super_value state 2", copy)
    return copy


def damaged_ext(volume: Volume, folder: Path) -> Path:
    copy = folder / "copy.img"
    data = bytearray(volume.path.read_bytes())
    data[2048:2064] = b"\xff" * 16  # the first group descriptor: where its bitmaps lie
    copy.write_bytes(data)
    return copy


def _spoiled(volume: Volume, folder: Path, *places: int) -> Path:
    copy = folder / "copy.img"
    data = bytearray(volume.path.read_bytes())
    for place in places:
        data[place] ^= 0xFF
    copy.write_bytes(data)
    return copy


def spoiled_superblock(volume: Volume, folder: Path) -> Path:
    """One byte that nothing but the checksum of the superblock covers."""
    return _spoiled(volume, folder, 1024 + 0x200)


def spoiled_boot_sectors(volume: Volume, folder: Path) -> Path:
    """VolumeLength in both boot regions of an exFAT volume."""
    return _spoiled(volume, folder, 0x48, 12 * 512 + 0x48)


def without_mft(volume: Volume, folder: Path) -> Path:
    """Both copies of the first records of the $MFT are gone."""
    copy = folder / "copy.img"
    data = bytearray(volume.path.read_bytes())
    cluster = int.from_bytes(data[11:13], "little") * data[13]
    for field in (48, 56):  # MftStartLcn, Mft2StartLcn
        at = int.from_bytes(data[field : field + 8], "little") * cluster
        data[at : at + 4096] = b"\xff" * 4096
    copy.write_bytes(data)
    return copy


def without_fat(volume: Volume, folder: Path) -> Path:
    """All that the first FAT begins with is gone."""
    copy = folder / "copy.img"
    data = bytearray(volume.path.read_bytes())
    fat = int.from_bytes(data[14:16], "little") * 512
    data[fat : fat + 512] = bytes(512)
    copy.write_bytes(data)
    return copy


def dirty_exfat(volume: Volume, folder: Path) -> Path:
    copy = folder / "copy.img"
    data = bytearray(volume.path.read_bytes())
    data[106] |= 2  # VolumeDirty of VolumeFlags
    copy.write_bytes(data)
    return copy


def dirty_fat(volume: Volume, folder: Path) -> Path:
    copy = folder / "copy.img"
    data = bytearray(volume.path.read_bytes())
    fat = int.from_bytes(data[14:16], "little") * 512
    data[fat + 3] &= 0x7F  # ClnShutBitMask of FAT[1]
    copy.write_bytes(data)
    return copy


def unknown(volume: Volume, folder: Path) -> Path:
    return volume.path


KEPT: list[tuple[str, Callable[[Volume, Path], Path]]] = [
    ("ext4", in_use),
    ("ext4", with_error),
    ("ext4", damaged_ext),
    ("ext4", spoiled_superblock),
    ("ntfs", without_mft),
    ("vfat", without_fat),
    ("exfat", spoiled_boot_sectors),
    ("ntfs", dirty_ntfs),
    ("ntfs", hibernated),
    ("exfat", dirty_exfat),
    ("vfat", dirty_fat),
    ("noise", unknown),
]


@pytest.mark.parametrize(("kind", "spoil"), KEPT, ids=[spoil.__name__ for _, spoil in KEPT])
def test_what_cannot_be_trusted_is_kept_whole(
    volumes: list[Volume], kind: str, spoil: Callable[[Volume, Path], Path], tmp_path: Path
) -> None:
    volume = next(v for v in volumes if v.kind == kind)
    spoiled = spoil(volume, tmp_path)
    image, job = tmp_path / "a.ferro", NullJob()
    save(image, spoiled, job=job, options=BackupOptions(exclude_swap_files=True))
    told = job.notes if kind == "noise" else job.warnings  # it is no trouble to know of something nobody knows
    assert len(told) == 1
    assert "kept whole" in told[0]
    out = tmp_path / "out.img"
    give_back(str(image), out)
    disks.check_same(out.read_bytes(), spoiled.read_bytes())


def test_only_the_volume_in_doubt_is_kept_whole(gpt512: Disk, tmp_path: Path) -> None:
    """One bad file system does not cost the others their map."""
    path = tmp_path / "disk.img"
    shutil.copy(gpt512.path, path)
    volume = gpt512.volume("ext4")
    spoiled = with_error(volume, tmp_path)
    disks.put_in(path, Volume("ext4", spoiled, volume.size, {}), volume.start)
    image, job = tmp_path / "a.ferro", NullJob()
    save(image, path, job=job)
    wanted = bytearray(disks.without_free(gpt512))
    wanted[volume.start : volume.end] = spoiled.read_bytes()
    disks.check_same(bytes_of(f"{image}::latest"), wanted)
    assert sum("ext4 1" in warning for warning in job.warnings) == 1


def test_all_sectors_has_no_doubts(volumes: list[Volume], tmp_path: Path) -> None:
    """Where everything is kept anyway, nothing needs a warning."""
    spoiled = dirty_exfat(next(v for v in volumes if v.kind == "exfat"), tmp_path)
    job = NullJob()
    save(tmp_path / "a.ferro", spoiled, job=job, options=BackupOptions(all_sectors=True))
    assert job.warnings == []


def test_a_damaged_table_keeps_the_whole_disk(gpt512: Disk, tmp_path: Path) -> None:
    path, job = tmp_path / "disk.img", NullJob()
    data = bytearray(gpt512.image())
    data[512 + 16 : 512 + 20] = b"\0" * 4  # both headers' checksums
    data[-512 + 16 : -512 + 20] = b"\0" * 4
    path.write_bytes(data)
    save(tmp_path / "a.ferro", path, job=job)
    assert job.warnings
    disks.check_same(bytes_of(f"{tmp_path / 'a.ferro'}::latest"), data)
    out = tmp_path / "out.img"
    give_back(str(tmp_path / "a.ferro"), out, size=len(data) + MiB, job=job)
    disks.check_same(out.read_bytes(), bytes(data) + bytes(MiB))
