"""ext2, ext3 and ext4 against dumpe2fs, partclone, and images that other software made."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import struct
import subprocess
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrotype.block import Source
from ferrotype.block.file import FileSource
from ferrotype.block.memory import MemoryDisk
from ferrotype.block.views import Slice
from ferrotype.errors import FormatError, InvalidImage, UnsupportedError
from ferrotype.extents import ExtentMap, State
from ferrotype.filesystems import ext
from ferrotype.filesystems.ext_checksums import CRC32C, LARGE, crc, row
from ferrotype.filesystems.ext_records import Superblock
from tests.machine import corpus, loop, mounted, need, run, unpack

Runs = list[tuple[int, int]]

# ---------------------------------------------------------------------- oracles


def joined(runs: Runs) -> Runs:
    out: Runs = []
    for start, end in sorted(runs):
        if out and out[-1][1] >= start:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        elif start < end:
            out.append((start, end))
    return out


def by_dumpe2fs(image: Path) -> Runs:
    """Free runs in bytes.  With bigalloc dumpe2fs names a cluster by its first block."""
    text = run("dumpe2fs", image)

    def number(name: str) -> int | None:
        found = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
        return int(found[1]) if found else None

    block, count = number("Block size"), number("Block count")
    assert block is not None
    assert count is not None
    ratio = (number("Cluster size") or block) // block
    runs = []
    for line in re.findall(r"^  Free blocks: (.*)$", text, re.MULTILINE):
        for item in filter(None, line.strip().split(", ")):
            first, _, last = item.partition("-")
            runs.append((int(first) * block, min(int(last or first) + ratio, count) * block))
    return joined(runs)


def by_partclone(image: Path, into: Path) -> Runs | None:
    """Free runs in bytes inside what partclone looks at, None where it cannot read the file system."""
    need("partclone.extfs")
    log = into / "domain.log"
    log.unlink(missing_ok=True)
    done = subprocess.run(
        ["partclone.extfs", "-D", "-d0", "-L", into / "log", "-s", image, "-o", log], capture_output=True, check=False
    )
    if done.returncode:
        return None
    rows = re.findall(r"^(0x[0-9A-F]+)\s+(0x[0-9A-F]+)\s+\?$", log.read_text(), re.MULTILINE)
    return joined([(int(at, 16), int(at, 16) + int(length, 16)) for at, length in rows])


def free(m: ExtentMap) -> Runs:
    starts, ends = m.runs(State.FREE)
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def opened(image: Path) -> tuple[ext.Ext, ExtentMap]:
    with FileSource(image) as source:
        assert ext.probe(source)
        fs = ext.open(source)
        m = fs.allocation()
        assert (m.start, m.end) == (0, source.size)
        assert free(fs.swap_files()) == []
        return fs, m


# ---------------------------------------------------------------------- making file systems


def mke2fs(image: Path, size: str, *options: str) -> Path:
    run("truncate", "-s", size, image)
    run("mke2fs", "-q", "-F", *options, image)
    return image


def age(root: Path, seed: int, scale: int = 1) -> None:
    """Files of all lengths, every third deleted, and longer ones written into the gaps."""
    rng = random.Random(seed)
    content = rng.randbytes((1 << 18) // scale)
    for i in range(90):
        (root / f"d{i % 7}").mkdir(exist_ok=True)
        (root / f"d{i % 7}" / f"f{i}").write_bytes(content[: rng.choice((10, 3000, 40_000, 200_000)) // scale])
    for i in range(0, 90, 3):
        (root / f"d{i % 7}" / f"f{i}").unlink()
    for i in range(5):
        (root / f"late{i}").write_bytes(content * rng.randrange(1, 4))


def fill(image: Path, tmp: Path, kind: str = "ext4", scale: int = 1) -> None:
    with loop(image) as device, mounted(device, kind, tmp / "mnt") as root:
        age(root, image.stat().st_size, scale)


FOUR = ("-t", "ext4")
MATRIX: dict[str, tuple[str, ...]] = {
    "ext2": ("60M", "-t", "ext2"),
    "ext2-1k-128": ("33333K", "-t", "ext2", "-b", "1024", "-I", "128"),
    "ext2-rev0": ("40M", "-t", "ext2", "-r", "0", "-b", "1024"),
    "ext2-all-super": ("50M", "-t", "ext2", "-b", "1024", "-O", "^sparse_super,^resize_inode"),
    "ext3": ("90M", "-t", "ext3", "-b", "4096"),
    "ext3-2k": ("77777K", "-t", "ext3", "-b", "2048"),
    "ext4": ("80M", *FOUR),
    "ext4-4k": ("140M", *FOUR, "-b", "4096", "-I", "1024"),
    "short-groups": ("70M", *FOUR, "-b", "4096", "-g", "1032"),
    "flex-2": ("60M", *FOUR, "-b", "1024", "-G", "2", "-I", "512"),
    "flex-all": ("60M", *FOUR, "-b", "1024", "-G", "64"),
    "no-flex": ("60M", *FOUR, "-b", "1024", "-O", "^flex_bg"),
    "uninit-bg": ("60M", *FOUR, "-b", "1024", "-O", "^metadata_csum,uninit_bg"),
    "uninit-bg-32": ("90M", *FOUR, "-b", "1024", "-g", "1024", "-O", "^metadata_csum,^64bit,^flex_bg,uninit_bg"),
    "csum-32": ("60M", *FOUR, "-b", "1024", "-O", "^64bit"),
    "csum-seed": ("60M", *FOUR, "-b", "1024", "-O", "metadata_csum_seed"),
    "no-csum": ("60M", *FOUR, "-b", "1024", "-O", "^metadata_csum"),
    "meta-bg": ("90M", *FOUR, "-b", "1024", "-g", "256", "-O", "meta_bg,^resize_inode"),
    "meta-bg-no-flex": ("90M", *FOUR, "-b", "1024", "-g", "1024", "-O", "meta_bg,^resize_inode,^flex_bg,^64bit"),
    "super2": ("70M", *FOUR, "-b", "1024", "-O", "sparse_super2"),
    "super2-packed": ("70M", *FOUR, "-O", "sparse_super2,^resize_inode", "-E", "packed_meta_blocks=1"),
    "super2-none": ("70M", *FOUR, "-b", "1024", "-O", "sparse_super2", "-E", "num_backup_sb=0"),
    "bigalloc": ("150M", *FOUR, "-b", "4096", "-O", "bigalloc"),
    "bigalloc-1k": ("99999K", *FOUR, "-b", "1024", "-C", "8192", "-O", "bigalloc"),
    "bigalloc-1k-groups": ("90M", *FOUR, "-b", "1024", "-C", "2048", "-g", "1024", "-O", "bigalloc,^flex_bg"),
    "modern": (
        "80M", *FOUR, "-b", "1024", "-O",
        "encrypt,orphan_file,stable_inodes,fast_commit,ea_inode,large_dir,verity,mmp",
    ),
    "inline": ("60M", *FOUR, "-O", "inline_data"),
    "no-journal": ("60M", *FOUR, "-O", "^has_journal,huge_file"),
    "tiny": ("1M", *FOUR, "-O", "^has_journal"),
    "short-last-group": ("8500K", *FOUR, "-b", "1024"),
}  # fmt: skip
PARTCLONE = ("ext2", "ext2-rev0", "ext3", "ext4", "uninit-bg", "meta-bg", "super2", "bigalloc", "csum-seed")


@pytest.mark.parametrize("name", MATRIX)
def test_every_option_agrees_with_dumpe2fs_and_partclone(name: str, tmp_path: Path) -> None:
    size, *options = MATRIX[name]
    image = mke2fs(tmp_path / "image", size, "-L", f"label {name}"[:16], *options)
    assert free(opened(image)[1]) == by_dumpe2fs(image)  # fresh
    if name != "tiny":
        fill(image, tmp_path)
    assert run("e2fsck", "-fn", image)
    fs, m = opened(image)
    assert fs.facts.unclean is None
    assert free(m) == by_dumpe2fs(image)
    assert m.total(State.FREE) > 0
    told = dict(line.split("=", 1) for line in run("blkid", "-p", "-o", "export", image).splitlines())
    assert (fs.facts.kind, fs.facts.uuid, fs.facts.label) == (told["TYPE"], told["UUID"], f"label {name}"[:16])
    if name in PARTCLONE:
        runs = by_partclone(image, tmp_path)
        assert runs is None or runs == [(a, min(b, fs.facts.size)) for a, b in free(m)]
        assert runs is not None or name in ("bigalloc", "csum-seed", "super2"), "partclone reads it"


@pytest.mark.parametrize("block", [1024, 4096, 8192, 16384, 32768, 65536])
@pytest.mark.parametrize("features", ["casefold,quota,project", "^metadata_csum,uninit_bg", "bigalloc"])
def test_what_not_every_kernel_mounts(block: int, features: str, tmp_path: Path) -> None:
    """Blocks larger than pages, and features that kernels are built without, filled by mke2fs and debugfs."""
    tree = tmp_path / "tree"
    tree.mkdir()
    age(tree, block)
    groups = () if features == "bigalloc" else ("-g", "1024")
    features = features.replace("", "")
    image = mke2fs(tmp_path / "image", "180M", *FOUR, "-b", str(block), *groups, "-O", features, "-d", str(tree))
    run("debugfs", "-w", "-R", "rm /late2", image)
    fs, m = opened(image)
    assert fs.facts.unclean is None
    assert free(m) == by_dumpe2fs(image)
    assert fs.facts.block_size == block * (16 if features == "bigalloc" else 1)
    assert m.total(State.FREE) > 0


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ("8G", ()),
        ("33G", ("-O", "^metadata_csum,uninit_bg,^resize_inode")),
        ("64G", ("-O", "bigalloc,^has_journal")),
        ("64G", ("-O", "meta_bg,^resize_inode", "-G", "128")),
        (
            "6T",
            ("-b", "1024", "-O", "bigalloc,^has_journal", "-C", "256K", "-N", "200000"),
        ),  # block numbers above 2^32
    ],
)
def test_large_sparse_file_systems(size: str, options: tuple[str, ...], tmp_path: Path) -> None:
    image = mke2fs(tmp_path / "image", size, *FOUR, *options)
    fs, m = opened(image)
    assert free(m) == by_dumpe2fs(image)
    assert fs.facts.size == fs.facts.block_size * (fs.facts.size // fs.facts.block_size)


def test_what_lies_behind_the_file_system_is_data(tmp_path: Path) -> None:
    image = mke2fs(tmp_path / "image", "20M", *FOUR)
    before = opened(image)[1]
    run("truncate", "-s", "30M", image)
    fs, m = opened(image)
    assert fs.facts.size == 20 << 20
    assert free(m) == free(before)
    assert free(m)[-1][1] == 20 << 20


def test_a_grown_and_a_shrunk_file_system(tmp_path: Path) -> None:
    image = mke2fs(tmp_path / "image", "20M", *FOUR, "-b", "1024")
    fill(image, tmp_path)
    for size in ("90M", "150M", "61M"):
        if size != "61M":
            run("truncate", "-s", size, image)
        run("e2fsck", "-fy", image, ok=(0, 1))
        run("resize2fs", image, size)
        assert free(opened(image)[1]) == by_dumpe2fs(image)


# ---------------------------------------------------------------------- unclean, damaged, foreign


@pytest.mark.parametrize(("kind", "why"), [("ext2", "not cleanly unmounted"), ("ext4", "journal has to be replayed")])
def test_a_copy_of_a_mounted_file_system_is_unclean(kind: str, why: str, tmp_path: Path) -> None:
    image, copy = mke2fs(tmp_path / "image", "40M", "-t", kind), tmp_path / "copy"
    with loop(image) as device, mounted(device, kind, tmp_path / "mnt") as root:
        age(root, 1)
        run("sync", "-f", root)
        shutil.copyfile(device, copy)
    assert why in (opened(copy)[0].facts.unclean or "")
    assert opened(image)[0].facts.unclean is None


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [("state", "0", "unmounted"), ("state", "3", "errors"), ("last_orphan", "12", "deleted files")],
)
def test_the_superblock_says_why_it_is_unclean(field: str, value: str, why: str, tmp_path: Path) -> None:
    image = mke2fs(tmp_path / "image", "10M", *FOUR)
    run("debugfs", "-w", "-R", f"set_super_value {field} {value}", image)
    assert why in (opened(image)[0].facts.unclean or "")


def test_a_volume_cut_short_is_unclean(tmp_path: Path) -> None:
    image = mke2fs(tmp_path / "image", "40M", *FOUR)
    run("truncate", "-s", "30M", image)
    assert "larger than its volume" in (opened(image)[0].facts.unclean or "")


def test_an_external_journal_is_refused(tmp_path: Path) -> None:
    image = mke2fs(tmp_path / "image", "4M", "-O", "journal_dev", "-b", "1024")
    with FileSource(image) as source, pytest.raises(UnsupportedError, match="jbd"):
        ext.open(source)


@pytest.mark.parametrize(("at", "bit"), [(0x60, 0x1), (0x60, 0x20), (0x60, 0x40000), (0x64, 0x80000)])
def test_unknown_features_are_refused(at: int, bit: int, tmp_path: Path) -> None:
    data = bytearray(mke2fs(tmp_path / "image", "1M", "-t", "ext2").read_bytes())
    value = struct.unpack_from("<I", data, 1024 + at)[0] | bit
    struct.pack_into("<I", data, 1024 + at, value)
    with pytest.raises(UnsupportedError, match=f"{bit:#x}" if bit != 1 else "e2compr"):
        ext.open(MemoryDisk(data))


def test_probe_declines_what_is_not_ext() -> None:
    assert not ext.probe(MemoryDisk(b""))
    assert not ext.probe(MemoryDisk(1 << 16))
    assert not ext.probe(MemoryDisk(random.Random(1).randbytes(1 << 16)))
    with pytest.raises(InvalidImage):
        ext.open(MemoryDisk(1 << 16))
    with pytest.raises(InvalidImage):
        ext.open(MemoryDisk(100))


def crc32c(data: bytes) -> int:
    """Bit by bit, to be independent of the tables under test."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state


