"""Which files stand where on NTFS: ntfscluster of ntfs-3g and The Sleuth Kit are the judges."""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrotype.errors import FormatError, ReadError
from ferrotype.filesystems import ntfs
from ferrotype.filesystems.ntfs_batches import fix_up
from ferrotype.filesystems.ntfs_mft import Content, Geometry
from ferrotype.filesystems.ntfs_records import Attribute, BootSector, fixed_up
from ferrotype.filesystems.ntfs_table import Table
from ferrotype.filesystems.remains import Ranges, Remains
from ferrotype.units import GiB, KiB, MiB
from tests.filesystems.claimed import check_claims
from tests.filesystems.test_ntfs import Editor, aged, make
from tests.filesystems.torn import Range, Torn, garbled, some_ranges
from tests.filesystems.torn import at as names_at
from tests.machine import corpus, mounted, need, run, unpack

SYSTEM = tuple(
    "$MFT $MFTMirr $LogFile $Volume $AttrDef . $Bitmap $Boot $BadClus $Secure $UpCase $Extend".split()  # noqa: SIM905
)
TWICE = {"second name": "deep/er/first name"}  # a hard link stands under either of its names
__all__ = ["aged"]  # the fixture
OWN = {f"<{name}>" for name in SYSTEM if name != "."} | {"<root folder>"}
CORPUS = [
    pytest.param(e, id=e["id"])
    for e in corpus()
    if "ntfs" in e["holds"] and all(file["size"] < 64 * MiB for file in e["files"])
]


# ---------------------------------------------------------------------- a volume and its judges


