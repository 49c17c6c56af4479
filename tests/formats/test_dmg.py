"""Apple's disk images: every kind of run in any order, judged by qemu-img, 7-Zip and dmg2img; hostile ones."""

from __future__ import annotations

import hashlib
import random
import struct
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ferrotype.block import read
from ferrotype.errors import FormatError, InvalidImage, UnsupportedError, UsageError
from ferrotype.extents import State
from ferrotype.formats import dmg
from ferrotype.formats.dmg import lzfse
from ferrotype.formats.dmg.adc import unadc
from ferrotype.formats.dmg.check import crc_of_zeros
from ferrotype.formats.registry import open_folder
from ferrotype.formats.related import Related
from ferrotype.job import NullJob
from tests.formats import udif
from tests.formats.judges import MiB, check_reader, content_of, opened, random_disk
from tests.formats.udif import Udif
from tests.machine import corpus, need, run, unpack

CONTENT = random_disk(3 * MiB + 512, seed=7)
SMALL = random_disk(300 * 512, seed=8)
IMAGES = [entry for entry in corpus() if entry["format"] == "dmg"]
ALL = tuple(udif.KINDS)


@pytest.mark.parametrize("kind", ALL)
def test_each_kind_of_run_is_read_anywhere(tmp_path: Path, kind: str) -> None:
    path = Udif(CONTENT, (kind,), seed=len(kind)).write(tmp_path / "a.dmg")
    check_reader(path, CONTENT, rounds=40)
    image = opened(path)
    assert image.format == "dmg"
    assert image.facts["subformat"] == kind
    assert image.check is not None
    assert image.check(NullJob()) == []
    image.close()


@pytest.mark.parametrize("seed", range(3))
def test_kinds_may_be_mixed(tmp_path: Path, seed: int) -> None:
    path = Udif(CONTENT, ALL, seed=seed, largest=(1, 60, 2048)[seed], before=seed * 5, moved=seed).write(
        tmp_path / "a.dmg"
    )
    check_reader(path, CONTENT, rounds=40, seed=seed)
    image = opened(path)
    zeros = image.source.extents(0, len(CONTENT)).total(State.ZERO)
    assert 0 < zeros <= CONTENT.count(0)
    image.close()


@pytest.mark.parametrize(("fork", "at_start"), [(True, False), (False, True), (True, True)])
def test_old_layouts(tmp_path: Path, fork: bool, at_start: bool) -> None:
    path = Udif(SMALL, ("UDZO", "UDCO"), fork=fork, at_start=at_start).write(tmp_path / "a.dmg")
    check_reader(path, SMALL, rounds=20)
    image = opened(path)
    assert image.facts["tables"] == [f"part {number}" for number in range(4)]
    assert image.check is not None
    assert image.check(NullJob()) == []
    image.close()


@pytest.mark.parametrize("packer", [udif.lzvn, udif.lzfse_stored, udif.lzfse])
@pytest.mark.parametrize("library", [True, False])
def test_lzfse_of_every_kind_of_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packer: Any, library: bool
) -> None:
    if not library:
        monkeypatch.setattr(lzfse, "_library", lambda: None)
    elif lzfse._library() is None:
        pytest.skip("the package lzfse is not installed")
    built = Udif(CONTENT, ("ULFO",), seed=3)
    built.packers["ULFO"] = packer
    check_reader(built.write(tmp_path / "a.dmg"), CONTENT, rounds=10)


def test_the_own_decoder_opens_what_the_library_does() -> None:
    """Damaged streams too: the own one may refuse more, and never reads something else."""
    library = pytest.importorskip("lzfse")
    fast = lzfse._library()
    assert fast is not None
    rng = random.Random(5)
    text = b"".join(rng.choices([rng.randbytes(rng.randint(1, 9)) for _ in range(300)], k=12_000))
    for plain in (text, text[:3000], bytes(70_000), b"\1\2\3" * 999, rng.randbytes(20_000)):
        packed = library.compress(plain)
        assert lzfse._open(packed, len(plain)) == fast(packed, len(plain)) == plain
        for _ in range(60 if len(plain) < 5000 else 4):
            broken = bytearray(packed)
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
            try:
                own = lzfse._open(bytes(broken), len(plain))
            except InvalidImage:
                continue
            assert own == fast(bytes(broken), len(plain))