def test_row_checksums_of_even_and_odd_length() -> None:
    rng = random.Random(5)
    for length in (0, 1, 9, 64, 255):
        rows = np.frombuffer(rng.randbytes(7 * length), np.uint8).reshape(7, length)
        assert crc(CRC32C, LARGE, rows).tolist() == [crc32c(one.tobytes()) for one in rows]
    assert crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283  # the published check value


def structures(data: bytes | bytearray, desc_size: int) -> tuple[range, range, list[range]]:
    """Bytes of the superblock, of the descriptors, and of the written bitmaps of a file system of 1 KiB blocks."""
    groups = -(-(struct.unpack_from("<I", data, 1028)[0] - 1) // struct.unpack_from("<I", data, 1056)[0])
    bitmaps = []
    for group in range(groups):
        at = 2048 + group * desc_size
        place, flags = struct.unpack_from("<I", data, at)[0], struct.unpack_from("<H", data, at + 0x12)[0]
        if not flags & 2:
            size = struct.unpack_from("<I", data, 1056)[0] // 8
            bitmaps.append(range(place * 1024, place * 1024 + size))
    return range(1024, 2048), range(2048, 2048 + groups * desc_size), bitmaps


@pytest.mark.parametrize(
    ("options", "desc_size", "covers"),
    [
        (("-O", "metadata_csum,64bit"), 64, "superblock descriptors bitmaps"),
        (("-O", "metadata_csum,^64bit,^flex_bg"), 32, "superblock descriptors bitmaps"),
        (("-O", "^metadata_csum,uninit_bg,^64bit"), 32, "descriptors"),
    ],
)
def test_no_flipped_byte_frees_anything(
    options: tuple[str, ...], desc_size: int, covers: str, tmp_path: Path
) -> None:
    image = mke2fs(tmp_path / "image", "5M", *FOUR, "-b", "1024", "-g", "512", "-N", "240", *options)
    fill(image, tmp_path, scale=40)
    disk = MemoryDisk(image.read_bytes())
    truth = ext.open(disk).allocation()
    used = truth.translate({State.FREE: State.DATA, State.DATA: State.ZERO})
    assert free(truth)
    superblock, descriptors, bitmaps = structures(disk.data, desc_size)
    rng = random.Random(7)
    caught = tried = 0
    for name, places in (
        ("superblock", list(superblock)),
        ("descriptors", list(descriptors)),
        ("bitmaps", [at for bitmap in bitmaps for at in bitmap]),
    ):
        for at in rng.sample(places, min(len(places), 300)):
            flip = rng.randrange(1, 256)
            disk.data[at] ^= flip
            tried += 1
            try:
                fs = ext.open(disk)
                m = fs.allocation()
            except FormatError:
                caught += 1
            else:
                assert name not in covers, f"{name}: byte {at} flipped by {flip:#x} passes"
                wrong = fs.facts.unclean is None and any(used.clip(a, b - a).total(State.ZERO) for a, b in free(m))
                # without a bitmap checksum a byte can change and keep its number of ones
                assert not wrong or name == "bitmaps", f"{name}: byte {at} flipped by {flip:#x} frees what is in use"
            finally:
                disk.data[at] ^= flip
    assert caught > tried // 3


@pytest.mark.parametrize("options", [("-t", "ext2"), ("-t", "ext3"), (*FOUR, "-O", "^metadata_csum")])
def test_a_flipped_bit_of_a_bitmap_is_always_caught(options: tuple[str, ...], tmp_path: Path) -> None:
    """Even without checksums: the number of free blocks is off by one."""
    image = mke2fs(tmp_path / "image", "3M", *options, "-b", "1024", "-g", "512", "-N", "96")
    disk = MemoryDisk(image.read_bytes())
    data = disk.data
    wide = struct.unpack_from("<I", data, 1024 + 0x60)[0] & 0x80
    blocks = struct.unpack_from("<I", data, 1028)[0]
    for group, bitmap in enumerate(structures(data, 64 if wide else 32)[2]):
        for at in bitmap:
            bit = random.Random(at).randrange(8)
            if 1 + group * 512 + (at - bitmap.start) * 8 + bit >= blocks:
                continue
            data[at] ^= 1 << bit
            with pytest.raises(InvalidImage, match=f"group {group} "):
                ext.open(disk).allocation()
            data[at] ^= 1 << bit


def test_descriptors_that_point_astray(tmp_path: Path) -> None:
    data = bytearray(
        mke2fs(tmp_path / "image", "3M", "-t", "ext2", "-b", "1024", "-g", "512", "-N", "96").read_bytes()
    )
    for at in (0, 4, 8):  # bitmaps and the table of group 1
        place = 2048 + 32 + at
        good = struct.unpack_from("<I", data, place)[0]
        for bad in (0, 1, 2, 3070, 3072, 1 << 31, 0xFFFFFFFF, struct.unpack_from("<I", data, 2048 + at)[0]):
            struct.pack_into("<I", data, place, bad)
            with pytest.raises(InvalidImage):
                ext.open(MemoryDisk(data)).allocation()
        struct.pack_into("<I", data, place, good)
    ext.open(MemoryDisk(data)).allocation()


def bounded(source: Source) -> ExtentMap | None:
    """The map, or None after a clean error; never slow, large, or FREE outside the file system."""
    began = time.monotonic()
    tracemalloc.start()
    try:
        fs = ext.open(source)
        m = fs.allocation()
        assert (m.start, m.end) == (0, source.size)
        assert all(b <= fs.facts.size for _, b in free(m)[-1:])
    except FormatError:
        m = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 400 << 20
    assert time.monotonic() - began < 10
    return m


@pytest.mark.parametrize("options", [("-t", "ext2"), FOUR, (*FOUR, "-O", "bigalloc")])
def test_made_up_superblocks_cost_little(options: tuple[str, ...], tmp_path: Path) -> None:
    """Fields set to hostile values, several at once, under a checksum that holds."""
    intact = mke2fs(tmp_path / "image", "8M", *options, "-N", "128").read_bytes()
    rng = random.Random(11)
    numbers = [(0, 4), (4, 4), *((at, 4) for at in range(0x14, 0x2C, 4)), (0x4C, 4), (0x58, 2), (0x5C, 4), (0x60, 4)]
    numbers += [(0x64, 4), (0xCE, 2), (0xFE, 2), (0x104, 4), (0x150, 4), (0x174, 1), (0x24C, 4), (0x250, 4)]
    for _ in range(120):
        data = bytearray(intact)
        for at, width in rng.sample(numbers, rng.choice((1, 1, 2, 3))):
            top = (1 << 8 * width) - 1
            old = int.from_bytes(data[1024 + at : 1024 + at + width], "little")
            value = rng.choice((0, 1, 7, 8, 64, top, top >> 1, old ^ 1 << rng.randrange(8 * width), old * 2, old + 1))
            data[1024 + at : 1024 + at + width] = (value & top).to_bytes(width, "little")
        state = int(crc(CRC32C, LARGE, row(bytes(data[1024:2044])))[0])
        struct.pack_into("<I", data, 2044, state)
        bounded(MemoryDisk(data))


def test_the_superblock_is_laid_out_as_specified() -> None:
    places = {"s_magic": 0x38, "s_rev_level": 0x4C, "s_uuid": 0x68, "s_reserved_gdt_blocks": 0xCE}
    places |= {"s_last_orphan": 0xE8, "s_desc_size": 0xFE, "s_first_meta_bg": 0x104, "s_blocks_count_hi": 0x150}
    places |= {"s_flags": 0x160, "s_checksum_type": 0x175, "s_backup_bgs_0": 0x24C, "s_checksum_seed": 0x270}
    places |= {"s_checksum": 0x3FC}
    for name, at in places.items():
        marked = bytearray(1024)
        marked[at] = 0xA5
        value = getattr(Superblock.unpack(marked), name)
        assert (value[0] if isinstance(value, bytes) else value) == 0xA5, name


# ---------------------------------------------------------------------- images made by other software


def ext_at(entry: dict[str, Any]) -> list[int]:
    return [
        t["at"]
        for t in entry["truth"]
        if t["claim"] == "blkid" and isinstance(t["value"], dict) and str(t["value"].get("TYPE")).startswith("ext")
    ]


@contextmanager
def volume(entry: dict[str, Any], into: Path, at: int) -> Iterator[Source]:
    """The file system of a corpus entry; disk images of other formats go through qemu-img."""
    image = unpack(entry, into)
    if entry["format"] != "raw":
        image, disk = into / "disk.raw", image
        run("qemu-img", "convert", "-O", "raw", disk, image)
    with FileSource(image) as source:
        yield Slice(source, at, source.size - at)


def of(name: str) -> dict[str, Any]:
    return next(e for e in READABLE if e["id"] == name)


READABLE = [e for e in corpus() if e["format"] in ("raw", "qcow", "qcow2", "vmdk", "vdi", "vhdx")]
TRUE = [
    (e["id"], at)
    for e in READABLE
    for at in sorted(set(ext_at(e)))
    if any(t["claim"] == "allocation" and t["at"] == at and t["value"].get("exit", 0) == 0 for t in e["truth"])
]


@pytest.mark.parametrize(("name", "at"), TRUE)
def test_corpus_allocation(name: str, at: int, tmp_path: Path) -> None:
    entry = of(name)
    with volume(entry, tmp_path, at) as source:
        fs = ext.open(source)
        m = fs.allocation().clip(0, fs.facts.size)
    claims = [t["value"] for t in entry["truth"] if t["claim"] == "allocation" and t["at"] == at]
    if fs.facts.unclean is not None:
        states = [t["value"] for t in entry["truth"] if t["claim"] == "filesystem" and t["at"] == at]
        assert any(s["state"] != "clean" or "needs_recovery" in s["features"] for s in states)
        return
    for claim in claims:
        if claim.get("exit", 0) != 0:
            continue
        unit = claim.get("unit_bytes") or claim["block_size"]
        starts, ends = (edge // unit for edge in m.runs(State.FREE, present=False))
        lines = "".join(f"{a}+{b - a}\n" for a, b in zip(starts.tolist(), ends.tolist(), strict=True))
        assert hashlib.sha256(lines.encode()).hexdigest() == claim["used_ranges_sha256"]
    told = next(t["value"] for t in entry["truth"] if t["claim"] == "blkid" and t["at"] == at)
    assert (fs.facts.kind, fs.facts.uuid, fs.facts.label) == (told["TYPE"], told.get("UUID"), told.get("LABEL"))


BROKEN = [e["id"] for e in READABLE if e["kind"] == "malformed" and ("ext" in e["holds"] or ext_at(e))]


@pytest.mark.parametrize("name", BROKEN)
def test_corpus_malformed(name: str, tmp_path: Path) -> None:
    with volume(of(name), tmp_path, 0) as source:
        bounded(source)
