"""FAT: maps against fsck.fat, partclone and sleuthkit, on volumes that mtools filled and aged, and made-up ones."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrotype.block import Traits
from ferrotype.block.memory import MemoryDisk
from ferrotype.errors import FormatError, InvalidImage, ReadError, UnsupportedError
from ferrotype.extents import ExtentMap, State
from ferrotype.filesystems import fat
from tests.machine import corpus, need, run, unpack

Runs = list[tuple[int, int]]  # (start, count) in units

# ---------------------------------------------------------------------- oracles, for exFAT too


def used(allocation: ExtentMap, unit: int, end: int) -> Runs:
    """Runs of what is not FREE, in units, up to ``end`` units; every boundary must be on the grid."""
    allocation = allocation.clip(0, min(end * unit, allocation.length))
    starts, ends = allocation.runs(State.FREE, present=False)
    assert not np.any(starts % unit)
    assert not np.any(ends[:-1] % unit)
    return [(a // unit, b // unit - a // unit) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]


def sleuthkit(image: Path, kind: str, end: int, *options: str) -> Runs:
    """The same, as sleuthkit sees it."""
    text = run("blkls", "-el", "-f", kind, *options, image)
    flags = [line.split("|")[1] for line in text.splitlines()[3:]]
    runs: Runs = []
    at = 0
    for flag, group in itertools.groupby(flags[:end]):
        count = len(list(group))
        if flag == "a":
            runs.append((at, count))
        at += count
    return runs


def partclone(image: Path, kind: str, unit: int, end: int, folder: Path) -> Runs:
    """The same, as partclone sees it."""
    log = folder / "domain.log"
    log.unlink(missing_ok=True)
    run(f"partclone.{kind}", "-D", "-d0", "-L", folder / "partclone.log", "-s", image, "-o", log)
    marks = np.zeros(end + 1, bool)  # the last one stays clear and ends the last run
    for line in log.read_text().splitlines():
        if match := re.match(r"(0x[0-9A-Fa-f]+)\s+(0x[0-9A-Fa-f]+)\s+\+", line):
            start, size = (int(group, 16) // unit for group in match.groups())
            marks[start : min(start + size, end)] = True
    edges = np.flatnonzero(np.diff(np.concatenate(([False], marks)).astype(np.int8))).tolist()
    return [(a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=True)]


class OnFile:
    """A file as a Source that reads no more than it is asked for, so that big sparse images stay cheap."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.size = path.stat().st_size
        self.traits = Traits()

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        with self._path.open("rb", buffering=0) as file:
            if os.preadv(file.fileno(), [buf], offset) != len(buf):
                raise ReadError("file", offset, len(buf), "outside the file")

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return ExtentMap.uniform(offset, length)

    def close(self) -> None:
        pass


def digest(runs: Runs) -> str:
    return hashlib.sha256("".join(f"{a}+{b}\n" for a, b in runs).encode()).hexdigest()


