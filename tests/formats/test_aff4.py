"""AFF4: streams of every compression, maps, volumes that need each other, hashes; hostile ones."""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest

from ferrotype.block import read
from ferrotype.block.file import FileSource
from ferrotype.errors import FormatError, InvalidImage, UnsupportedError
from ferrotype.extents import State
from ferrotype.formats import aff4
from ferrotype.formats.aff4 import codecs as aff4_codecs
from ferrotype.formats.aff4.turtle import Term, parse
from ferrotype.formats.registry import recognise
from ferrotype.job import NullJob
from tests.formats.aff4_files import AFF4, PACKERS, Aff4, ImageStream, Map
from tests.formats.judges import KiB, MiB, check_reader, damages_of, opened, random_disk
from tests.machine import corpus, unpack

CONTENT = random_disk(700 * KiB + 1234, seed=11)
STREAM, MAP = "aff4://stream-1", "aff4://map-1"
IMAGES = [entry for entry in corpus() if entry["format"] == "aff4"]


# ---------------------------------------------------------------------- streams


@pytest.mark.parametrize("package", [True, False])
@pytest.mark.parametrize("compression", PACKERS)
def test_a_stream_is_read_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, package: bool
) -> None:
    if package and compression in ("snappy", "lz4"):
        pytest.importorskip("cramjam")
    if not package:
        monkeypatch.setattr(aff4_codecs, "_cramjam", lambda: None)
    digest = hashlib.sha256(CONTENT).hexdigest()
    volume = Aff4([ImageStream(STREAM, CONTENT, compression)], STREAM, size=len(CONTENT), hashes={"sha256": digest})
    path = volume.write(tmp_path / "a.aff4")
    check_reader(path, CONTENT, rounds=40)
    image = opened(path)
    assert image.format == "aff4"
    assert image.facts["compression"] == compression
    assert image.facts["unit"] == 4096
    assert image.hashes == {"sha256": digest}
    assert image.check is not None
    assert image.check(NullJob()) == []
    image.close()


@pytest.mark.parametrize("compression", ["snappy", "lz4"])
def test_chunks_packed_by_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str) -> None:
    cramjam = pytest.importorskip("cramjam")
    packers = {
        "snappy": lambda data: bytes(cramjam.snappy.compress_raw(data)),
        "lz4": lambda data: bytes(cramjam.lz4.compress_block(data, store_size=False)),
    }
    monkeypatch.setitem(PACKERS, compression, packers[compression])
    rng = random.Random(9)
    words = [rng.randbytes(rng.randint(3, 11)) for _ in range(200)]  # short matches, from far and near
    content = CONTENT[: 200 * KiB] + b"".join(rng.choices(words, k=30_000))
    path = Aff4([ImageStream(STREAM, content, compression, 32 * KiB)], STREAM).write(tmp_path / "a.aff4")
    check_reader(path, content, rounds=10)
    monkeypatch.setattr(aff4_codecs, "_cramjam", lambda: None)
    check_reader(path, content, rounds=10)


@pytest.mark.parametrize("compression", ["zlib", "snappy", "lz4"])
@pytest.mark.parametrize("package", [True, False])
def test_damaged_chunks(monkeypatch: pytest.MonkeyPatch, compression: str, package: bool) -> None:
    if not package:
        monkeypatch.setattr(aff4_codecs, "_cramjam", lambda: None)
    unpack_chunk = dict(aff4_codecs.CODECS.values())[compression]
    assert unpack_chunk is not None
    rng = random.Random(3)
    plain = b"abcdefgh" * 40 + bytes(900) + rng.randbytes(300) + b"x" * 40
    packed = PACKERS[compression](plain)
    assert unpack_chunk(packed, len(plain)) == plain
    for _ in range(300):
        broken = bytearray(packed[: rng.choice([len(packed), rng.randrange(len(packed))])]) or bytearray(1)
        broken[rng.randrange(len(broken))] = rng.randrange(256)
        with contextlib.suppress(InvalidImage):
            assert len(unpack_chunk(bytes(broken), len(plain))) <= len(plain)


def test_names_relative_to_the_volume(tmp_path: Path) -> None:
    volume = Aff4([], relative=True)
    inside = f"{volume.urn}/disk.dd"
    volume.parts, volume.image = [ImageStream(inside, CONTENT)], inside
    check_reader(volume.write(tmp_path / "a.aff4"), CONTENT, rounds=10)


