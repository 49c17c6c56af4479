"""Which files of exFAT stand in lost ranges: against where their bytes are found, and sleuthkit for the folders."""

from __future__ import annotations

import random
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrotype.block.memory import MemoryDisk
from ferrotype.errors import FormatError
from ferrotype.filesystems import exfat
from ferrotype.units import MiB
from tests.filesystems.claimed import check_claims
from tests.filesystems.test_exfat import ENTRIES, make
from tests.filesystems.test_ext_files import Damaged, Ranges
from tests.filesystems.test_fat import OnFile
from tests.machine import loop, mounted, need, run, unpack

CLUSTER = 2048


def populate(root: Path, rng: random.Random) -> dict[str, bytes]:
    """Folders in folders, files in pieces, deleted ones, long and strange names."""
    content: dict[str, bytes] = {}
    names = [f"d{i % 4}/e{i % 3}/file {i}" for i in range(100)]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        content[name] = rng.randbytes(rng.choice((0, 20, 512, 3000, 9000, 30_000)))
        (root / name).write_bytes(content[name])
    for name in names[::3]:
        (root / name).unlink()
        del content[name]
    for name in ("big", "d1/bigger", "Größe ☃ 🎞", "d2/" + "long " * 40, "d3/\u202econtrol"):
        content[name] = rng.randbytes(rng.choice((100_000, 300_001)))
        (root / name).write_bytes(content[name])
    (root / "full").mkdir()
    for i in range(120):
        name = f"full/a name of more than one entry {i:04}"
        content[name] = rng.randbytes(i * 30)
        (root / name).write_bytes(content[name])
    for i in range(0, 120, 2):
        name = f"full/a name of more than one entry {i:04}"
        (root / name).unlink()
        del content[name]
    content["pieces"] = rng.randbytes(200_000)
    (root / "pieces").write_bytes(content["pieces"])
    return content