def test_lzfse_and_adc_end_where_they_must() -> None:
    plain = b"abcabcabcabcabc" * 40
    for packed in (udif.lzvn(plain), udif.lzfse_stored(plain)):
        assert lzfse._open(packed, len(plain)) == plain
        for size in (len(plain) - 1, len(plain) + 1, 0):
            with pytest.raises(InvalidImage):
                lzfse._open(packed, size)
        for end in range(0, len(packed) - 4, 7):
            with pytest.raises(InvalidImage):
                lzfse._open(packed[:end], len(plain))
    packed = udif.adc(plain)
    assert unadc(packed, len(plain)) == plain
    for end in range(len(packed)):
        with pytest.raises(InvalidImage):
            unadc(packed[:end], len(plain))
    with pytest.raises(InvalidImage, match="before"):
        unadc(b"\x80a\x40\x00\x05", 5)


def test_crc_of_zeros() -> None:
    for count in (0, 1, 511, 4096, 100_001):
        assert crc_of_zeros(zlib.crc32(b"abc"), count) == zlib.crc32(b"abc" + bytes(count))
    assert crc_of_zeros(0, 1 << 60) >= 0


# ---------------------------------------------------------------------- judges


@pytest.mark.parametrize("kind", ["UDRO", "UDZO"])
def test_qemu_agrees(tmp_path: Path, kind: str) -> None:
    path = Udif(CONTENT, (kind,), seed=2, shuffled=False, moved=3, before=kind == "UDZO").write(tmp_path / "a.dmg")
    assert content_of(path, "dmg", tmp_path) == CONTENT


@pytest.mark.parametrize("kind", ALL)
def test_7zip_agrees(tmp_path: Path, kind: str) -> None:
    """It opens every kind, and gives the tables' parts one after the other."""
    need("7zz")
    built = Udif(SMALL, (kind,), seed=2, shuffled=False)
    built.packers["ULFO"] = _packed_lzfse
    path = built.write(tmp_path / "a.dmg")
    run("7zz", "x", "-tDmg", f"-o{tmp_path / 'out'}", path)
    parts = sorted((tmp_path / "out").iterdir())
    assert b"".join(part.read_bytes() for part in parts) == SMALL


def _packed_lzfse(data: bytes) -> bytes:
    """Without stored blocks, which 7-Zip does not read."""
    packed = udif.lzfse(data)
    return udif.lzvn(data) if packed[:4] == b"bvx-" else packed


@pytest.mark.parametrize("kind", ["UDRO", "UDCO", "UDZO", "UDBZ"])
def test_dmg2img_agrees(tmp_path: Path, kind: str) -> None:
    need("dmg2img")
    path = Udif(SMALL, (kind,), seed=4, shuffled=False, tables=1).write(tmp_path / "a.dmg")
    run("dmg2img", path, tmp_path / "a.raw")
    raw = (tmp_path / "a.raw").read_bytes()
    assert raw == SMALL[: len(raw)]
    assert len(raw) > len(SMALL) // 2


@pytest.mark.parametrize("entry", IMAGES, ids=lambda entry: entry["id"])
def test_images_of_macos(tmp_path: Path, entry: dict[str, Any]) -> None:
    path = unpack(entry, tmp_path)
    if entry["expect"] == "refuse":
        with pytest.raises(FormatError):
            opened(path)
        return
    image = opened(path)
    disk = read(image.source, 0, image.source.size)
    assert len(disk) == entry["virtual_disk"]["size"]
    assert hashlib.sha256(disk).hexdigest() == entry["virtual_disk"]["sha256"]
    assert image.check is not None
    assert image.check(NullJob()) == []
    image.close()


# ---------------------------------------------------------------------- checksums


