"""Which files stand where on FAT12, FAT16 and FAT32: The Sleuth Kit and mtools are the judges."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrotype.errors import FormatError, ReadError
from ferrotype.extents import State
from ferrotype.filesystems import fat
from ferrotype.units import KiB, MiB
from tests.filesystems.claimed import check_claims
from tests.filesystems.test_fat import make
from tests.filesystems.torn import Range, Torn, at, garbled, some_ranges
from tests.machine import corpus, run, unpack

LONG = "a rather long name with ünïcödé ☃ and.many.dots.txt"
FATS = {"vfat", "fat", "fat12", "fat16"}


def small(entry: dict[str, Any]) -> bool:
    return all(file["size"] < 64 * MiB for file in entry["files"])


CORPUS = [pytest.param(e, id=e["id"]) for e in corpus() if FATS & set(e["holds"]) and small(e)]


@dataclass(frozen=True)
class Made:
    """A volume, and what the judges say of it."""

    data: bytes
    sectors: dict[str, list[int]]  # path -> the bytes at which sectors of it begin
    tables: Range
    sector: int

    @property
    def used(self) -> int:
        """Behind it there is little but free space."""
        return min(self.tables[1] + MiB, len(self.data))

    def expected(self, *ranges: Range) -> set[str]:
        return {
            path
            for path, starts in self.sectors.items()
            if any(start < end and low < start + self.sector for start in starts for low, end in ranges)
        }


def grow(image: Path, folder: Path) -> None:
    """Folders in folders, long and short names, fragments, deleted files and names that were used before."""
    rng = random.Random(image.name)
    tree = folder / "tree"
    names = [f"sub{i % 3}/deep{i % 2}/File Number {i}.bin" for i in range(36)] + ["sub1/SHORT.TXT", f"sub0/{LONG}"]
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(rng.randbytes(rng.choice([1, 900, 9000, 22_000])))
    run("mcopy", "-s", "-Q", "-i", image, *sorted(tree.iterdir()), "::/", env={"LC_ALL": "C.UTF-8"})
    run("mdel", "-i", image, *(f"::/{name}" for name in names[:36:2]))
    for name in ("big one", "sub2/another big one"):
        (tree / name).write_bytes(rng.randbytes(100_000))
        run("mcopy", "-i", image, tree / name, f"::/{name}")
    (tree / "empty").touch()
    run("mcopy", "-i", image, tree / "empty", "::/empty")


def judged(image: Path) -> Made:
    """Where everything stands, told by fls and istat."""
    told = run("fsstat", "-f", "fat", image)
    sector, per_cluster = (
        int(number) for number in re.findall(r"^(?:Sector|Cluster) Size: (\d+)", told, re.MULTILINE)
    )
    per_cluster //= sector
    areas = re.findall(r"(Reserved|FAT \d|Root Directory|Cluster Area): (\d+) - (\d+)", told)
    data = int(areas[-1][1])
    sectors: dict[str, list[int]] = {"<fat>": []}
    for name, low, high in areas:
        kind = {"R": "<boot sector>", "F": "<fat>"}.get(name[0], "")
        kind = "<root folder>" if name == "Root Directory" and int(high) < data else kind
        if name != "Cluster Area" and kind and not (name == "Root Directory" and int(high) >= data):
            sectors[kind] = sectors.get(kind, []) + list(range(int(low), int(high) + 1))
    fats = [(low, high) for name, low, high in areas if name.startswith("FAT")]
    listed = re.findall(r"^[rd]/[rd] (\d+):\t(.*)$", run("fls", "-rp", "-u", "-f", "fat", image), re.MULTILINE)
    for inode, path in listed:
        lines = run("istat", "-f", "fat", image, inode).split("Sectors:\n")[1]
        first = {(int(word) - data) // per_cluster * per_cluster + data for word in lines.split() if int(word)}
        sectors[path] = [start + i for start in sorted(first) for i in range(per_cluster)]
    return Made(
        image.read_bytes(),
        {path: [s * sector for s in starts] for path, starts in sectors.items()},
        (int(fats[0][0]) * sector, (int(fats[-1][1]) + 1) * sector),
        sector,
    )


VARIANTS = {
    "12": (3 * MiB, ("-F12", "-s2")),
    "12-4k": (6 * MiB, ("-F12", "-S4096", "-s1")),
    "16-three-fats": (5 * MiB, ("-F16", "-s1", "-f3")),
    "32": (36 * MiB, ("-F32", "-s1")),
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    size, options = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("fat")
    image = make(folder / f"{request.param}.img", size, *options)
    grow(image, folder)
    return judged(image)


def test_random_ranges_hit_what_sleuthkit_says(made: Made) -> None:
    volume, rng = fat.open(Torn(made.data)), random.Random(1)
    assert len(made.sectors) > 25
    assert "sub0/deep0" in made.sectors
    for _ in range(120):
        ranges = some_ranges(rng, made.used, 64 * KiB)
        found = at(volume, *ranges)
        wanted = made.expected(*ranges)
        assert found - {"<root folder>"} == wanted - {"<root folder>"}, ranges
        if "<root folder>" in made.sectors:
            assert found == wanted, ranges
    everything = at(volume, (0, len(made.data)))
    assert everything == {path for path, starts in made.sectors.items() if starts} | {"<root folder>"}
    assert f"sub0/{LONG}" in everything
    assert "sub1/SHORT.TXT" in everything


def test_one_byte_more_or_less(made: Made) -> None:
    volume = fat.open(Torn(made.data))
    runs = sorted(made.sectors["sub2/another big one"])
    first, end = runs[0], runs[-1] + made.sector
    assert "sub2/another big one" in at(volume, (first, first + 1))
    assert "sub2/another big one" in at(volume, (end - 1, end))
    assert "sub2/another big one" not in at(volume, (first - 1, first))
    assert "sub2/another big one" not in at(volume, (end + 64 * KiB, end + 64 * KiB + 1))
    assert at(volume) == set()


def test_a_lost_table_is_replaced_by_its_copy(made: Made) -> None:
    start, end = made.tables
    size = (end - start) // fat.Fat(Torn(made.data))._layout.fats
    whole = fat.open(Torn(made.data))
    torn = fat.open(Torn(made.data, [(start, start + size)]))
    for path, starts in made.sectors.items():
        if starts and not path.startswith("<"):
            assert at(torn, (starts[-1], starts[-1] + 1)) == at(whole, (starts[-1], starts[-1] + 1)) == {path}


def test_without_any_table_files_are_known_by_their_beginnings(made: Made) -> None:
    start, end = made.tables
    lost = start + 8, end  # what a volume needs to be opened at all
    volume = fat.Fat(Torn(made.data))
    volume._source = Torn(made.data, [lost])
    roots = [path for path in made.sectors if "/" not in path and path[0] != "<" and made.sectors[path]]
    if volume._root_cluster == 0:
        for path in roots:
            assert at(volume, (made.sectors[path][0], made.sectors[path][0] + 1)) == {path}


def test_files_of_a_lost_folder_stand_by_their_clusters(made: Made) -> None:
    lost = [(start, start + made.sector) for start in sorted(made.sectors["sub2"])]
    volume = fat.open(Torn(made.data, lost))
    place = made.sectors["sub2/another big one"][0]
    found = at(volume, (place, place + 1))
    assert len(found) == 1
    assert re.fullmatch(r"<cluster \d+>", found.pop())
    assert at(volume, *lost) == {"sub2"}


@pytest.mark.parametrize("how", ["torn", "zeros", "noise", "bytes"])
def test_damaged_volumes_name_what_can_still_be_named(made: Made, how: str) -> None:
    rng, known = random.Random(how), set(made.sectors) | {"<root folder>", "<boot sector>", "<fat>"}
    named = 0
    for _ in range(24):
        head = made.tables[rng.random() < 0.8] + 64  # mostly behind the tables
        ranges = [r for r in some_ranges(rng, made.used, 32 * KiB) if r[0] >= head]
        if not ranges:
            continue
        torn = how == "torn"
        source = Torn(made.data, ranges) if torn else Torn(garbled(rng, made.data, ranges, how))
        try:
            volume = fat.open(source)
        except (FormatError, ReadError):
            continue
        found, hit = at(volume, *ranges), made.expected(*ranges)
        if torn:
            assert not [name for name in found - known if not re.match(r"<cluster \d+>", name)]
        if "<fat>" in hit or "<root folder>" in hit or (hit & {"sub0", "sub1", "sub2"} and not torn):
            continue
        for path in hit:
            above = {path[:i] for i, c in enumerate(path) if c == "/"}
            if not above & hit:
                assert path in found
                named += 1
    assert named > 10


def test_circles_and_folders_inside_themselves_come_to_an_end(made: Made) -> None:
    volume = fat.Fat(Torn(made.data))
    bits, layout, rng = volume._layout.bits, volume._layout, random.Random(7)
    for _ in range(15):
        data = bytearray(made.data)
        for _ in range(rng.randint(1, 40)):  # entries of the table that lead anywhere
            cluster = rng.randrange(2, 1200)
            where, value = cluster * bits // 8, rng.choice([cluster, rng.randrange(2, layout.clusters + 2)])
            for table in range(layout.fats):
                place = layout.fat_start + table * layout.fat_size + where
                data[place : place + bits // 8] = value.to_bytes(4, "little")[: bits // 8]
        for path in ("sub0", "sub1", "sub2"):  # a file of it becomes a folder, or the folder itself
            place = rng.choice(made.sectors[path]) + 32 * rng.randrange(made.sector // 32)
            data[place + 11] = 0x10
            data[place + 26] = rng.randrange(2, 40)
        try:
            damaged = fat.open(Torn(data))
        except FormatError:
            continue
        assert at(damaged, (0, len(data)))


@pytest.mark.parametrize("entry", CORPUS)
def test_volumes_of_others(entry: dict[str, Any], tmp_path: Path) -> None:
    data = unpack(entry, tmp_path).read_bytes()
    rng = random.Random(3)
    for _ in range(3):
        lost = some_ranges(rng, len(data), MiB) if len(data) > 16 else []
        try:
            volume = fat.open(Torn(data, lost))
        except (FormatError, ReadError):
            continue
        at(volume, *lost)
        at(volume, (0, len(data)))


def test_claims_are_what_sleuthkit_says_is_in_use(made: Made) -> None:
    """Found by following folders: every sector of every file, and the tables."""
    volume = fat.open(Torn(made.data))
    files = check_claims(
        volume,
        len(made.data),
        (at for starts in made.sectors.values() for at in starts),
        more=volume.facts.block_size,
    )
    assert files == len([path for path in made.sectors if not path.startswith("<")])


@pytest.mark.parametrize("entry", [0, 1, 2])
def test_chains_that_break_off_are_not_passed_over(made: Made, entry: int) -> None:
    """A free cluster in the middle of a file is claimed; a chain that ends too early, or nowhere, is damage."""
    whole = fat.open(Torn(made.data))
    layout = whole._layout  # where an entry stands is the specification's business, not under test
    cluster = (made.sectors["big one"][len(made.sectors["big one"]) // 2] - layout.data_start) // layout.cluster + 2
    value = {0: 0, 1: (1 << layout.bits if layout.bits < 32 else 1 << 28) - 1, 2: layout.clusters + 2}[entry]
    image = bytearray(made.data)
    for table in range(layout.fats):
        at = layout.fat_start + table * layout.fat_size
        bit = cluster * layout.bits
        word = int.from_bytes(image[at + bit // 8 : at + bit // 8 + 5], "little")
        mask = (1 << layout.bits) - 1
        word = word & ~(mask << bit % 8) | value << bit % 8
        image[at + bit // 8 : at + bit // 8 + 5] = word.to_bytes(5, "little")
    volume = fat.open(Torn(image))
    found = np.zeros(len(image), bool)
    with pytest.raises(FormatError, match="big one"):
        for claims in volume.claims():
            for start, end in zip(claims.starts.tolist(), claims.ends.tolist(), strict=True):
                found[start:end] = True
    if entry == 0:
        starts, ends = volume.allocation().runs(State.FREE)
        assert any(found[a:b].any() for a, b in zip(starts.tolist(), ends.tolist(), strict=True))
