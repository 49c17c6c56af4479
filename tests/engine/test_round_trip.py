"""What is backed up comes back: whole disks and partitions, to files and devices, judged by the tools of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from ferrotype.engine.restore import RestoreOptions
from ferrotype.units import MiB
from tests import disks
from tests.disks import Disk
from tests.engine.images import bytes_of, give_back, hash_of, save
from tests.machine import loop, run

DISKS = ["gpt512", "gpt4096", "mbr512", "hybrid", "bare"]


@pytest.fixture(params=DISKS)
def disk(request: pytest.FixtureRequest) -> Disk:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Disk)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    return {}


@pytest.fixture
def image(disk: Disk, saved: dict[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with one snapshot of the disk."""
    if disk.path not in saved:
        saved[disk.path] = tmp_path_factory.mktemp("image") / "disk.ferro"
        save(saved[disk.path], disk.path, disk.sector_size)
    return saved[disk.path]


def check_volumes(restored: Path, disk: Disk, folder: Path) -> None:
    """Every file system is clean for its own checker, and every file is what it was."""
    for volume in disk.volumes:
        part = disks.cut_out(restored, volume, folder / f"part{volume.index}.img")
        disks.check_clean(volume.kind, part)
        assert disks.files_of(volume.kind, part, folder / "mount", disk.sector_size) == volume.files
        disks.check_clean(volume.kind, part)
        part.unlink()


def same_table(restored: Path, disk: Disk) -> None:
    """The partitions are those of the original, and sgdisk has nothing to say against them."""
    if len(disk.volumes) == 1:
        return
    with (
        loop(disk.path, sector_size=disk.sector_size, read_only=True) as old,
        loop(restored, sector_size=disk.sector_size, read_only=True) as new,
    ):
        assert disks.table_of(new) == disks.table_of(old)
        if "label: gpt" in disks.table_of(old):
            assert "No problems found" in run("sgdisk", "-v", new)


def test_to_a_new_file(disk: Disk, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.img"
    result = give_back(str(image), out)
    disks.check_same(out.read_bytes(), disks.without_free(disk))
    assert result.disk_bytes == disk.size
    assert not result.table_moved
    assert hash_of(str(out)) == hash_of(str(image))
    same_table(out, disk)
    check_volumes(out, disk, tmp_path)


def test_a_new_file_stores_no_zeros(disk: Disk, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.img"
    result = give_back(str(image), out)
    assert result.zeroed_bytes == 0
    assert out.stat().st_blocks * 512 <= result.written_bytes + 64 * 1024


def test_to_a_device_of_the_same_size(disk: Disk, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "device.img"
    out.write_bytes(b"\xee" * disk.size)
    with loop(out, sector_size=disk.sector_size) as device:
        give_back(str(image), device, in_place=True)
    disks.check_same(out.read_bytes(), disks.without_free(disk))
    same_table(out, disk)


@pytest.mark.parametrize("kind", ["file", "device"])
def test_to_a_larger_target(disk: Disk, image: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "large.img"
    size = disk.size + 9 * MiB
    if kind == "file":
        result = give_back(str(image), out, size=size)
    else:
        disks.blank_file(out, size)
        with loop(out, sector_size=disk.sector_size) as device:
            result = give_back(str(image), device, in_place=True)
    assert out.stat().st_size == size
    assert result.table_moved == (disk.path.stem in ("gpt512", "gpt4096", "hybrid"))
    same_table(out, disk)
    if result.table_moved:
        with loop(out, sector_size=disk.sector_size, read_only=True) as device:
            last = int(run("sgdisk", "-E", device).splitlines()[-1])
            assert last * disk.sector_size > size - MiB  # the new room can be used
    wanted = disks.without_free(disk)
    with out.open("rb") as file:
        for volume in disk.volumes:
            file.seek(volume.start)
            disks.check_same(file.read(volume.size), wanted[volume.start : volume.end])


def test_the_table_stays_where_that_is_asked(gpt512: Disk, tmp_path: Path) -> None:
    save(tmp_path / "a.ferro", gpt512.path)
    out = tmp_path / "out.img"
    options = RestoreOptions(move_backup_table=False)
    result = give_back(str(tmp_path / "a.ferro"), out, size=gpt512.size + MiB, options=options)
    assert not result.table_moved
    disks.check_same(out.read_bytes(), disks.without_free(gpt512) + bytes(MiB))


@pytest.mark.parametrize("kind", ["file", "device"])
def test_single_partitions(disk: Disk, image: Path, tmp_path: Path, kind: str) -> None:
    wanted = disks.without_free(disk)
    for volume in disk.volumes:
        reference = f"{image}#{volume.index}"
        out = tmp_path / f"{volume.index}.img"
        if kind == "file":
            give_back(reference, out)
        else:
            out.write_bytes(b"\xee" * volume.size)
            with loop(out, sector_size=disk.sector_size) as device:
                give_back(reference, device, in_place=True)
        disks.check_same(out.read_bytes(), wanted[volume.start : volume.end])
        if kind == "file":
            assert hash_of(str(out)) == hash_of(reference)
            disks.check_clean(volume.kind, out)
        out.unlink()


def test_partitions_by_label(gpt512: Disk, tmp_path: Path) -> None:
    save(tmp_path / "a.ferro", gpt512.path)
    volume = gpt512.volume("ext4")
    by_number = bytes_of(f"{tmp_path / 'a.ferro'}::latest#{volume.index}")
    assert bytes_of(f"{tmp_path / 'a.ferro'}::latest#ext4 1") == by_number
    assert bytes_of(f"{tmp_path / 'a.ferro'}::latest#part {volume.index}") == by_number


def test_back_up_of_a_device(gpt4096: Disk, tmp_path: Path) -> None:
    """A device knows its sectors, so nothing needs to be said of them."""
    image = tmp_path / "a.ferro"
    with loop(gpt4096.path, sector_size=4096, read_only=True) as device:
        snapshot = save(image, device)
    assert snapshot.disks[0].sector_size == 4096
    assert snapshot.disks[0].table == "gpt"
    out = tmp_path / "out.img"
    give_back(str(image), out)
    disks.check_same(out.read_bytes(), disks.without_free(gpt4096))