def test_damage_is_found(tmp_path: Path) -> None:
    built = Udif(SMALL, ("UDRO",), seed=1).build()
    path = tmp_path / "a.dmg"
    broken = bytearray(built)
    broken[1000] ^= 1  # in the data fork
    path.write_bytes(broken)
    image = opened(path)
    assert image.check is not None
    damages = image.check(NullJob())
    image.close()
    assert len(damages) == 2
    assert "partition 'part" in damages[0]
    assert "data fork" in damages[1]
    broken = bytearray(built)
    broken[-512 + 352 + 8] ^= 1
    path.write_bytes(broken)
    image = opened(path)
    assert image.check is not None
    assert [damage[:19] for damage in image.check(NullJob())] == ["the master checksum"]
    image.close()


def test_damaged_runs_are_named(tmp_path: Path) -> None:
    built = bytearray(Udif(SMALL, ("UDZO",), seed=1, checksums=True).build())
    built[8:3000] = bytes(2992)
    path = tmp_path / "a.dmg"
    path.write_bytes(built)
    image = opened(path)
    assert image.check is not None
    assert any("sectors from" in damage for damage in image.check(NullJob()))
    image.close()


def test_an_image_without_checksums_has_no_check(tmp_path: Path) -> None:
    image = opened(Udif(SMALL, checksums=False).write(tmp_path / "a.dmg"))
    assert image.check is None
    image.close()


# ---------------------------------------------------------------------- segments


def _segments(folder: Path, cuts: tuple[int, ...]) -> Path:
    """An image whose data fork is cut in parts."""
    whole = Udif(SMALL, ("UDZO", "UDRO"), seed=6).build()
    koly = whole[-512:]
    length = struct.unpack_from(">Q", koly, 32)[0]
    bounds = [0, *cuts, length]
    for number, (start, end) in enumerate(pairwise(bounds), 1):
        body = whole[start:end] + (whole[length:-512] if number == 1 else b"")
        trailer = bytearray(koly)
        xml = (end - start, len(whole) - 512 - length) if number == 1 else (0, 0)
        struct.pack_into(">QQQ", trailer, 16, start, 0, end - start)
        struct.pack_into(">II", trailer, 56, number, len(bounds) - 1)
        struct.pack_into(">QQ", trailer, 216, *xml)
        struct.pack_into(">II", trailer, 80, 0, 0)
        name = "disk.dmg" if number == 1 else f"disk.{number:03}.dmgpart"
        (folder / name).write_bytes(body + trailer)
    return folder / "disk.dmg"