def claimed(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [t for t in entry["truth"] if t["claim"] == "allocation" and t["at"] == 0 and not t.get("observed")]


# ---------------------------------------------------------------------- volumes made by mkfs.vfat


def make(image: Path, size: int, *options: str) -> Path:
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(size)
    run("mkfs.vfat", *options, image)
    return image


def age(image: Path, folder: Path, seed: int) -> None:
    """Fill the volume, delete every other file in random order, and fill the gaps with longer ones."""
    need("mcopy", "mdel")
    rng = random.Random(seed)
    tree = folder / "tree"
    tree.mkdir(exist_ok=True)
    free = min(image.stat().st_size, 100 << 20)
    names = [f"f{n}" for n in range(60)]
    for name in names:
        (tree / name).write_bytes(rng.randbytes(rng.randrange(1, max(free // 200, 2))))
    run("mmd", "-i", image, "::/d")
    for batch in (names[:30], names[30:]):
        run("mcopy", "-i", image, *(tree / name for name in batch), "::/d", ok=(0, 1))
    gone = rng.sample(names, 25)
    run("mdel", "-i", image, *(f"::/d/{name}" for name in gone), ok=(0, 1))
    for name in ("big1", "big2"):
        (tree / name).write_bytes(rng.randbytes(free // 40))
    run("mcopy", "-i", image, tree / "big1", tree / "big2", "::/", ok=(0, 1))


VARIANTS = [
    ("12", 2 << 20, ("-F12",)),
    ("12-one-fat", 1440 << 10, ("-F12", "-f1")),
    ("12-4k", 8 << 20, ("-F12", "-S4096", "-s1")),
    ("12-most", 4084 * 512 + (1 + 2 * 12 + 32) * 512, ("-F12", "-s1", "-a", "-r512", "-R1")),
    ("16", 16 << 20, ("-F16",)),
    ("16-2k", 32 << 20, ("-F16", "-S2048", "-s1")),
    ("16-reserved", 24 << 20, ("-F16", "-R77", "-s2", "-a")),
    ("16-32k", 150 << 20, ("-F16", "-s64")),
    ("32", 64 << 20, ("-F32", "-s1")),
    ("32-one-fat", 40 << 20, ("-F32", "-s1", "-f1", "-R9")),
    ("32-1k", 80 << 20, ("-F32", "-S1024", "-s1")),
    ("32-64k", 4300 << 20, ("-F32", "-s128")),
]


@pytest.mark.parametrize(("size", "options"), [v[1:] for v in VARIANTS], ids=[v[0] for v in VARIANTS])
def test_aged_volumes_agree_with_the_tools(tmp_path: Path, size: int, options: tuple[str, ...]) -> None:
    image = make(tmp_path / "fat.img", size, "-n", "SOME LABEL", "-i", "cafe0123", *options)
    age(image, tmp_path, seed=size)
    source = OnFile(image)
    assert fat.probe(source)
    opened = fat.open(source)
    facts, allocation = opened.facts, opened.allocation()
    assert (facts.kind, facts.label, facts.uuid, facts.unclean) == ("vfat", "SOME LABEL", "CAFE-0123", None)
    assert facts.size <= size
    checked = run("fsck.fat", "-n", "-v", image)
    match = re.search(r"(\d+)/(\d+) clusters", checked)
    assert match is not None
    busy, clusters = map(int, match.groups())
    assert f"{facts.block_size} bytes per cluster" in checked
    assert allocation.total(State.FREE) == (clusters - busy) * facts.block_size
    bits = re.search(r"(\d+) bit entries", checked)
    sector = int(next((o[2:] for o in options if o.startswith("-S")), "512"))
    start = re.search(r"Data area starts at byte (\d+)", checked)
    assert bits is not None
    assert start is not None
    end = int(start[1]) // sector + clusters * facts.block_size // sector
    ours = used(allocation, sector, end)
    assert len(ours) > 2
    if bits[1] != "12":  # partclone misreads 12-bit entries
        assert ours == partclone(image, "fat", sector, end, tmp_path)
    # sleuthkit believes the number of clusters only, and prints a line for each sector
    if (bits[1] != "32" or clusters >= 65525) and end < 1 << 20:
        assert ours == sleuthkit(image, f"fat{bits[1]}", end)
    assert allocation.end == size
    behind = allocation.clip(end * sector, size - end * sector)
    assert behind.total(State.FREE) == 0


def test_a_volume_longer_than_the_file_system_is_kept_behind_it(tmp_path: Path) -> None:
    image = make(tmp_path / "fat.img", 2 << 20, "-F12", "-s4", "-a", "-R3")
    whole = fat.open(MemoryDisk(image.read_bytes())).allocation()
    longer = MemoryDisk(image.read_bytes() + bytes(70000))
    starts, ends = fat.open(longer).allocation().runs(State.FREE)
    assert [starts.tolist(), ends.tolist()] == [edges.tolist() for edges in whole.runs(State.FREE)]


# ---------------------------------------------------------------------- single facts, on patched volumes


def small(tmp_path: Path, *options: str, size: int = 16 << 20) -> bytearray:
    return bytearray(make(tmp_path / "fat.img", size, *options).read_bytes())


def fats(data: bytearray) -> tuple[int, int]:
    """Where the first FAT is and how long it is."""
    size = struct.unpack_from("<H", data, 22)[0] or struct.unpack_from("<I", data, 36)[0]
    return struct.unpack_from("<H", data, 14)[0] * 512, size * 512


def test_bad_clusters_are_not_free(tmp_path: Path) -> None:
    for options, width, bad in (("-F16", 2, 0xFFF7), ("-F32", 4, 0x0FFFFFF7)):
        data = small(tmp_path, options, "-s1")
        before = fat.open(MemoryDisk(data)).allocation().total(State.FREE)
        at, size = fats(data)
        for table in (at, at + size):
            data[table + 100 * width : table + 101 * width] = bad.to_bytes(width, "little")
        assert fat.open(MemoryDisk(data)).allocation().total(State.FREE) == before - 512


def test_the_reserved_bits_of_fat32_do_not_make_a_cluster_used(tmp_path: Path) -> None:
    data = small(tmp_path, "-F32", "-s1")
    before = fat.open(MemoryDisk(data)).allocation()
    at, _ = fats(data)
    data[at + 4003] = 0xF0
    assert fat.open(MemoryDisk(data)).allocation() == before


def test_differing_fats_are_damage_unless_mirroring_is_off(tmp_path: Path) -> None:
    data = small(tmp_path, "-F32", "-s1")
    before = fat.open(MemoryDisk(data)).allocation().total(State.FREE)
    at, size = fats(data)
    data[at + size + 4000] = 9
    with pytest.raises(InvalidImage, match="FAT 1 differs from FAT 0"):
        fat.open(MemoryDisk(data)).allocation()
    for active, lost in ((0, 0), (1, 512)):
        struct.pack_into("<H", data, 40, 0x80 | active)
        assert fat.open(MemoryDisk(data)).allocation().total(State.FREE) == before - lost
    struct.pack_into("<H", data, 40, 0x82)
    with pytest.raises(InvalidImage, match="there is no FAT 2"):
        fat.open(MemoryDisk(data))


def test_dirty_and_error_bits_are_reported(tmp_path: Path) -> None:
    for options, state, entry, clean in (("-F16", 0x25, 3, 0xFF), ("-F32", 0x41, 7, 0x0F)):
        data = small(tmp_path, options, "-s1")
        at, _ = fats(data)
        assert fat.open(MemoryDisk(data)).facts.unclean is None
        data[state] = 1
        assert "cleanly" in str(fat.open(MemoryDisk(data)).facts.unclean)
        data[state] = 2
        assert "errors" in str(fat.open(MemoryDisk(data)).facts.unclean)
        data[state] = 0
        high, low = (0x80, 0x40) if clean == 0xFF else (0x08, 0x04)
        data[at + entry] = clean & ~high
        assert "cleanly" in str(fat.open(MemoryDisk(data)).facts.unclean)
        data[at + entry] = clean & ~low
        assert "errors" in str(fat.open(MemoryDisk(data)).facts.unclean)
        fat.open(MemoryDisk(data)).allocation()  # the bits live in the first FAT only


def test_fsinfo_is_not_believed(tmp_path: Path) -> None:
    data = small(tmp_path, "-F32", "-s1")
    before = fat.open(MemoryDisk(data)).allocation()
    struct.pack_into("<II", data, 512 + 488, 1, 2)
    assert fat.open(MemoryDisk(data)).allocation() == before


def test_the_label_is_the_root_directorys(tmp_path: Path) -> None:
    need("mlabel")
    image = make(tmp_path / "fat.img", 2 << 20, "-F12", "-n", "FIRST")
    run("mlabel", "-i", image, "::second")
    assert fat.open(MemoryDisk(image.read_bytes())).facts.label == "SECOND"
    run("mlabel", "-c", "-i", image, "::")
    assert fat.open(MemoryDisk(image.read_bytes())).facts.label is None


def test_a_blank_fat_frees_nothing(tmp_path: Path) -> None:
    data = small(tmp_path, "-F16", "-f1", "-s1")
    at, size = fats(data)
    data[at : at + size] = bytes(size)
    with pytest.raises(InvalidImage, match="media byte"):
        fat.open(MemoryDisk(data))


def test_an_ataris_hard_disk_is_not_mistaken_for_fat12(tmp_path: Path) -> None:
    data = small(tmp_path, "-A", size=2 << 20)
    assert fat.probe(MemoryDisk(data))
    with pytest.raises(UnsupportedError, match="Atari"):
        fat.open(MemoryDisk(data))


def test_other_boot_sectors_are_not_fat(tmp_path: Path) -> None:
    data = small(tmp_path, "-F32", "-s1")
    assert fat.probe(MemoryDisk(data))
    changes: dict[str, tuple[int, bytes]] = {
        "ntfs": (3, b"NTFS    "),
        "exfat": (3, b"EXFAT   "),
        "bitlocker": (3, b"-FVE-FS-"),
        "bitlocker to go": (424, bytes.fromhex("3bd66749292ed84a8399f6a339e3d001")),
        "hpfs": (54, b"HPFS    "),
        "an MBR": (11, bytes(53)),
        "sector size": (11, b"\0\3"),
        "cluster size": (13, b"\3"),
        "no reserved sectors": (14, bytes(2)),
        "no fats": (16, b"\0"),
        "media": (21, b"\xf1"),
        "no sectors": (19, bytes(2)),
    }
    for name, (at, value) in changes.items():
        changed = bytearray(data)
        changed[at : at + len(value)] = value
        assert not fat.probe(MemoryDisk(changed)), name
    assert not fat.probe(MemoryDisk(b""))
    assert not fat.probe(MemoryDisk(data[:511]))


def test_too_many_pieces_are_refused_before_memory_runs_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = small(tmp_path, "-F32", "-s1", "-f1")
    at, size = fats(data)
    data[at + 16 : at + size] = (b"\0\0\0\0\xf7\xff\xff\x0f" * size)[: size - 16]
    assert len(fat.open(MemoryDisk(data)).allocation()) > 30000
    monkeypatch.setattr(fat, "_MOST_RUNS", 10000)
    with pytest.raises(UnsupportedError, match="pieces"):
        fat.open(MemoryDisk(data)).allocation()


def test_flipped_bytes_raise_only_what_is_promised(tmp_path: Path) -> None:
    rng = random.Random(4)
    for options in (("-F12", "-f2"), ("-F32", "-s1")):
        data = small(tmp_path, *options, size=2 << 20)
        at, _ = fats(data)
        places = list(range(11, 91)) + list(range(at, at + 12))
        for _ in range(300):
            changed = bytearray(data)
            for place in rng.sample(places, rng.randrange(1, 4)):
                changed[place] = rng.choice((0, 1, 2, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            try:
                opened = fat.open(MemoryDisk(changed))
                assert opened.allocation().length == len(data)
                assert opened.swap_files() == ExtentMap.uniform(0, len(data))
            except FormatError:
                pass
    for cut in (0, 100, 512, 600, 8192):
        with pytest.raises(InvalidImage):
            fat.open(MemoryDisk(data[:cut]))


# ---------------------------------------------------------------------- images made by other software

ENTRIES = [
    e
    for e in corpus()
    if e["format"] == "raw"
    and (e["decompressed_size"] <= 200 << 20 or claimed(e))  # unpacking takes longer than the tests
    and any(t["value"].get("TYPE") == "vfat" for t in e["truth"])
]

# What is behind the last whole cluster is kept here and called free there.
SLACK_FREED = {"cryptsetup-img-fs-vfat": "sleuthkit frees the sector behind the last cluster"}
BAD_FREED = {"dos-mkfs-fat32-1-bad-block": "partclone frees the bad cluster"}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e["id"])
def test_corpus(entry: dict[str, Any], tmp_path: Path) -> None:
    image = unpack(entry, tmp_path)
    opened = fat.open(OnFile(image))
    allocation = opened.allocation()
    image.unlink()
    stated = next(t["value"] for t in entry["truth"] if t["claim"] == "blkid" and t["at"] == 0)
    label = stated.get("LABEL")
    assert opened.facts.uuid == stated.get("UUID")
    assert opened.facts.label == (label.replace("\\ ", " ") if label else None)
    claims = {t["by"].split()[0]: t["value"] for t in claimed(entry) if "used_ranges_sha256" in t["value"]}
    if not claims or entry["id"] in BAD_FREED:
        return
    claim = claims.get("sleuthkit") or claims["partclone.fat"]
    unit = claim.get("unit_bytes") or claim["block_size"]
    ours = used(allocation, unit, claim.get("units_listed") or claim["total_blocks"])
    if entry["id"] in SLACK_FREED:
        assert ours.pop()[1] * unit < opened.facts.block_size
    assert digest(ours) == claim["used_ranges_sha256"]