def test_small_members_may_be_deflated(tmp_path: Path) -> None:
    volume = Aff4([ImageStream(STREAM, CONTENT)], STREAM, deflated=(".index", ".md5"))
    path = volume.write(tmp_path / "a.aff4")
    check_reader(path, CONTENT, rounds=10)
    volume.deflated = ("/00000003",)
    image = opened(volume.write(path))
    with pytest.raises(UnsupportedError, match="deflated by zip"):
        read(image.source, 0, len(CONTENT))
    image.close()


def _wide(built: bytes) -> bytes:
    """The same zip file with every number of the directory in zip64 fields."""
    end = built.rindex(b"PK\5\6")
    count, size, at = struct.unpack_from("<HII", built, end + 10)
    start, directory = at, bytearray()
    for _ in range(count):
        sizes, lengths, place = (
            struct.unpack_from("<II", built, at + 20),
            built[at + 28 : at + 34],
            built[at + 42 : at + 46],
        )
        name, extra, comment = struct.unpack("<HHH", lengths)
        wide = b"\x99\x99\2\0ab" + struct.pack("<HHQQQ", 1, 24, sizes[1], sizes[0], int.from_bytes(place, "little"))
        directory += (
            built[at : at + 20] + b"\xff" * 8 + struct.pack("<HHH", name, len(wide), 0) + built[at + 34 : at + 42]
        )
        directory += b"\xff" * 4 + built[at + 46 : at + 46 + name] + wide
        at += 46 + name + extra + comment
    assert at == start + size
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + len(directory), 1)
    tail = b"PK\5\6" + b"\0" * 4 + b"\xff" * 12 + b"\0\0"
    return built[:start] + bytes(directory) + record + locator + tail


def test_zip64_and_what_stands_before_it(tmp_path: Path) -> None:
    path = Aff4([ImageStream(STREAM, CONTENT)], STREAM).write(tmp_path / "a.aff4")
    built = path.read_bytes()
    path.write_bytes(_wide(built))
    with zipfile.ZipFile(path) as archive:  # so the other reader sees it too
        assert archive.testzip() is None
    check_reader(path, CONTENT, rounds=10)
    path.write_bytes(b"PK\3\4 something else" + built)
    check_reader(path, CONTENT, rounds=10)


# ---------------------------------------------------------------------- maps