def test_segments_are_one_image(tmp_path: Path) -> None:
    path = _segments(tmp_path, (5001, 20_000))
    check_reader(path, SMALL, rounds=20)
    second, third = tmp_path / "disk.002.dmgpart", tmp_path / "disk.003.dmgpart"
    with pytest.raises(UnsupportedError, match="first one"):
        opened(second)
    swapped = second.read_bytes()
    second.write_bytes(third.read_bytes())
    with pytest.raises(InvalidImage, match="is not segment 2"):
        opened(path)
    second.write_bytes(swapped)
    third.unlink()
    with pytest.raises(InvalidImage, match=r"missing: disk\.003\.dmgpart"):
        opened(path)


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"encrcdsa" + bytes(2000), "encrypted"),
        (bytes(2000) + b"cdsaencr", "encrypted"),
        (b"sprs" + bytes(999), "sparse"),
    ],
)
def test_other_forms_are_refused(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "a.dmg"
    path.write_bytes(content)
    with pytest.raises(UnsupportedError, match=what):
        opened(path)


def test_a_sparse_bundle_is_refused(tmp_path: Path) -> None:
    bundle = tmp_path / "a.sparsebundle"
    (bundle / "bands").mkdir(parents=True)
    assert dmg.probe_folder(bundle)
    assert not dmg.probe_folder(tmp_path)
    with pytest.raises((UnsupportedError, UsageError), match="sparse bundle"):
        open_folder(bundle, Related(bundle), "dmg")


# ---------------------------------------------------------------------- hostile


def survives(path: Path) -> None:
    """It is refused, or read: never anything else."""
    try:
        image = opened(path)
    except FormatError:
        return
    try:
        size = image.source.size
        image.source.extents(0, size)
        for at in range(0, min(size, 4 * MiB), MiB):
            read(image.source, at, min(MiB, size - at))
        read(image.source, max(0, size - MiB), min(size, MiB))
        if image.check is not None and size <= 4 * MiB:
            image.check(NullJob())
    except FormatError:
        pass
    finally:
        image.close()


KOLY_FIELDS = {
    "version": (4, "I"),
    "header_size": (8, "I"),
    "running": (16, "Q"),
    "data_offset": (24, "Q"),
    "data_length": (32, "Q"),
    "fork_offset": (40, "Q"),
    "fork_length": (48, "Q"),
    "segment": (56, "I"),
    "segments": (60, "I"),
    "data_checksum": (80, "I"),
    "xml_offset": (216, "Q"),
    "xml_length": (224, "Q"),
    "checksum": (352, "I"),
    "sectors": (492, "Q"),
}
MISH_FIELDS = {"magic": (0, "I"), "first": (8, "Q"), "count": (16, "Q"), "offset": (24, "Q"), "runs": (200, "I")}
RUN_FIELDS = {"kind": (0, "I"), "sector": (8, "Q"), "count": (16, "Q"), "offset": (24, "Q"), "length": (32, "Q")}


def _values(code: str, now: int) -> list[int]:
    top = (1 << 32 if code == "I" else 1 << 64) - 1
    return [0, 1, now ^ 1, min(now + 1, top), max(now - 1, 0), top, top >> 1, top - 511, 1 << 31, (top >> 9) + 1]


@pytest.mark.parametrize("fork", [False, True])
@pytest.mark.parametrize("field", KOLY_FIELDS)
def test_no_trailer_does_harm(tmp_path: Path, field: str, fork: bool) -> None:
    built = Udif(SMALL, ("UDZO", "UDRO"), fork=fork).build()
    at, code = KOLY_FIELDS[field]
    path = tmp_path / "a.dmg"
    for value in _values(code, struct.unpack_from(f">{code}", built, len(built) - 512 + at)[0]):
        broken = bytearray(built)
        struct.pack_into(f">{code}", broken, len(built) - 512 + at, value)
        path.write_bytes(broken)
        survives(path)


@pytest.mark.parametrize(
    "field", [*(f"mish {name}" for name in MISH_FIELDS), *(f"run {name}" for name in RUN_FIELDS)]
)
def test_no_table_does_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    which, name = field.split()
    at, code = MISH_FIELDS[name] if which == "mish" else RUN_FIELDS[name]
    path = tmp_path / "a.dmg"
    original = Udif._table
    for number in range(10):
        for row in (0, 3) if which == "run" else (0,):

            def broken(*args: Any, number: int = number, row: int = row) -> bytes:
                table = bytearray(original(*args))
                last = (len(table) - 204) // 40 - 1
                place = at + (204 + 40 * min(row, last) if which == "run" else 0)
                now = struct.unpack_from(f">{code}", table, place)[0]
                struct.pack_into(f">{code}", table, place, _values(code, now)[number])
                return bytes(table)

            monkeypatch.setattr(Udif, "_table", broken)
            Udif(SMALL, ("UDZO", "UDRO"), tables=1 + number % 2).write(path)
            survives(path)


def _with_run(monkeypatch: pytest.MonkeyPatch, path: Path, row: int, **fields: int) -> Path:
    original = Udif._table

    def broken(*args: Any) -> bytes:
        table = bytearray(original(*args))
        for name, value in fields.items():
            at, code = RUN_FIELDS[name]
            struct.pack_into(f">{code}", table, 204 + 40 * row + at, value)
        return bytes(table)

    monkeypatch.setattr(Udif, "_table", broken)
    return Udif(random_disk(64 * 512, 1) or SMALL, ("UDZO",), tables=1, largest=4).write(path)


def test_a_run_of_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _with_run(monkeypatch, tmp_path / "a.dmg", 0, kind=0x80000005, sector=0, count=1 << 22, offset=0, length=9)
    with pytest.raises(InvalidImage, match="lies outside its table"):
        opened(path)
    original = Udif._table

    def huge(*args: Any) -> bytes:
        table = bytearray(original(*args))
        struct.pack_into(">Q", table, 16, 1 << 40)
        return bytes(table)

    monkeypatch.setattr(Udif, "_table", huge)
    koly_less = bytearray(Udif(SMALL, tables=1).build())
    struct.pack_into(">Q", koly_less, len(koly_less) - 512 + 492, 1 << 40)
    path.write_bytes(koly_less)
    with pytest.raises(InvalidImage, match="too large for zlib"):
        opened(path)


def test_runs_that_overlap_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _with_run(monkeypatch, tmp_path / "a.dmg", 0, kind=0, sector=0, count=64)
    with pytest.raises(InvalidImage, match="two runs hold sector"):
        opened(path)


def test_an_unknown_kind_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _with_run(monkeypatch, tmp_path / "a.dmg", 1, kind=0x80000009, sector=0, count=1)
    with pytest.raises(UnsupportedError, match="unknown kind 0x80000009"):
        opened(path)


LIST = b"<dict><key>resource-fork</key><dict><key>blkx</key><array><dict><key>Data</key>"


@pytest.mark.parametrize(
    ("xml", "what"),
    [
        (b"", "neither a property list nor"),
        (b"<plist/>", "no block table"),
        (b"not xml", "is no XML"),
        (b'<?xml version="1.0" encoding="rot13"?><plist/>', "is no XML"),
        (b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "cccc">]><plist>&b;</plist>', "declares entities"),
        (b'<!DOCTYPE a [<!ATTLIST true b CDATA "cccc">]><plist><true/></plist>', "declares entities"),
        (b"<plist>" + LIST + b"<data>!</data></dict></array></dict></dict></plist>", "is cut short"),
        (b"<plist>" + LIST + b"<data>AAAAA</data></dict></array></dict></dict></plist>", "is no base 64"),
        (
            b"<plist>" + LIST + b"<data>" + b"A" * 400 + b"</data></dict></array></dict></dict></plist>",
            "begin like one",
        ),
        (b"<plist>" + b"<array>" * 5000, "too many elements"),
        (b"<plist>" + b"<true/>" * 1_100_000 + b"</plist>", "too many elements"),
    ],
)
def test_property_lists_that_are_refused(tmp_path: Path, xml: bytes, what: str) -> None:
    built = Udif(SMALL, tables=1).build()
    koly = bytearray(built[-512:])
    struct.pack_into(">QQQ", koly, 24, 0, 0, 0)
    struct.pack_into(">QQ", koly, 216, 0, len(xml))
    path = tmp_path / "a.dmg"
    path.write_bytes(xml + koly)
    with pytest.raises(InvalidImage, match=what):
        opened(path)


def test_cut_short(tmp_path: Path) -> None:
    built = Udif(SMALL, ("UDZO",)).build()
    path = tmp_path / "a.dmg"
    for length in range(0, len(built), len(built) // 37):
        path.write_bytes(built[length:])  # the trailer is at the end: the front is missing
        survives(path)
        path.write_bytes(built[:length])
        with pytest.raises(FormatError):
            opened(path)


@pytest.mark.parametrize("seed", range(4))
def test_random_damage(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    built = Udif(random_disk(100 * 512, seed), ALL, seed=seed, fork=seed % 2 == 1).build()
    path = tmp_path / "a.dmg"
    for _ in range(40):
        broken = bytearray(built)
        for _ in range(rng.randint(1, 6)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        path.write_bytes(broken)
        survives(path)


def test_a_huge_empty_disk(tmp_path: Path) -> None:
    """64 TiB in one run: nothing grows with the size of the disk."""
    sectors = 64 << 31
    table = struct.pack(">4sIQQQII24s", b"mish", 1, 0, sectors, 0, 0, 0, bytes(24)) + udif.checksum(None)
    table += struct.pack(">I", 1) + struct.pack(">IIQQQQ", udif.ZERO, 0, 0, sectors, 0, 0)
    built = Udif(SMALL, tables=1)
    path = tmp_path / "a.dmg"
    body = udif.property_list([table])
    koly = bytearray(built._koly(0, b"", body, 0, sectors))
    path.write_bytes(body + koly)
    image = opened(path)
    assert image.source.size == 64 << 40
    assert image.source.extents(0, image.source.size).total(State.ZERO) == 64 << 40
    assert read(image.source, (64 << 40) - 512, 512) == bytes(512)
    image.close()