@dataclass(frozen=True)
class Made:
    """A volume, and what can be said of it without ferrotype."""

    image: Path
    data: bytes
    unit: int  # bytes of a cluster
    records: list[int]  # where record n of $MFT stands
    paths: dict[int, str]  # record -> path
    bases: dict[int, int]  # record in use -> the record that has its name
    known: dict[Range, set[str]] = field(default_factory=dict)

    def name(self, number: int) -> str:
        if number < len(SYSTEM):
            return "<root folder>" if number == 5 else f"<{SYSTEM[number]}>"
        path = self.paths[number]
        return f"<{path}>" if path.startswith("$Extend/") else TWICE.get(path, path)

    def content(self, start: int, end: int) -> set[str]:
        """What has clusters in a range, told by ntfscluster."""
        clusters = start // self.unit, min(-(-end // self.unit), len(self.data) // self.unit) - 1
        if clusters not in self.known:
            told = run("ntfscluster", "-f", "-q", "-c", "{}-{}".format(*clusters), self.image, ok=(0, 1))
            self.known[clusters] = {
                self.name(int(number)) + (f":{stream}" if kind == "DATA" and stream and int(number) > 11 else "")
                for number, kind, stream in re.findall(
                    r"^Inode (\d+) .*/\$([A-Z_]+)(?:\((.*)\))?$", told, re.MULTILINE
                )
            }
        return self.known[clusters]

    def lost_records(self, *ranges: Range) -> list[int]:
        """Records in use that have a byte in a range."""
        size = 1 * KiB
        return [
            number
            for number in self.bases
            for where in [[self.records[2 * number], self.records[2 * number + 1]]]
            if any(place < end and start < place + size // 2 for place in where for start, end in ranges)
        ]

    def expected(self, *ranges: Range) -> set[str]:
        named = {self.bases[number] for number in self.lost_records(*ranges)}
        found = {self.name(number) for number in named if number in self.paths or number < len(SYSTEM)}
        return found.union(*(self.content(start, end) for start, end in ranges))


def judged(image: Path, unit: int) -> Made:
    data = image.read_bytes()
    told = run("istat", "-f", "ntfs", image, "0")  # ntfscluster leaves out some of a fragmented $MFT
    mft = re.search(r"^Type: \$DATA .*\n([\d\s]+)", told, re.MULTILINE)
    assert mft
    halves = [int(lcn) * unit + at for lcn in mft[1].split() for at in range(0, unit, 512)]
    listed = run("fls", "-rp", "-u", "-f", "ntfs", image)
    paths: dict[int, str] = {}
    for number, kind, path in re.findall(r"^(?:r/r|d/d) (\d+)-(\d+)-\d+:\t(.*)$", listed, re.MULTILINE):
        stream = kind == "128" and ":" in path.rpartition("/")[2]
        paths.setdefault(int(number), path.rpartition(":")[0] if stream or (kind == "144" and ":" in path) else path)
    bases = {}
    for number in range(len(halves) // 2):
        raw = b"".join(data[half : half + 512] for half in halves[2 * number : 2 * number + 2])
        if raw[:4] == b"FILE" and raw[22] & 1:
            base = int.from_bytes(raw[32:38], "little")
            bases[number] = base if raw[32:40] != bytes(8) else number
    return Made(image, data, unit, halves, paths, bases)


def fill(root: Path) -> None:
    """Files and folders until it is full, half of them gone again, and files in the holes."""
    rng = random.Random(5)
    (root / "folder ☃ 🐈").mkdir()
    (root / "deep" / "er" / "still").mkdir(parents=True)
    (root / "pieces").write_bytes(bytes(2048))
    (root / "streams").write_bytes(b"main" * 2000)
    os.setxattr(root / "streams", "user.other", rng.randbytes(9000))
    os.setxattr(root / "streams", "user.small", b"resident")
    os.setxattr(root / "deep", "user.of a folder", rng.randbytes(5000))
    (root / "deep" / "er" / "first name").write_bytes(rng.randbytes(3000))
    os.link(root / "deep" / "er" / "first name", root / "second name")
    (root / "tiny").write_bytes(b"in its record")
    with (root / "sparse").open("wb") as sparse:
        for i in range(20):
            sparse.seek(i * 300_000)
            sparse.write(rng.randbytes(5000))
    count = 0
    for i in range(800):
        folder = root / ("folder ☃ 🐈" if i % 4 else f"deep/er/still/{i % 5}")
        folder.mkdir(exist_ok=True)
        (folder / f"{i:05}").write_bytes(rng.randbytes(rng.choice([100, 900, 2500])))
    with contextlib.suppress(OSError):
        while True:
            (root / f"filler {count:03}").write_bytes(bytes(16 * KiB))
            count += 1
    with contextlib.suppress(OSError), (root / "rest").open("wb", 0) as rest:
        while True:
            rest.write(bytes(512))
    files = sorted(path for path in root.rglob("*") if re.fullmatch(r"\d{5}", path.name))
    with contextlib.suppress(OSError), (root / "pieces").open("ab", 0) as pieces:
        for path in files[::2]:
            path.unlink()
            pieces.write(bytes(1024))
    for i in range(0, count, 3):
        (root / f"filler {i:03}").unlink()
    (root / "rest").unlink()
    for i in range(300):
        (root / f"filler {i} is empty").touch()


@pytest.fixture(scope="module", params=[512, 4096])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    need("ntfscluster", "fls")
    path = make(tmp_path_factory.mktemp("ntfs") / "v.img", 8 * MiB, cluster=request.param)
    with mounted(path, "ntfs", path.parent / "mount") as root:
        fill(root)
    return judged(path, request.param)


@pytest.fixture(scope="module")
def worn(aged: Path) -> Made:
    """$MFT and a file in hundreds of runs, so that other records describe them."""
    return judged(aged, 512)


def at(volume: ntfs.Ntfs, *ranges: Range) -> set[str]:
    return {TWICE.get(name, name) for name in names_at(volume, *ranges)}


def opened(data: bytes | bytearray, lost: list[Range] | None = None) -> ntfs.Ntfs:
    return ntfs.open(Torn(data, lost))


# ---------------------------------------------------------------------- the same as the judges say


def test_random_ranges_hit_what_ntfscluster_says(made: Made) -> None:
    volume, rng = opened(made.data), random.Random(1)
    assert len(made.paths) > 400
    for _ in range(40):
        ranges = some_ranges(rng, len(made.data) - 512, 256 * KiB)
        assert at(volume, *ranges) == made.expected(*ranges), ranges
    everything = at(volume, (0, len(made.data)))
    assert everything == made.expected((0, len(made.data))) | {"<$Boot>"}
    assert {"streams", "streams:other", "deep:of a folder", "folder ☃ 🐈", "sparse", "<$MFT>"} <= everything


def test_one_byte_more_or_less(made: Made) -> None:
    volume = opened(made.data)
    told = run("ntfscluster", "-f", "-F", "/sparse", made.image)
    runs = re.findall(r"^\s+\d+\s+(\d+)\s+(\d+)", told.split("0x80")[1], re.MULTILINE)
    assert len(runs) > 5
    for first, length in runs[:12]:
        start, end = int(first) * made.unit, (int(first) + int(length)) * made.unit
        assert at(volume, (start, start + 1)) == at(volume, (end - 1, end)) == {"sparse"}
        for outside in (start - 1, end):
            assert at(volume, (outside, outside + 1)) == made.expected((outside, outside + 1))
    assert at(volume) == set()
    assert at(volume, (len(made.data) - 1, len(made.data))) == {"<$Boot>"}  # the backup


# ---------------------------------------------------------------------- damage


def record_ranges(made: Made, *numbers: int) -> list[Range]:
    halves = [half for number in numbers for half in made.records[2 * number : 2 * number + 2]]
    return [(half, half + 512) for half in sorted(halves)]


def numbers(made: Made, pattern: str) -> list[int]:
    return sorted(number for number, path in made.paths.items() if re.fullmatch(pattern, path))


@pytest.mark.parametrize("how", ["torn", "noise"])
def test_folders_name_the_files_of_lost_records(made: Made, how: str) -> None:
    wanted = [*numbers(made, r"folder ☃ 🐈/\d+")[5:60], *numbers(made, r"(tiny|deep/er/still/\d)")]
    lost = record_ranges(made, *wanted)
    data = made.data if how == "torn" else garbled(random.Random(2), made.data, lost, how)
    volume = opened(data, lost if how == "torn" else [])
    assert at(volume, *lost) == {made.name(number) for number in wanted} | {"<$MFT>"}


def test_a_lost_folder_still_is_part_of_paths(made: Made) -> None:
    lost = record_ranges(made, *numbers(made, "deep"))
    hit = record_ranges(made, *numbers(made, "deep/er/first name|second name|deep/er/still/1"))
    found = at(opened(made.data, lost), *sorted(lost + hit))
    assert found == {"<$MFT>", "deep", "deep/er/first name", "deep/er/still/1"}


def test_lost_extension_records_hit_the_files_they_belong_to(worn: Made) -> None:
    volume, rng = opened(worn.data), random.Random(6)
    extensions = [number for number, base in worn.bases.items() if base not in (number, 0)]
    assert extensions
    for number in extensions:
        lost = record_ranges(worn, number)
        wanted = {"<$MFT>", worn.name(worn.bases[number])}
        assert at(volume, *lost) == wanted
        assert at(opened(worn.data, lost), *lost) == wanted
    for _ in range(20):
        ranges = some_ranges(rng, len(worn.data) - 512, 64 * KiB)
        assert at(volume, *ranges) == worn.expected(*ranges), ranges


def test_a_lost_record_that_nobody_names_stands_by_its_number(made: Made) -> None:
    folder = numbers(made, "deep/er")[0]
    child = numbers(made, "deep/er/first name|second name")[0]
    lost = record_ranges(made, folder, child)
    found = at(opened(made.data, lost), *lost)
    assert found == {"<$MFT>", "deep/er", "deep/er/first name"}  # known by its other name, from the root folder
    other = numbers(made, r"deep/er/still/0/\d+")[0]
    lost = record_ranges(made, other, numbers(made, "deep/er/still/0")[0])
    index = made.content(0, len(made.data)) & {"deep/er/still/0"}
    assert at(opened(made.data, lost), *lost) == {"<$MFT>", "deep/er/still/0", f"<record {other}>"}
    assert index  # its names are in clusters of their own, which nothing leads to any more


@pytest.mark.parametrize("how", ["torn", "zeros", "noise", "bytes"])
def test_damaged_volumes_name_what_can_still_be_named(made: Made, how: str) -> None:
    rng, named, torn = random.Random(how), 0, how == "torn"
    known = {made.name(n) for n in made.paths} | OWN
    by_path = {made.name(number): number for number in made.paths}
    for _ in range(10):
        ranges = some_ranges(rng, len(made.data), 128 * KiB)
        data = made.data if torn else garbled(rng, made.data, ranges, how)
        try:
            volume = opened(data, ranges if torn else [])
        except (FormatError, ReadError):
            continue
        found = at(volume, *ranges)
        if torn:
            strange = {name.rpartition(":")[0] or name for name in found - known} - known
            assert not [name for name in strange if not name.startswith("<record ")]
        gone = set(made.lost_records(*ranges))
        bases = {made.bases[number] for number in gone} | gone
        for path in set().union(*(made.content(start, end) for start, end in ranges)) & set(by_path):
            way = [path[:i] for i, c in enumerate(path) if c == "/"] + [path]
            if not bases & {by_path[step] for step in way}:
                assert path in found
                named += 1
    assert named > 20


def test_mutated_records_end_in_names(made: Made) -> None:
    """Records of $MFT with bytes changed where it hurts, fix-ups kept right: circles, loops, huge lengths."""
    rng = random.Random(11)
    few = numbers(made, r"deep.*|streams|pieces|sparse|folder[^/]*")
    for _ in range(12):
        editor = Editor(made.image)
        for number in rng.sample(few, 12):
            with _record(made, editor.data, number) as raw:
                for _ in range(rng.randint(1, 6)):
                    raw[rng.randrange(16, 400)] = rng.choice(
                        [0, 1, 5, 64, 65, 0x11, 0x22, 0x31, 0xFF, rng.randrange(256)]
                    )
        volume = opened(editor.data)
        assert "<$MFT>" in at(volume, (0, len(editor.data)))
        at(volume, *record_ranges(made, *few))


def test_folders_that_are_in_each_other(made: Made) -> None:
    deep, deeper = numbers(made, "deep")[0], numbers(made, "deep/er")[0]
    editor = Editor(made.image)
    sequence = made.data[made.records[2 * deeper] + 16 : made.records[2 * deeper] + 18]
    with _record(made, editor.data, deep) as raw:
        name = editor.attribute(raw, 0x30) + 24
        raw[name : name + 8] = deeper.to_bytes(6, "little") + sequence
    found = at(opened(editor.data), *record_ranges(made, deep))
    assert len(found) == 2
    assert [name for name in found if name.startswith("<record ") and name.endswith("/deep")]


def test_half_characters_are_told_as_numbers(made: Made) -> None:
    number = numbers(made, "tiny")[0]
    editor = Editor(made.image)
    with _record(made, editor.data, number) as raw:
        name = editor.attribute(raw, 0x30) + 24 + 66
        raw[name : name + 8] = "\udc00\x1bn\u202e".encode("utf-16-le", "surrogatepass")
    assert at(opened(editor.data), *record_ranges(made, number)) == {"<$MFT>", "\\udc00\\x1bn\\u202e"}


@contextlib.contextmanager
def _record(made: Made, data: bytearray, number: int) -> Iterator[bytearray]:
    """One record, its fix-ups undone before and renewed after."""
    halves = made.records[2 * number : 2 * number + 2]
    before = b"".join(data[half : half + 512] for half in halves)
    table = int.from_bytes(before[4:6], "little")
    raw = bytearray(fixed_up(before, b"FILE", "a record"))
    yield raw
    raw[: table + 6] = before[: table + 6]
    for i, half in enumerate(halves):
        raw[table + 2 + 2 * i : table + 4 + 2 * i] = raw[512 * i + 510 : 512 * i + 512]
        raw[512 * i + 510 : 512 * i + 512] = raw[table : table + 2]
        data[half : half + 512] = raw[512 * i : 512 * i + 512]


def test_a_master_file_table_that_runs_over_the_same_clusters_is_cut() -> None:
    boot = bytearray(512)
    boot[3:11] = b"NTFS    "
    boot[11:14], boot[64], boot[68] = b"\0\2\x08", 0xF6, 1
    boot[40:48] = (GiB // 512).to_bytes(8, "little")
    geometry = Geometry.of(BootSector.unpack(boot), GiB)
    source = Torn(bytes(MiB))
    content = Content(source, 4096, Attribute(0x80, "", 0, 0, b"", None, b""))
    content.vcns = [i * 200_000 for i in range(1001)]
    content.lcns, content.valid = [0] * 1000, 1 << 62
    table = Table(Remains(source, Ranges(*np.zeros((2, 0), np.int64))), geometry, content)
    assert table.count * 1024 <= GiB


def test_batches_undo_fixups_as_single_records_do(made: Made) -> None:
    rows = [b"".join(made.data[half : half + 512] for half in made.records[2 * n : 2 * n + 2]) for n in range(64)]
    rows[3], rows[9] = rows[3][:700] + b"??" + rows[3][702:], rows[9][:1022] + b"??"
    batch = np.frombuffer(bytearray(b"".join(rows)), np.uint8).reshape(64, 1024)
    sound = fix_up(batch, b"FILE")
    for n, row in enumerate(rows):
        try:
            assert (bytes(batch[n]), bool(sound[n])) == (fixed_up(row, b"FILE", "it"), True)
        except FormatError:
            assert not sound[n]
    assert not sound[9]


@pytest.mark.parametrize("entry", CORPUS)
def test_volumes_of_others(entry: dict[str, Any], tmp_path: Path) -> None:
    data = unpack(entry, tmp_path).read_bytes()
    rng = random.Random(3)
    for _ in range(3):
        lost = some_ranges(rng, len(data), MiB)
        try:
            volume = opened(data, lost)
        except (FormatError, ReadError):
            continue
        at(volume, *lost)
        at(volume, (0, len(data)))


def test_claims_are_what_ntfscluster_says_is_in_use(made: Made) -> None:
    """Found without $Bitmap: every cluster that belongs to an inode."""
    clusters = len(made.data) // made.unit
    sample = random.Random(7).sample(range(clusters), 80)
    used = [c for c in sample if made.content(c * made.unit, (c + 1) * made.unit)]
    volume = ntfs.open(Torn(made.data))
    files = check_claims(volume, len(made.data), (cluster * made.unit for cluster in used))
    assert files >= len(set(made.bases.values()))


def test_a_record_that_is_lost_is_not_passed_over(made: Made) -> None:
    number = next(n for n, path in made.paths.items() if path == "pieces")
    for at, octets in ((0, b"BAAD"), (4, b"\xff\xff"), (20, b"\x08\x00")):
        image = bytearray(made.data)
        start = made.records[2 * number]
        image[start + at : start + at + len(octets)] = octets
        with pytest.raises(FormatError, match="record"):
            list(ntfs.open(Torn(image)).claims())
