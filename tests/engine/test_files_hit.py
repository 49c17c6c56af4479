"""Damage traced to files: a chunk is lost, and verify names snapshot, disk, range and the files in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from ferrotype.block import Source, read
from ferrotype.block.memory import MemoryDisk
from ferrotype.block.views import Slice
from ferrotype.engine import damage as damage_module
from ferrotype.engine import files as files_module
from ferrotype.engine.damage import find_damage
from ferrotype.engine.files import Lossy, Stretch, files_hit, recorded_layout, within
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.errors import MissingChunk, ReadError
from ferrotype.extents import ExtentMap, Offsets
from ferrotype.filesystems.registry import Identified
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.objects.layout import RecordHeader
from ferrotype.repository.snapshots import DiskRecord, Region
from ferrotype.repository.store import Repository
from tests.cli.program import ferrotype
from tests.machine import need, run
from tests.repository.small import CHUNK

MIB = 1 << 20


class Known:
    """A file system that says which ranges it was asked about."""

    def files_at(self, starts: Offsets, ends: Offsets, /) -> tuple[str, ...]:
        return tuple(f"{start}-{end}" for start, end in zip(starts.tolist(), ends.tolist(), strict=True))


def known(source: Source) -> Identified:
    return Identified("known", None, None, Known(), None)  # type: ignore[arg-type]


def test_ranges_are_those_of_each_volume() -> None:
    layout = [Stretch(1, 1000, 500), Stretch(2, 2000, 500)]
    disk = MemoryDisk(4096)
    ranges = [(0, 10), (900, 200), (1490, 600), (2400, 1000)]
    with mock.patch.object(files_module, "identify", known):
        assert files_hit(disk, ranges, layout) == ("#1/0-100", "#1/490-500", "#2/0-90", "#2/400-500")
        assert files_hit(disk, [(1600, 100)], layout) == ()
        assert files_hit(disk, [(7, 9)]) == ("/7-16",)
    assert within([(10, 10), (15, 10), (25, 5), (40, 5)], Stretch(0, 12, 30)) == [(0, 18), (28, 2)]


def test_names_are_bounded() -> None:
    ranges = [(at, 1) for at in range(0, 4000, 2)]
    with mock.patch.object(files_module, "identify", known):
        found = files_hit(MemoryDisk(4096), ranges, [Stretch(0, 0, 4096)])
    assert len(found) == 1001
    assert found[-1] == "..."


def test_a_lost_part_is_like_a_bad_sector() -> None:
    class Broken(MemoryDisk):
        def read_into(self, offset: int, buf: memoryview, /) -> None:
            if offset < 8192:
                raise MissingChunk(bytes(32))
            super().read_into(offset, buf)

        def extents(self, offset: int, length: int, /) -> ExtentMap:  # noqa: ARG002
            raise MissingChunk(bytes(32))

    lossy = Lossy(Broken(MIB))
    with pytest.raises(ReadError):
        read(lossy, 0, 512)
    assert read(lossy, 8192, 4) == bytes(4)
    assert lossy.extents(0, 100).length == 100
    assert files_hit(Broken(MIB), [(0, 100)]) == ()
    assert files_hit(Slice(Broken(MIB), 0, MIB), [(0, 100)], [Stretch(1, 0, MIB)]) == ()


@pytest.mark.parametrize(
    "volume",
    [
        {},
        {"index": 1, "start": -1, "size": 5},
        {"index": 1, "start": 0, "size": MIB + 1},
        {"index": 1, "start": "0", "size": 5},
        {"index": True, "start": 0, "size": 5},
        {"index": -1, "start": 0, "size": 5},
        {"index": 1, "start": 0, "size": 0},
        {"index": 1, "start": 1 << 70, "size": 1 << 70},
    ],
)
def test_a_recorded_layout_is_not_trusted(volume: dict[str, object]) -> None:
    good = {"index": 2, "start": 512, "size": 1024}
    disk = DiskRecord(
        name="a",
        size=MIB,
        sector_size=512,
        chunk_size=CHUNK,
        regions=(Region(0, MIB, "00" * 32),),
        volumes=(volume, good),
    )
    assert recorded_layout(disk) == (Stretch(2, 512, 1024),)


# ---------------------------------------------------------------------- through verify


def disk_with_files(path: Path) -> bytes:
    """An MBR and a FAT volume of 6 MiB with two files, a.bin and b.bin, of 256 KiB each; the bytes of a.bin."""
    need("mkfs.vfat", "mcopy", "sfdisk")
    part = path.with_suffix(".part")
    part.write_bytes(bytes(6 * MIB))
    run("mkfs.vfat", "-s", "8", part)
    wanted = b""
    for name in ("a.bin", "b.bin"):
        content = np.random.default_rng(len(wanted)).integers(0, 256, MIB // 4, np.uint8).tobytes()
        path.with_name(name).write_bytes(content)
        run("mcopy", "-i", part, path.with_name(name), "::/")
        wanted = wanted or content
    path.write_bytes(bytes(MIB) + part.read_bytes() + bytes(MIB))
    run("sfdisk", "-q", path, text_in="label: dos\nstart=2048, size=12288, type=e\n")
    return wanted


def spoil(image: Path, disk: Path, chunk_size: int, content: bytes) -> int:
    """Flip a bit in the frame of the chunk of the disk that holds the middle of ``content``; the chunk's offset."""
    whole = disk.read_bytes()
    at = (whole.index(content[:512]) + len(content) // 2) // chunk_size * chunk_size
    store = Container.open(image)
    with Repository.open(store) as repository:
        where = repository.locate(repository.sealer.id_of(whole[at : at + chunk_size]))
        (entry,) = [entry for entry in store.live() if entry.name == where.pack]
        offset = entry.offset + RecordHeader.SIZE + where.offset + where.length // 2
    with image.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 4]))
    return at


