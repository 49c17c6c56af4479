"""A second opinion on what is left out: aged volumes are proven, and a map that is wrong anywhere is found out.

The maps are made wrong as bad software would: their checksums and counts are right.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import ferrotype
from ferrotype.block.device import open_source
from ferrotype.engine.prove import Proof, prove
from ferrotype.engine.survey import survey
from ferrotype.errors import InvalidImage
from ferrotype.extents import State
from ferrotype.filesystems import exfat, fat, ntfs
from ferrotype.filesystems.ntfs_records import DATA
from ferrotype.job import NullJob
from ferrotype.units import KiB, MiB
from tests import disks
from tests.cli.program import ferrotype as program
from tests.disks import Disk
from tests.machine import corpus, loop, mounted, run, unpack

SEED = random.Random(5).randbytes(4096)


def proofs(path: Path, *, exclude_swap_files: bool = False) -> tuple[Proof, ...]:
    source = open_source(path)
    try:
        surveyed = survey(source, exclude_swap_files=exclude_swap_files)
        return prove(source, surveyed, NullJob(), exclude_swap_files=exclude_swap_files)
    finally:
        source.close()


# ---------------------------------------------------------------------- volumes that are right


def test_used_disks_are_proven(gpt512: Disk, mbr512: Disk, gpt4096: Disk) -> None:
    for disk in (gpt512, mbr512, gpt4096):
        source = open_source(disk.path, sector_size=disk.sector_size)
        surveyed = survey(source)
        found = prove(source, surveyed, NullJob())
        source.close()
        assert {proof.volume.index for proof in found} == {v.index for v in disk.volumes if v.kind != "noise"}
        for proof in found:
            assert proof.proven, proof
            volume = next(v for v in disk.volumes if v.index == proof.volume.index)
            assert proof.files >= len(volume.files)
        assert sum(proof.free_bytes for proof in found) == surveyed.extents.total(State.FREE)


def test_paging_files_that_are_to_be_left_out_are_no_contradiction(gpt512: Disk) -> None:
    without, kept = proofs(gpt512.path, exclude_swap_files=True), proofs(gpt512.path)
    assert all(proof.proven for proof in (*without, *kept))
    assert sum(proof.free_bytes for proof in without) == sum(proof.free_bytes for proof in kept) + 600 * KiB


CLEAN = [
    entry
    for entry in corpus()
    if entry["format"] == "raw"
    and entry["kind"] == "filesystem"
    and {"ext2", "ext3", "ext4", "ntfs", "vfat", "fat", "fat12", "fat16", "exfat", "swap"} & set(entry["holds"])
    and entry["decompressed_size"] <= 64 * MiB
]


@pytest.mark.parametrize("entry", CLEAN, ids=[entry["id"] for entry in CLEAN])
def test_file_systems_of_others_are_proven(entry: dict[str, object], tmp_path: Path) -> None:
    for proof in proofs(unpack(entry, tmp_path)):
        assert proof.proven, proof


# ---------------------------------------------------------------------- maps that are wrong


def made_ext(folder: Path, *features: str) -> Path:
    image = folder / "ext.img"
    image.write_bytes(random.Random(1).randbytes(12 * MiB))
    run("mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-J", "size=1", "-E", "nodiscard", *features, image)
    with loop(image) as device, mounted(device, "ext4", folder / "mnt") as root:
        (root / "folder").mkdir()
        for i in range(60):
            (root / "folder" / f"a file with a long name {i}").write_bytes(SEED[: i * 60])
        with (root / "pieces").open("wb") as file:  # with a node of its tree in a block of its own
            for i in range(40):
                file.seek(i * 4096)
                file.write(SEED[:1024])
        (root / "attributed").write_bytes(b"x")
        os.setxattr(root / "attributed", "user.text", b"y" * 700)
    return image


def blocks_of(image: Path, request: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", run("debugfs", "-R", request, image))]


def free_ext(image: Path, block: int) -> None:
    """The bitmap calls the block free, and so do all counts and checksums."""
    dump = run("dumpe2fs", image)
    found = [m for m in re.finditer(r"Group (\d+): \(Blocks (\d+)-(\d+)\)", dump) if int(m[2]) <= block <= int(m[3])]
    group = int(found[0][1])
    rest = dump[found[0].end() :]
    count = re.search(r"(\d+) free blocks", rest)
    assert count
    commands = f"freeb {block}\nset_bg {group} free_blocks_count {int(count[1]) + 1}\nset_bg {group} checksum calc\n"
    run("debugfs", "-w", "-f", "-", image, text_in=commands)


def _acl(image: Path) -> int:
    match = re.search(r"File ACL: (\d+)", run("debugfs", "-R", "stat /attributed", image))
    assert match
    return int(match[1])


EXT: dict[str, tuple[Callable[[Path], int], str]] = {
    "content": (lambda i: blocks_of(i, "blocks /pieces")[-1], "pieces"),
    "tree": (lambda i: int(run("debugfs", "-R", "ex /pieces", i).split("\n")[1].split()[7]), "pieces"),
    "folder": (lambda i: blocks_of(i, "blocks /folder")[0], "folder"),
    "attributes": (_acl, "attributed"),
    "journal": (lambda i: blocks_of(i, "blocks <8>")[-1], "<journal>"),
    "resize": (lambda i: blocks_of(i, "blocks <7>")[0], "<resize inode>"),
}


@pytest.fixture(scope="module", params=["crc", "no-crc"])
def ext4(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    features = () if request.param == "crc" else ("-O", "^metadata_csum,^64bit,^uninit_bg", "-I", "128")
    return made_ext(tmp_path_factory.mktemp("ext"), *features)


@pytest.mark.unproven
@pytest.mark.parametrize("what", EXT)
def test_a_wrong_bitmap_of_ext4_is_found_out(ext4: Path, what: str, tmp_path: Path) -> None:
    image = _copy(ext4, tmp_path)
    place, owner = EXT[what]
    block = place(image)
    assert block > 0
    free_ext(image, block)
    refused(image, block * 1024, 1024, owner)


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """NTFS, exFAT, FAT16 and FAT32 with a file, a folder, and much that came and went."""
    folder = tmp_path_factory.mktemp("windows")
    found = {kind: disks.make_volume(folder, kind, 12 * MiB).path for kind in ("ntfs", "exfat", "vfat")}
    for kind in ("ntfs", "exfat"):
        with disks.opened(found[kind], kind, folder / "mnt") as root:
            _fill(root)
    tree = folder / "tree"
    tree.mkdir()
    _fill(tree)
    found["fat32"] = folder / "fat32.img"
    found["fat32"].write_bytes(bytes(40 * MiB))
    run("mkfs.vfat", "-F32", "-s1", found["fat32"])
    for kind in ("vfat", "fat32"):
        run("mcopy", "-s", "-i", found[kind], tree / "named", tree / "content", "::/")
    return found


def _fill(root: Path) -> None:
    (root / "named").mkdir()
    for i in range(50):
        (root / "named" / f"ENTRY{i:03}").write_bytes(b"entry")
    (root / "content").write_bytes(SEED * 20)


def place_of(image: Path, what: str) -> int:
    """The byte of the image at which the second half of the file begins, or a list of names of the folder."""
    data = image.read_bytes()
    if what == "content":
        at = data.index(SEED[:512])
        return at + 40 * KiB
    for text in ("ENTRY030", "E\0N\0T\0R\0Y\x000\x003\x000"):
        if text.encode() in data:
            return data.rindex(text.encode())  # on NTFS in the folder, behind the file's own record
    raise AssertionError("no such folder")


def free_cluster(kind: str, image: Path, place: int) -> tuple[int, int]:
    """The map calls the cluster free; start and length of the cluster."""
    data, source = bytearray(image.read_bytes()), open_source(image)
    if kind == "ntfs":
        volume = ntfs.open(source)
        bitmap, unit = volume._mft.content(volume._mft.record(6), DATA), volume.facts.block_size
        assert bitmap
        number = place // unit
        data[bitmap.lcns[0] * unit + number // 8] &= ~(1 << number % 8)
        start = number * unit
    elif kind == "exfat":
        other = exfat.open(source)
        unit, number = other.facts.block_size, (place - other._heap) // other._cluster
        data[other._bitmap[0][0] + number // 8] &= ~(1 << number % 8)
        start = other._heap + number * unit
    else:
        layout = fat.open(source)._layout
        unit, number = layout.cluster, (place - layout.data_start) // layout.cluster
        for table in range(layout.fats):
            at = layout.fat_start + table * layout.fat_size + (number + 2) * layout.bits // 8
            data[at : at + layout.bits // 8] = bytes(layout.bits // 8)
        start = layout.data_start + number * unit
    source.close()
    image.write_bytes(data)
    return start, unit


@pytest.mark.unproven
@pytest.mark.parametrize("what", ["content", "named"])
@pytest.mark.parametrize("kind", ["ntfs", "exfat", "vfat", "fat32"])
def test_a_wrong_map_is_found_out(windows: dict[str, Path], kind: str, what: str, tmp_path: Path) -> None:
    image = _copy(windows[kind], tmp_path)
    start, length = free_cluster(kind, image, place_of(image, what))
    refused(image, start, length, what)


def _copy(image: Path, folder: Path) -> Path:
    return Path(shutil.copy(image, folder / "wrong.img"))


def refused(image: Path, start: int, length: int, owner: str) -> None:
    """The range is told, and whose it is; and nothing is backed up, into an image that there is or into a new one."""
    (proof,) = proofs(image)
    assert not proof.proven
    assert any(low <= start and start + length <= low + size for low, size in proof.conflicts), proof
    assert any(name.split("/")[0] == owner for name in proof.names), proof.names
    target = image.with_name("a.ferro")
    with pytest.raises(InvalidImage, match="nothing was stored"):
        ferrotype.backup(image, target, prove_free=True)
    assert not list(ferrotype.list_snapshots(target))
    ferrotype.backup(image, target)
    with pytest.raises(InvalidImage, match=re.escape(proof.names[0])):
        ferrotype.backup(image, target, prove_free=True)
    assert len(list(ferrotype.list_snapshots(target))) == 1
    assert len(ferrotype.backup(image, target, prove_free=True, all_sectors=True).disks) == 1
    job = NullJob()
    kept = ferrotype.backup(image, image.with_name("kept.ferro"), job=job)
    assert kept.statistics.free_bytes == 0
    assert any("kept whole" in text and proof.names[0] in text for text in job.warnings)
    ferrotype.restore(image.with_name("kept.ferro"), image.with_name("back.img"))
    assert (image.with_name("back.img")).read_bytes() == image.read_bytes()


@pytest.mark.unproven
def test_a_volume_that_cannot_be_walked_is_not_called_proven(ext4: Path, tmp_path: Path) -> None:
    image = _copy(ext4, tmp_path)
    run("debugfs", "-w", "-R", "set_inode_field /pieces block[4] 0x7fffffff", image)
    (proof,) = proofs(image)
    assert not proof.proven
    assert proof.problem
    with pytest.raises(InvalidImage, match="cannot be proven"):
        ferrotype.backup(image, tmp_path / "a.ferro", prove_free=True)


# ---------------------------------------------------------------------- how it is told


def test_the_command_line_tells_and_records_the_proof(gpt512: Disk, tmp_path: Path) -> None:
    image = tmp_path / "a.ferro"
    done = program("backup", "--prove-free", "--json", gpt512.path, image)
    proven = json.loads(done.out)["proven"]
    assert {row["index"] for row in proven} == {v.index for v in gpt512.volumes if v.kind != "noise"}
    assert all(row["free_bytes"] > 0 for row in proven)
    told = program("backup", "--prove-free", "-n", "-v", gpt512.path, image)
    assert "is proven: " in told.err + told.out
    snapshot = next(iter(ferrotype.list_snapshots(image)))
    assert sum("proven" in volume for volume in snapshot.disks[0].volumes) == len(proven)


@pytest.mark.unproven
def test_the_command_line_ends_with_4(windows: dict[str, Path], tmp_path: Path) -> None:
    image = _copy(windows["ntfs"], tmp_path)
    free_cluster("ntfs", image, place_of(image, "content"))
    done = program("backup", "--prove-free", image, tmp_path / "a.ferro", code=4)
    assert "content" in done.err
    assert "--all-sectors" in done.err
    assert not list(ferrotype.list_snapshots(tmp_path / "a.ferro"))