@dataclass(frozen=True, eq=False)
class Truth:
    """Which sectors hold what."""

    image: bytes
    sectors: dict[str, dict[int, int]]  # path -> sector -> bytes of it that are content
    folders: set[str]

    def owners(self, ranges: Ranges) -> set[str]:
        """Paths that have a byte in the ranges."""
        touched = {s: (a, b) for a, b in ranges for s in range(a // 512, -(-b // 512))}
        return {
            path
            for path, sectors in self.sectors.items()
            for s in sectors.keys() & touched.keys()
            if any(a < s * 512 + sectors[s] and s * 512 < b for a, b in ranges)
        }


def sectors_of(image: bytes, content: dict[str, bytes]) -> dict[str, dict[int, int]]:
    """Where each file's bytes stand, found by the first bytes of each sector: no two sectors of noise begin alike."""
    place = {image[at : at + 16]: at // 512 for at in range(0, len(image), 512)}
    found: dict[str, dict[int, int]] = {}
    for path, octets in content.items():
        found[path] = {}
        for at in range(0, len(octets), 512):
            piece = octets[at : at + 512]
            sector = place[piece[:16]] if len(piece) >= 16 else place[octets[at - 512 : at - 496]] + 1
            assert image[sector * 512 : sector * 512 + len(piece)] == piece
            found[path][sector] = len(piece)
    return found


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    need("mount.exfat-fuse", "fls", "istat")
    tmp = tmp_path_factory.mktemp("exfat")
    image = make(tmp / "image", 6 * MiB, "-c", str(CLUSTER))
    rng = random.Random(3)
    with loop(image) as device, mounted(device, "exfat", tmp / "mnt") as root:
        content = populate(root, rng)
    data = image.read_bytes()
    sectors = sectors_of(data, content)
    folders = {"<root folder>"}
    for line in run("fls", "-f", "exfat", "-r", "-D", "-p", image).splitlines():
        match = re.match(r"d/d (\d+):\s+([^$].*)", line)
        if match:
            sectors[match[2]] = folder_sectors(image, match[1])
            folders.add(match[2])
    sectors["<root folder>"] = folder_sectors(image, "2")
    return Truth(data, sectors, folders)


def folder_sectors(image: Path, inode: str) -> dict[int, int]:
    text = run("istat", "-f", "exfat", image, inode)
    return {int(n): 512 for n in re.findall(r"\b\d+\b", text.split("Sectors:")[1])}


def ask(fs: exfat.ExFat, ranges: Ranges) -> tuple[str, ...]:
    edges = np.array(ranges, np.int64).reshape(-1, 2)
    return fs.files_at(edges[:, 0].copy(), edges[:, 1].copy())


def fat_of(image: bytes) -> tuple[int, int]:
    """Start and end of the FAT, in bytes."""
    start, length = struct.unpack_from("<II", image, 80)
    return start * 512, (start + length) * 512


def structures(image: bytes, ranges: Ranges) -> set[str]:
    """Those in front of the clusters."""
    places = {"<boot region>": (0, 6144), "<copy of the boot region>": (6144, 12288), "<fat>": fat_of(image)}
    return {name for name, (low, high) in places.items() if any(a < high and low < b for a, b in ranges)}


def some_ranges(rng: random.Random, truth: Truth, most: int, first: int = 0) -> Ranges:
    """Ascending and apart, from ``first`` on, of all lengths; some of them where folders lie."""
    folder = rng.choice(sorted(truth.folders))
    starts = {rng.choice(sorted(truth.sectors[folder])) * 512 + rng.randrange(512)}
    starts |= set(rng.sample(range(first, len(truth.image)), rng.randrange(1, most)))
    out: Ranges = []
    for start in sorted(starts):
        start = max(start, out[-1][1] + 1 if out else 0)
        end = min(start + rng.choice((1, 100, 512, 4096, 20_000)), len(truth.image))
        if start < end:
            out.append((start, end))
    return out


TABLES = {"<allocation bitmap>", "<up-case table>"}


def shown(paths: set[str]) -> set[str]:
    return {path.replace("\u202e", "\\u202e") for path in paths}


def test_random_ranges_agree_with_where_the_bytes_are(truth: Truth) -> None:
    rng = random.Random(1)
    fs = exfat.open(MemoryDisk(truth.image))
    everything = [(0, len(truth.image))]
    with_content = {path for path, sectors in truth.sectors.items() if sectors}
    assert set(ask(fs, everything)) == shown(with_content) | structures(truth.image, everything) | TABLES
    assert any(max(s) - min(s) >= len(s) for path, s in truth.sectors.items() if s and path not in truth.folders)
    assert ask(fs, []) == ()
    first = fat_of(truth.image)[1]  # a lost entry of the FAT is told by another test
    for _ in range(80):
        ranges = some_ranges(rng, truth, 12, first)
        found = ask(fs, ranges)
        assert list(found) == sorted(found)
        assert set(found) - TABLES == shown(truth.owners(ranges)), ranges


def test_what_lies_behind_the_end_of_a_file_is_not_its_content(truth: Truth) -> None:
    fs = exfat.open(MemoryDisk(truth.image))
    asked = 0
    for path, sectors in list(truth.sectors.items())[::3] + [
        (path, truth.sectors[path]) for path in ("d1/bigger", "pieces")
    ]:
        last = max(sectors, default=0)
        if path not in truth.folders and 0 < sectors.get(last, 0) < 512:
            end = last * 512 + sectors[last]
            places = [end - 1, end]
            assert [ask(fs, [(at, at + 1)]) for at in places] == [tuple(shown(truth.owners([(end - 1, end)]))), ()]
            asked += 1
    assert asked > 20


@pytest.mark.parametrize("readable", [True, False])
def test_a_folder_goes_on_behind_what_is_lost_of_it(truth: Truth, readable: bool) -> None:
    """Zeros in a lost range do not mean that no entries follow."""
    fs = exfat.open(disk := Damaged(truth.image))
    first = min(truth.sectors["full"]) * 512
    lost = (first, first + 512)
    name = "full/a name of more than one entry 0117"
    content = min(truth.sectors[name]) * 512
    if readable:
        disk.data[slice(*lost)] = bytes(512)
    else:
        disk.lost = [lost]
    assert ask(fs, sorted([lost, (content, content + 1)])) == ("full", name)


def test_the_tables_are_told(truth: Truth) -> None:
    fs = exfat.open(MemoryDisk(truth.image))
    assert ask(fs, [(5, 6)]) == ("<boot region>",)
    assert ask(fs, [(6144, 6145)]) == ("<copy of the boot region>",)
    heap, root = (struct.unpack_from("<I", truth.image, at)[0] for at in (88, 96))
    root_at = heap * 512 + (root - 2) * CLUSTER
    for at in range(root_at, root_at + CLUSTER, 32):
        kind, (first, length) = truth.image[at], struct.unpack_from("<IQ", truth.image, at + 20)
        if kind in (0x81, 0x82):
            start = heap * 512 + (first - 2) * CLUSTER
            name = {0x81: "<allocation bitmap>", 0x82: "<up-case table>"}[kind]
            assert ask(fs, [(start + length - 1, start + length)]) == (name,)
            assert ask(fs, [(start, start + 1)]) == (name,)


def test_a_lost_fat_costs_the_files_in_pieces(truth: Truth) -> None:
    """Their chains cannot be followed; what lies in one piece needs no FAT."""
    disk = Damaged(truth.image)
    fs = exfat.open(disk)
    disk.lost = [fat_of(truth.image)]
    found = ask(fs, disk.lost)
    apart = {
        path for path, s in truth.sectors.items() if s and max(s) - min(s) >= len(s) and path not in truth.folders
    }
    assert apart
    assert apart <= set(found)
    assert "<fat>" in found
    assert "Größe ☃ 🎞" not in found


@pytest.mark.parametrize("left", ["nothing", "zeros", "noise"])
def test_damaged_volumes_name_what_can_be_named(truth: Truth, left: str) -> None:
    """Ranges that cannot be read, or read as something else: what has a way to it is named, and nothing else is."""
    rng = random.Random(left)
    fs = exfat.open(disk := Damaged(truth.image))
    for _ in range(60):
        ranges = some_ranges(rng, truth, 10, fat_of(truth.image)[1])
        if left == "nothing":
            disk.lost = ranges
        for start, end in ranges:
            disk.data[start:end] = bytes(end - start) if left == "zeros" else rng.randbytes(end - start)
        found, owners = set(ask(fs, ranges)) - TABLES, truth.owners(ranges)
        for start, end in ranges:
            disk.data[start:end] = truth.image[start:end]
        if left == "nothing":  # else the last characters of a name may be others
            assert {path for path in found - shown(owners) if "?" not in path} == set()
        assert shown({path for path in owners if not lost_above(path, owners)}) <= found


def lost_above(path: str, owners: set[str]) -> bool:
    parts = path.split("/")
    above = {"/".join(parts[:n]) for n in range(1, len(parts))}
    return bool(above & owners) or ("<root folder>" in owners and path != "<root folder>")


def test_hostile_folders_and_tables_end(truth: Truth) -> None:
    """Bytes of the FAT and of the folders set to what leads elsewhere, and in circles."""
    rng = random.Random(4)
    everything = [(0, len(truth.image))]
    fs = exfat.open(disk := MemoryDisk(truth.image))
    low, high = fat_of(truth.image)
    sectors = [s * 512 for path in truth.folders for s in truth.sectors[path]]
    for _ in range(60):
        disk.data[:] = truth.image
        for _ in range(rng.choice((3, 300))):
            at = rng.randrange(low, high, 4) if rng.random() < 0.4 else rng.choice(sectors) + rng.randrange(0, 512, 4)
            value = rng.choice((0, 1, 2, 3, rng.randrange(3000), 0xFFFFFFF7, 0xFFFFFFFF, 0x85, 0xC0, 0x3C0, 0x100585))
            struct.pack_into("<I", disk.data, at, value)
        assert "<fat>" in ask(fs, everything)
    disk.data[:] = truth.image
    struct.pack_into(
        f"<{(high - low) // 4}I", disk.data, low, *range(-2 % 2**32, -2 % 2**32 + 2), *range(1, (high - low) // 4 - 1)
    )
    assert "<fat>" in ask(fs, everything)  # every cluster leads to the one before it


@pytest.mark.parametrize("entry", ENTRIES[:6], ids=lambda e: e["id"])
def test_corpus(entry: dict[str, Any], tmp_path: Path) -> None:
    source = OnFile(unpack(entry, tmp_path))
    try:
        fs = exfat.open(source)
    except FormatError:
        return
    assert "<root folder>" in ask(fs, [(0, source.size)])


# ---------------------------------------------------------------------- the second opinion


def test_claims_are_where_the_content_is_found(truth: Truth) -> None:
    """Found without the allocation bitmap."""
    fs = exfat.open(MemoryDisk(truth.image))
    files = check_claims(fs, len(truth.image), (s * 512 for sectors in truth.sectors.values() for s in sectors))
    assert files == len(truth.sectors) - 1  # the root folder has no entry


def test_entries_and_chains_that_are_damaged_are_not_passed_over(truth: Truth) -> None:
    rows = np.frombuffer(truth.image, np.uint8)
    rows = rows[: len(rows) // 32 * 32].reshape(-1, 32)
    streams = np.flatnonzero((rows[:-1, 0] == 0x85) & (rows[1:, 0] == 0xC0)) + 1
    for what, octet, value in (("entries are damaged", 0, 0xC2), ("does not lie on the volume", 28, 0x77)):
        image = bytearray(truth.image)
        image[int(streams[-1]) * 32 + octet] = value
        with pytest.raises(FormatError, match=what):
            list(exfat.open(MemoryDisk(image)).claims())