def test_verify_names_snapshot_disk_range_and_file(tmp_path: Path) -> None:
    disk, image = tmp_path / "disk.img", tmp_path / "laptop.ferro"
    content = disk_with_files(disk)
    ferrotype("backup", "--verify-after", "--chunk-size", "16KiB", "--name", "monday", disk, image)
    ferrotype("backup", "--name", "tuesday", disk, image)
    at = spoil(image, disk, 16384, content)
    snapshots = ferrotype("list", "--json", image).document["snapshots"]
    done = ferrotype("verify", "--json", image, code=1)
    expected = [
        {"snapshot": one["id"], "disk": "disk.img", "start": at, "length": 16384, "files": ["#1/a.bin"]}
        for one in snapshots
    ]
    assert done.document["damaged"] == expected
    assert not done.document["ok"]
    out = ferrotype("verify", image, code=1).out
    assert (
        f"snapshot {snapshots[0]['id'][:8]} (monday), disk disk.img: 16384 bytes at {at} cannot be given back" in out
    )
    assert "\n    #1/a.bin\n" in out
    assert "b.bin" not in out


def test_since_last_walks_the_image(tmp_path: Path) -> None:
    disk, image = tmp_path / "disk.img", tmp_path / "laptop.ferro"
    disk.write_bytes(np.random.default_rng(1).integers(0, 256, 5 * MIB, np.uint8).tobytes())
    ferrotype("backup", "--pack-size", "1MiB", disk, image)
    env = {"XDG_STATE_HOME": str(tmp_path / "state")}
    shares = []
    for _ in range(3):
        document = ferrotype("verify", "--sample", "40%", "--since-last", "--json", image, env=env).document
        shares.append(document["round"]["share"])
        assert document["ok"]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1] == 1
    assert document["round"]["complete"]
    (kept,) = (tmp_path / "state/ferrotype/verify").iterdir()
    assert json.loads(kept.read_bytes())["share"] == 1
    out = ferrotype("verify", "--since-last", image, env=env).out
    assert "in turns: 100.0% of the stored packs" in out
    (tmp_path / "state/ferrotype/verify" / kept.name).unlink()
    (tmp_path / "state/ferrotype/verify").rmdir()
    (tmp_path / "state/ferrotype/verify").write_bytes(b"")
    assert "cannot be" in ferrotype("verify", "--since-last", image, env=env, code=8).err


def test_a_volume_that_snapshots_share_is_walked_once(tmp_path: Path) -> None:
    disk, image = tmp_path / "disk.img", tmp_path / "laptop.ferro"
    content = disk_with_files(disk)
    for _ in range(4):
        ferrotype("backup", *([] if image.exists() else ["--chunk-size", "16KiB"]), disk, image)
    at = spoil(image, disk, 16384, content)
    walks: list[object] = []

    def counted(source: Source, volume: Stretch, ranges: Sequence[tuple[int, int]]) -> tuple[str, ...]:
        walks.append(ranges)
        return files_module.files_in(source, volume, ranges)

    with Repository.open(Container.open(image)) as repository, mock.patch.object(damage_module, "files_in", counted):
        result = verify(repository, VerifyOptions(workers=1), NullJob())
        assert [damage.files for damage in result.damaged] == [("#1/a.bin",)] * 4
        assert len(walks) == 1
        with mock.patch.object(damage_module, "_WALKS", 0):
            lost: set[bytes] = {repository.sealer.id_of(disk.read_bytes()[at : at + 16384])}
            found = find_damage(repository, lost, repository.snapshots(), NullJob())
            assert [damage.files for damage in found] == [("...",)] * 4
