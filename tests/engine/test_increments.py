"""Backing up again: only what changed is stored, and every snapshot stays a full view of its moment."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ferrotype.block.device import open_source
from ferrotype.block.memory import MemoryDisk
from ferrotype.engine.backup import BackupOptions
from ferrotype.engine.plan import plan
from ferrotype.engine.prove import prove
from ferrotype.engine.survey import Survey, survey
from ferrotype.extents import State
from ferrotype.job import NullJob
from ferrotype.repository.sealing import ID_SIZE, Sealer
from ferrotype.repository.source import SnapshotSource
from ferrotype.units import KiB, MiB
from tests import disks
from tests.disks import Disk, Volume
from tests.engine.images import CHUNK, Watched, back_up, bytes_of, give_back, hash_of, in_memory, is_sound, save
from tests.machine import run


def copied(disk: Disk, path: Path) -> Disk:
    shutil.copy(disk.path, path)
    return Disk(path, disk.sector_size, disk.volumes)


def looked_at_again(disk: Disk, folder: Path) -> Disk:
    """The disk with its volumes as they are by now."""
    folder.mkdir()
    now = []
    for volume in disk.volumes:
        path = disks.cut_out(disk.path, volume, folder / volume.path.name)
        files = disks.files_of(volume.kind, path, folder / "mount", disk.sector_size)
        disks.cut_out(disk.path, volume, path)  # mounting may have changed it
        now.append(Volume(volume.kind, path, volume.size, files, volume.index, volume.start))
    return Disk(disk.path, disk.sector_size, tuple(now))


@contextmanager
def changing(disk: Disk, kind: str, folder: Path) -> Iterator[Path]:
    volume = disk.volume(kind)
    where = folder / "changing"
    with disks.opened(disk.path, kind, where, disk.sector_size, offset=volume.start, size=volume.size) as root:
        yield root


@pytest.mark.parametrize("name", ["gpt512", "gpt4096"])
def test_what_changed_is_stored_and_every_snapshot_is_whole(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    disk = copied(request.getfixturevalue(name), tmp_path / "disk.img")
    image = tmp_path / "a.ferro"
    first = save(image, disk.path, disk.sector_size)
    before = disks.without_free(disk)
    content = random.Random(7).randbytes(700 * KiB)
    for kind in ("ext4", "ntfs", "exfat"):
        with changing(disk, kind, tmp_path) as root:
            (root / "new").write_bytes(content[: 500 * KiB] if kind == "ext4" else content[: 100 * KiB])
            (root / "d1" / "f1").unlink()
    second = save(image, disk.path, disk.sector_size)
    assert second.parent == first.id
    # 700 KiB are new; around them whole chunks change: bitmaps, tables of inodes, folders, journals
    assert 500 * KiB < second.statistics.stored_bytes < 700 * KiB + 50 * CHUNK
    assert second.statistics.stored_bytes < first.statistics.stored_bytes / 3
    assert second.statistics.deduplicated_bytes > first.statistics.new_bytes / 2

    now = looked_at_again(disk, tmp_path / "now")
    disks.check_same(bytes_of(f"{image}::{first.id}"), before)
    disks.check_same(bytes_of(f"{image}::{second.id}"), disks.without_free(now))
    out = tmp_path / "out.img"
    give_back(f"{image}::latest~1", out)
    disks.check_same(out.read_bytes(), before)
    assert hash_of(str(out)) == hash_of(f"{image}::latest~1") != hash_of(f"{image}::latest")
    part = disks.cut_out(out, disk.volume("ext4"), tmp_path / "old.img")
    assert disks.files_of("ext4", part, tmp_path / "old", disk.sector_size) == disk.volume("ext4").files
    is_sound(image)


def test_a_changed_fat_volume(gpt512: Disk, tmp_path: Path) -> None:
    disk = copied(gpt512, tmp_path / "disk.img")
    image = tmp_path / "a.ferro"
    save(image, disk.path)
    volume = disk.volume("vfat")
    part = disks.cut_out(disk.path, volume, tmp_path / "part.img")
    (tmp_path / "new").write_bytes(random.Random(8).randbytes(200 * KiB))
    run("mcopy", "-i", part, tmp_path / "new", "::/new")
    run("mdel", "-i", part, "::/f1")
    disks.put_in(disk.path, Volume("vfat", part, volume.size, {}), volume.start)
    second = save(image, disk.path)
    assert 200 * KiB < second.statistics.stored_bytes < 200 * KiB + 8 * CHUNK
    disks.check_same(bytes_of(f"{image}::latest"), disks.without_free(looked_at_again(disk, tmp_path / "now")))
    disks.check_same(bytes_of(f"{image}::latest~1"), disks.without_free(gpt512))


@pytest.mark.parametrize("name", ["gpt512", "mbr512", "bare"])
def test_a_disk_is_known_again_under_another_name(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    disk = copied(request.getfixturevalue(name), tmp_path / "disk.img")
    image = tmp_path / "a.ferro"
    first = save(image, disk.path)
    moved = disk.path.rename(tmp_path / "another name.img")
    second = save(image, moved)
    assert second.parent == first.id
    assert second.disks[0].name != first.disks[0].name
    assert second.statistics.stored_bytes < 64 * KiB
    assert second.statistics.new_chunks == 0
    assert second.disks[0].regions == first.disks[0].regions


def test_nothing_changed_nothing_is_compressed(gpt512: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed: list[int] = []
    genuine = Sealer.seal

    def counted(self: Sealer, chunk_id: bytes, plain: bytes, /, *, compress: bool = True) -> bytes:
        if len(chunk_id) == ID_SIZE:  # a chunk; snapshots and indexes have shorter names
            sealed.append(len(plain))
        return genuine(self, chunk_id, plain, compress=compress)

    monkeypatch.setattr(Sealer, "seal", counted)
    repository = in_memory()
    source = open_source(gpt512.path)
    first = back_up(repository, source)
    assert sum(sealed) >= first.statistics.new_bytes > 0
    sealed.clear()
    second = back_up(repository, source)
    assert sealed == []
    assert second.statistics.stored_bytes < 64 * KiB
    assert second.statistics.new_bytes == 0
    source.close()


def data_cells(surveyed: Survey, chunk_size: int) -> int:
    """Bytes of the cells that hold data, counted sector by sector."""
    used = np.zeros(surveyed.size // 512, bool)
    for start, end in zip(*surveyed.extents.runs(State.FREE | State.ZERO, present=False), strict=True):
        used[start // 512 : -(-end // 512)] = True
    total = 0
    for start, length in surveyed.regions:
        for at in range(start, start + length, chunk_size):
            end = min(at + chunk_size, start + length)
            if used[at // 512 : end // 512].any():
                total += end - at
    return total


@pytest.mark.unproven
@pytest.mark.parametrize("chunk_size", [4 * KiB, 64 * KiB, MiB])
@pytest.mark.parametrize("all_sectors", [False, True])
def test_every_cell_with_data_is_read_once(gpt512: Disk, chunk_size: int, all_sectors: bool) -> None:
    surveying = Watched(open_source(gpt512.path))
    surveyed = survey(surveying)
    if not all_sectors:
        prove(surveying, surveyed, NullJob())  # which reads what leads to everything in use, as a backup does
    if all_sectors:
        surveyed = replace(surveyed, extents=surveyed.extents.masked(State.ZERO | State.HOLE))
    source = Watched(open_source(gpt512.path))
    repository = in_memory(chunk_size)
    snapshot = back_up(repository, source, options=BackupOptions(all_sectors=all_sectors))
    expected = data_cells(surveyed, chunk_size)
    assert snapshot.statistics.read_bytes == expected
    assert sum(length for _, length in source.reads) - sum(length for _, length in surveying.reads) == expected
    planned = plan(surveyed, chunk_size, all_sectors=all_sectors)
    assert planned.data_bytes <= expected
    assert planned.data_bytes + planned.free_bytes + planned.zero_bytes == gpt512.size
    statistics = snapshot.statistics
    stored = statistics.new_bytes + statistics.deduplicated_bytes
    assert statistics.zero_bytes + statistics.free_bytes + stored == gpt512.size


def test_a_moved_partition_stores_almost_nothing(volumes: list[Volume], gpt512: Disk, tmp_path: Path) -> None:
    """The grid of chunks starts at each partition, so the same file systems at other places are known."""
    image = tmp_path / "a.ferro"
    save(image, gpt512.path)
    others = disks.gpt_disk(tmp_path / "others.img", [volumes[3], volumes[2], volumes[5], volumes[1]], 512)
    snapshot = save(image, others.path)
    assert snapshot.statistics.stored_bytes < 2 * CHUNK + 64 * KiB
    disks.check_same(bytes_of(f"{image}::latest"), disks.without_free(others))


def test_a_partition_off_the_chunk_grid_deduplicates(volumes: list[Volume], tmp_path: Path) -> None:
    image = tmp_path / "a.ferro"
    save(image, disks.bare_disk(tmp_path / "bare.img", volumes[1]).path)
    path = disks.blank_file(tmp_path / "odd.img", volumes[1].size + 8 * MiB)
    start = 2 * MiB + 7 * 512
    script = f"label: dos\nstart={start // 512}, size={volumes[1].size // 512}, type=83\n"
    run("sfdisk", "--no-reread", "--no-tell-kernel", "-q", path, text_in=script)
    disks.put_in(path, volumes[1], start)
    snapshot = save(image, path)
    assert snapshot.statistics.new_bytes <= CHUNK  # the table
    assert snapshot.statistics.deduplicated_bytes > 40 * CHUNK


def test_several_disks_in_one_snapshot(gpt512: Disk, bare: Disk, gpt4096: Disk) -> None:
    repository = in_memory()
    sources = [open_source(gpt512.path), open_source(bare.path), open_source(gpt4096.path, sector_size=4096)]
    snapshot = back_up(repository, *sources)
    assert [disk.name for disk in snapshot.disks] == ["disk", "disk 2", "disk 3"]
    assert [disk.sector_size for disk in snapshot.disks] == [512, 512, 4096]
    for disk, record in zip((gpt512, bare, gpt4096), snapshot.disks, strict=True):
        found = bytearray(record.size)
        SnapshotSource(repository, record).read_into(0, memoryview(found))
        disks.check_same(found, disks.without_free(disk))
    # the second disk is the second partition of the first
    assert snapshot.statistics.deduplicated_bytes >= bare.size // 4
    again = back_up(repository, *sources)
    assert again.parent == snapshot.id
    assert again.statistics.new_bytes == 0
    for source in sources:
        source.close()


def test_a_disk_that_grew_or_shrank(bare: Disk) -> None:
    repository = in_memory()
    content = random.Random(4).randbytes(3 * MiB)
    for size in (2 * MiB, 3 * MiB, MiB + 512, 3 * MiB):
        snapshot = back_up(repository, MemoryDisk(content[:size]))
        found = bytearray(size)
        SnapshotSource(repository, snapshot.disks[0]).read_into(0, memoryview(found))
        disks.check_same(found, content[:size])
    assert snapshot.statistics.new_bytes == 0


def test_the_parent_keeps_its_chunk_size(bare: Disk, tmp_path: Path) -> None:
    job = NullJob()
    repository = in_memory(16 * KiB)
    source = open_source(bare.path)
    first = back_up(repository, source, job=job)
    second = back_up(repository, source, job=job)
    assert first.disks[0].chunk_size == second.disks[0].chunk_size == 16 * KiB
    source.close()