def _arranged(seed: int, gap: str = "") -> tuple[Map, bytes]:
    """A map of CONTENT, symbolic streams and gaps in shuffled order, and what it shows."""
    rng = random.Random(seed)
    targets = [STREAM, *(AFF4 + name for name in ("Zero", "UnknownData", "UnreadableData", "SymbolicStream5a"))]
    tiles = [b"", b"\0", b"UNKNOWN", b"UNREADABLEDATA", b"\x5a"]
    patterns = [((tile * (MiB // len(tile) + 1))[:MiB] if tile else CONTENT) for tile in tiles]
    hole = (b"UNKNOWN" * (MiB // 7 + 1))[:MiB] if gap else bytes(MiB)
    disk, entries = bytearray(), []
    while len(disk) < 2 * MiB:
        length = rng.choice([1, 512, 1000, 32 * KiB, 200 * KiB])
        target = rng.randrange(6)
        start = len(disk)
        if target == 5:
            disk += (hole * 3)[start : start + length]
            continue
        place = rng.randrange(len(CONTENT) - length) if target == 0 else rng.choice([start, rng.randrange(1 << 40)])
        whole = patterns[target] * (1 if target == 0 else 3)
        at = place if target == 0 else place % MiB
        disk += whole[at : at + length]
        entries.append((start, length, place, target))
    rng.shuffle(entries)
    return Map(MAP, targets, entries, len(disk), gap), bytes(disk)


@pytest.mark.parametrize(("seed", "gap"), [(0, ""), (1, ""), (2, AFF4 + "UnknownData")])
def test_a_map_is_read_anywhere(tmp_path: Path, seed: int, gap: str) -> None:
    arranged, disk = _arranged(seed, gap)
    path = Aff4([ImageStream(STREAM, CONTENT, "snappy"), arranged], MAP, size=len(disk)).write(tmp_path / "a.aff4")
    check_reader(path, disk, rounds=60, seed=seed)
    assert damages_of(path) == []
    image = opened(path)
    assert image.facts["subformat"] == "map"
    assert image.source.extents(0, len(disk)).total(State.ZERO) > 0
    image.close()


def test_a_map_of_a_map(tmp_path: Path) -> None:
    inner = Map("aff4://inner", [STREAM], [(0, 5000, 100, 0)])
    outer = Map(MAP, ["aff4://inner"], [(10, 4000, 500, 0)], 5000)
    path = Aff4([ImageStream(STREAM, CONTENT), inner, outer], MAP).write(tmp_path / "a.aff4")
    check_reader(path, bytes(10) + CONTENT[600:4600] + bytes(990), rounds=10)


def test_a_huge_empty_map(tmp_path: Path) -> None:
    size = 64 << 40
    arranged = Map(MAP, [STREAM], [(size - 512, 512, 0, 0)], size)
    image = opened(Aff4([ImageStream(STREAM, CONTENT), arranged], MAP, size=size).write(tmp_path / "a.aff4"))
    assert image.source.size == size
    assert image.source.extents(0, size).total(State.ZERO) == size - 512
    assert read(image.source, size - 1024, 1024) == bytes(512) + CONTENT[:512]
    image.close()


def test_further_images_are_further_disks(tmp_path: Path) -> None:
    second = "<aff4://image-2> a aff4:Image ; aff4:dataStream <aff4://stream-2> ."
    streams: list[ImageStream | Map] = [ImageStream(STREAM, CONTENT), ImageStream("aff4://stream-2", b"other" * 1000)]
    image = opened(Aff4(streams, STREAM, turtle=second).write(tmp_path / "a.aff4"))
    assert list(image.disks) == ["aff4://image-2"]
    other = image.disk("aff4://image-2")
    assert read(other, 0, other.size) == b"other" * 1000
    image.close()


# ---------------------------------------------------------------------- several volumes


def _striped(folder: Path, *, swapped: bool = False) -> tuple[Path, bytes]:
    """An image whose stripes are in two volumes by turns, each with the whole map.

    Its hash is over those of the maps, which are in the order of their names, or ``swapped``.
    """
    halves = [b"", b""]
    entries = []
    for number, at in enumerate(range(0, len(CONTENT), 10_000)):
        piece = CONTENT[at : at + 10_000]
        entries.append((at, len(piece), len(halves[number % 2]), number % 2))
        halves[number % 2] += piece
    targets = ["aff4://half-0", "aff4://half-1"]
    volumes, parts = [], []
    for number, half in enumerate(halves):
        arranged = Map(f"aff4://map-{number}", targets, entries, len(CONTENT), hashes=False)
        stream = ImageStream(targets[number], half, hashes=())
        volumes.append(Aff4([stream, arranged], f"aff4://map-{number}", urn=f"aff4://volume-{number}"))
        part = volumes[-1].members()[f"aff4://map-{number}/{('map', 'idx')[number]}"]
        parts.append(hashlib.sha512(part).digest())
    tops = [hashlib.sha512(digest).digest() for digest in parts]
    root = hashlib.sha512(b"".join(reversed(tops) if swapped else tops)).hexdigest()
    for number, volume in enumerate(volumes):
        name = ("mapPointHash", "mapIdxHash")[number]
        volume.turtle = f"""
            <aff4://image> aff4:dataStream <aff4://map-{1 - number}> .
            <aff4://image> aff4:hash "{root}"^^aff4:blockMapHashSHA512 .
            <aff4://map-{number}> aff4:{name} "{parts[number].hex()}"^^aff4:SHA512 .
            <aff4://map-{number}> aff4:blockMapHash "{tops[number].hex()}"^^aff4:SHA512 ."""
        volume.write(folder / f"disk_{number}.aff4")
    return folder / "disk_0.aff4", CONTENT


def test_the_hash_of_a_striped_image_is_over_those_of_its_maps(tmp_path: Path) -> None:
    """As of the reference images; that of one map alone is another."""
    path, _ = _striped(tmp_path)
    assert damages_of(path) == []
    assert damages_of(tmp_path / "disk_1.aff4") == []
    path, _ = _striped(tmp_path, swapped=True)
    found = damages_of(path)
    assert len(found) == 1
    assert "sha512 over the maps" in found[0]


def test_a_striped_image(tmp_path: Path) -> None:
    path, disk = _striped(tmp_path)
    (tmp_path / "broken.aff4").write_bytes(b"PK\x03\x04" + bytes(100))
    Aff4([ImageStream("aff4://x", b"x" * 9999)], "aff4://x", urn="aff4://o").write(tmp_path / "another.aff4")
    check_reader(path, disk, rounds=20)
    check_reader(tmp_path / "disk_1.aff4", disk, rounds=20)
    assert damages_of(path) == []
    image = opened(path)
    assert image.facts["volumes"] == 2
    image.close()
    (tmp_path / "disk_1.aff4").rename(tmp_path / "disk_1.zip")
    with pytest.raises(InvalidImage, match="neither in this volume nor in one beside it"):
        opened(path)


def test_a_volume_elsewhere_is_not_looked_for(tmp_path: Path) -> None:
    path, _ = _striped(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "disk_1.aff4").rename(tmp_path / "sub" / "disk_1.aff4")
    with pytest.raises(InvalidImage, match="beside it"):
        opened(path)


# ---------------------------------------------------------------------- hashes


@pytest.mark.parametrize("entry", IMAGES, ids=lambda entry: entry["id"])
def test_images_of_evimetry(tmp_path: Path, entry: dict[str, Any]) -> None:
    path = unpack(entry, tmp_path)
    image = opened(path)
    assert image.source.size == entry["virtual_disk"]["size"]
    digest = hashlib.sha256()
    for at in range(0, image.source.size, MiB):
        digest.update(read(image.source, at, MiB))
    assert digest.hexdigest() == entry["virtual_disk"]["sha256"]
    assert image.check is not None
    assert image.check(NullJob()) == []
    image.close()


def test_damage_is_found(tmp_path: Path) -> None:
    stream, arranged = ImageStream(STREAM, CONTENT, "stored"), Map(MAP, [STREAM], [(0, 9999, 5, 0)])
    volume = Aff4([stream, arranged], MAP)
    path = tmp_path / "a.aff4"
    members = volume.members()
    assert damages_of(volume.write(path, members=members)) == []
    for name, words in [
        (f"{STREAM}/00000001", ["md5 of chunk 16", "sha1 of chunk 16", "md5 of the stream", "sha1 of the stream"]),
        (f"{STREAM}/00000002.blockHash.md5", ["md5 of chunk 32"]),
    ]:
        broken = dict(members)
        broken[name] = b"\xff\xee\xdd" + broken[name][3:]
        volume.parts = []
        volume.turtle = "\n".join(part.turtle(members) for part in (stream, arranged))
        damages = damages_of(volume.write(path, members=broken))
        assert all(any(word in damage for damage in damages) for word in words), damages
    broken = dict(members)
    broken[f"{MAP}/map"] = struct.pack("<QQQI", 0, 9999, 6, 0)
    damages = damages_of(volume.write(path, members=broken))
    assert [damage.split()[1] for damage in damages] == ["mapPointHash", "mapHash"]


def test_the_hash_of_the_disk_is_checked(tmp_path: Path) -> None:
    volume = Aff4([ImageStream(STREAM, CONTENT)], STREAM, hashes={"md5": "00" * 16})
    assert ["the md5 of the disk" in damage for damage in damages_of(volume.write(tmp_path / "a.aff4"))] == [True]


# ---------------------------------------------------------------------- what is refused


def test_an_ordinary_zip_file_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "information.turtle")
    file = FileSource(path)
    assert not aff4.probe(file)
    assert recognise(file) == "zip"
    file.close()
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    file = FileSource(path)
    assert recognise(file) == "zip"
    file.close()


@pytest.mark.parametrize(
    ("types", "turtle", "version", "what"),
    [
        ("aff4:EncryptedStream", "", "major=1", "encrypted"),
        ("aff4:FileImage , aff4:Image", "", "major=1", "AFF4-L"),
        ("aff4:Image", "<aff4://k> a aff4:KeyBag .", "major=1", "encrypted"),
        ("<http://afflib.org/2009/aff4#Image>", "", "", "before the standard"),
        ("aff4:CaseNotes", "", "", "no disk image"),
        ("aff4:Image", "", "major=2", "version 2"),
        ("aff4:Image", "<aff4://s> a [] .", "", "blank nodes"),
        ("aff4:Image", "@base <aff4://x> .", "", "base"),
    ],
)
def test_other_volumes_are_refused(tmp_path: Path, types: str, turtle: str, version: str, what: str) -> None:
    volume = Aff4([], STREAM, types=types, turtle=turtle, version=version)
    with pytest.raises(UnsupportedError, match=what):
        opened(volume.write(tmp_path / "a.aff4"))


def survives(path: Path) -> None:
    """It is refused, or read: never anything else."""
    try:
        image = opened(path, "aff4")
    except FormatError:
        return
    try:
        size = image.source.size
        image.source.extents(0, size)
        for at in range(0, min(size, 2 * MiB), MiB):
            read(image.source, at, min(MiB, size - at))
        if image.check is not None and size <= 4 * MiB:
            image.check(NullJob())
    except FormatError:
        pass
    finally:
        image.close()


NUMBERS = [
    "0",
    "1",
    "-1",
    "511",
    "4095",
    "1048577",
    str(1 << 31),
    str(1 << 62),
    str(1 << 63),
    "9" * 40,
    "x",
    "1.5",
    "١",
]


@pytest.mark.parametrize("what", ["size", "chunkSize", "chunksInSegment", "map size", "image size"])
def test_no_number_does_harm(tmp_path: Path, what: str) -> None:
    stream, arranged = ImageStream(STREAM, CONTENT[:90_000]), Map(MAP, [STREAM], [(0, 80_000, 0, 0)], 80_000)
    volume = Aff4([stream, arranged], MAP, size=80_000)
    whole = volume.description(volume.members())
    old = {
        "size": 'aff4:size "90000"^^xsd:long',
        "chunkSize": "aff4:chunkSize 4096",
        "chunksInSegment": 'aff4:chunksInSegment "16"',
        "map size": 'aff4:size "80000"^^xsd:long ; aff4:mapPointHash',
        "image size": 'aff4:size "80000"^^xsd:long  .',
    }[what]
    assert whole.count(old) == 1
    path = tmp_path / "a.aff4"
    for number in NUMBERS:
        new = f'{old.split()[0]} "{number}"' + {".": " .", "h": " ; aff4:mapPointHash"}.get(old[-1], "")
        made = Aff4([stream, arranged], MAP, size=80_000)
        _write_raw(made, path, whole.replace(old, new))
        survives(path)


def _write_raw(volume: Aff4, path: Path, turtle: str, members: dict[str, bytes] | None = None) -> None:
    made = volume.members() if members is None else members
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("container.description", volume.urn)
        for urn, content in made.items():
            archive.writestr(urn.replace("aff4://", "aff4%3A%2F%2F"), content)
        archive.writestr("information.turtle", turtle)


def _entries(**changed: int) -> bytes:
    point = {"offset": 0, "length": 100, "place": 0, "target": 0} | changed
    return struct.pack("<QQQI", *point.values())


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (_entries(target=1), "not listed"),
        (_entries(target=(1 << 32) - 1), "not listed"),
        (_entries(place=90_000 - 99), "end of its target"),
        (_entries(place=(1 << 64) - 1), "end of its target"),
        (_entries(length=(1 << 64) - 1), "outside the image"),
        (_entries(offset=(1 << 64) - 1), "outside the image"),
        (_entries(offset=950), "outside the image"),
        (_entries() + _entries(offset=99), "overlap"),
        (_entries()[:-1], "part of an entry"),
    ],
)
def test_maps_that_are_refused(tmp_path: Path, content: bytes, what: str) -> None:
    volume = Aff4([ImageStream(STREAM, CONTENT[:90_000]), Map(MAP, [STREAM], [], 1000)], MAP)
    members = volume.members() | {f"{MAP}/map": content}
    with pytest.raises(InvalidImage, match=what):
        opened(volume.write(tmp_path / "a.aff4", members=members))


def test_maps_without_an_end_are_refused(tmp_path: Path) -> None:
    one = Map("aff4://one", ["aff4://two"], [(0, 10, 0, 0)], 10)
    two = Map("aff4://two", ["aff4://one"], [(0, 10, 0, 0)], 10)
    with pytest.raises(InvalidImage, match="without an end"):
        opened(Aff4([one, two], "aff4://one").write(tmp_path / "a.aff4"))


@pytest.mark.parametrize("column", ["offset", "length"])
def test_no_index_does_harm(tmp_path: Path, column: str) -> None:
    volume = Aff4([ImageStream(STREAM, CONTENT[:90_000])], STREAM)
    path = tmp_path / "a.aff4"
    members = volume.members()
    index = members[f"{STREAM}/00000000.index"]
    for value in (0, 1, 4095, 4096, 4097, 1 << 20, (1 << 32) - 1, (1 << 64) - 1):
        place, code = (0, "<Q") if column == "offset" else (8, "<I")
        value &= (1 << 64 if code == "<Q" else 1 << 32) - 1
        broken = bytearray(index)
        struct.pack_into(code, broken, place, value)
        survives(volume.write(path, members=members | {f"{STREAM}/00000000.index": bytes(broken)}))
    for length in (0, 5, 12):
        image = opened(volume.write(path, members=members | {f"{STREAM}/00000000.index": index[:length]}))
        with pytest.raises(InvalidImage):
            read(image.source, 0, 90_000)
        image.close()
    del members[f"{STREAM}/00000001"]
    image = opened(volume.write(path, members=members))
    with pytest.raises(InvalidImage, match="lacks '00000001'"):
        read(image.source, 0, 90_000)
    image.close()


@pytest.mark.parametrize("seed", range(4))
def test_random_damage(tmp_path: Path, seed: int) -> None:
    """Anywhere, and in the zip directory, which is at the end."""
    rng = random.Random(seed)
    arranged, _ = _arranged(seed)
    built = (
        Aff4([ImageStream(STREAM, CONTENT, chunk=32 * KiB), arranged], MAP).write(tmp_path / "a.aff4").read_bytes()
    )
    path = tmp_path / "b.aff4"
    directory = built.index(b"PK\1\2")
    for number in range(30):
        broken = bytearray(built)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(directory if number % 2 else 0, len(broken))] = rng.choice(
                [0, 255, rng.randrange(256)]
            )
        path.write_bytes(broken)
        survives(path)
        path.write_bytes(built[: rng.randrange(len(built))])
        with pytest.raises(FormatError):
            opened(path, "aff4")


# ---------------------------------------------------------------------- the description


def test_turtle() -> None:
    graph = parse(
        "@prefix a: <x:> . PREFIX : <y:>\n# comment . ;\n"
        ':s a a:T , a:U ; a:p "q\\"\\n\\u00e9"^^a:int , \'z\'@en-GB ; .\n'
        '<s2> a:p """long "text" here""" ; a:n -12.5 ; a:b true ; a:i a:b.c .'
    )
    assert graph.types("y:s") == {"x:T", "x:U"}
    assert graph.of_type("x:T") == ["y:s"]
    assert graph.all("y:s", "x:p") == [Term('q"\né', False, "x:int"), Term("z", False)]
    assert graph.one("s2", "x:p") == Term('long "text" here', False)
    assert graph.one("s2", "x:n") == Term("-12.5", False)
    assert graph.one("s2", "x:i") == Term("x:b.c", True)
    assert graph.one("s2", "x:none") is None


@pytest.mark.parametrize(
    "text",
    [
        "<a> <b>",
        "<a> <b> <c>",
        "<a> <b> <c> <d> .",
        "<a> b:c <d> .",
        '<a> "b" <c> .',
        '<a> <b> "c .',
        "<a> <b> , .",
        "<a> <b> <c> , ; .",
        "@prefix x <y> .",
        "@prefix x: <y> ;",
        '<a> <b> "\\U00ffffff" .',
        "{ }",
        "\0",
        '<a> <b> """c"" .',
    ],
)
def test_what_is_no_turtle(text: str) -> None:
    with pytest.raises(InvalidImage):
        parse(text)


def test_turtle_without_an_end_takes_no_time() -> None:
    for text in (
        '"""' + 'a"' * 200_000,
        "a" * 300_000,
        "a." * 100_000 + "\0",
        '<a> <b> "' + "\\" * 200_001,
        "#" * 500_000,
    ):
        with pytest.raises(InvalidImage):
            parse("<a> " + text + "\0")
