"""partclone images against partclone: file systems, checksum modes, version 1, damage, hostile headers."""

from __future__ import annotations

import random
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import xxhash

from ferrotype.block import read
from ferrotype.block.memory import MemoryDisk
from ferrotype.errors import FormatError, InvalidImage
from ferrotype.extents import State
from ferrotype.formats.partclone import blocks as block_maps
from ferrotype.formats.partclone import sums
from ferrotype.formats.registry import open_file
from ferrotype.formats.related import Related
from ferrotype.job import NullJob
from ferrotype.testing.sources import check_source
from tests.formats.corpus import check_virtual_disk, entries
from tests.formats.judges import KiB, MiB, check_reader, opened
from tests.machine import need, run, unpack

# ---------------------------------------------------------------------- made by partclone


def volume(path: Path, kind: str) -> Path:
    """A file system on a new file with free space between its files."""
    rng = random.Random(kind)
    size, make = {
        "ext4": (12 * MiB, ["mkfs.ext4", "-q", "-b", "1024"]),
        "fat": (12 * MiB + 1536, ["mkfs.vfat"]),
        "ntfs": (12 * MiB + 1536, ["mkntfs", "-F", "-q", "-c", "1024"]),
        "exfat": (12 * MiB, ["mkfs.exfat"]),
        "xfs": (300 * MiB, ["mkfs.xfs", "-q"]),
        "btrfs": (128 * MiB, ["mkfs.btrfs", "-q"]),
    }[kind]
    with path.open("wb") as blank:
        blank.truncate(size)
    run(*make, path)
    files = []
    for number in range(6):
        files.append(path.with_name(f"file{number}"))
        files[-1].write_bytes(rng.randbytes(rng.randrange(1000, 700_000)))
    if kind == "ext4":
        for file in files:
            run("debugfs", "-w", "-R", f"write {file} {file.name}", path)
        for file in files[1::2]:
            run("debugfs", "-w", "-R", f"rm {file.name}", path)
    elif kind == "fat":
        for file in files:
            run("mcopy", "-i", path, file, f"::{file.name}")
        for file in files[1::2]:
            run("mdel", "-i", path, f"::{file.name}")
    elif kind == "ntfs":
        for file in files:
            run("ntfscp", "-q", path, file, file.name)
    return path


def clone(source: Path, kind: str, *options: str) -> Path:
    """An image of it by partclone."""
    need(f"partclone.{kind}")
    image = source.with_suffix(".pcl")
    run(f"partclone.{kind}", "-c", "-q", "-F", "-L", image.with_suffix(".log"), "-s", source, "-o", image, *options)
    return image


def restored(image: Path, size: int) -> bytes:
    """What partclone makes of an image on a file of zeros."""
    target = image.with_suffix(".restored")
    with target.open("wb") as file:
        file.truncate(size)
    run("partclone.restore", "-q", "-C", "-L", image.with_suffix(".log"), "-s", image, "-O", target)
    content = target.read_bytes()
    target.unlink()
    return content.ljust(size, b"\0")


OPTIONS = [
    ("ext4", ()),
    ("ext4", ("-a0",)),
    ("ext4", ("-a1", "-k1")),
    ("ext4", ("-a1", "-k7")),
    ("ext4", ("-a1", "-k64", "-K")),
    ("ext4", ("-a1", "-k100000")),
    ("fat", ()),
    ("fat", ("-a0",)),
    ("ntfs", ()),
    ("ntfs", ("-a1", "-k3")),
    ("exfat", ()),
]


@dataclass(frozen=True)
class Made:
    """A volume, its image, and what partclone restores from that."""

    source: Path
    image: Path
    content: bytes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Made]:
    """All of OPTIONS, made at once: partclone sleeps a second or two each time it runs."""

    def make(number: int) -> Made:
        kind, options = OPTIONS[number]
        (base / str(number)).mkdir()
        source = volume(base / str(number) / "volume", kind)
        image = clone(source, kind, *options)
        return Made(source, image, restored(image, source.stat().st_size))

    need("partclone.restore", "partclone.ext4")
    base = tmp_path_factory.mktemp("partclone")
    with ThreadPoolExecutor(len(OPTIONS)) as pool:
        return dict(enumerate(pool.map(make, range(len(OPTIONS)))))


@pytest.mark.parametrize(("number", "options"), [(number, options) for number, (_, options) in enumerate(OPTIONS)])
def test_an_image_is_what_partclone_restores(number: int, options: tuple[str, ...], made: dict[int, Made]) -> None:
    source, image, content = made[number].source, made[number].image, made[number].content
    with image.open("rb") as file:
        file.seek(52)
        size = int.from_bytes(file.read(8), "little")  # of the file system, which may end before its device
    assert not any(content[size:])
    content = content[:size]
    check_reader(image, content, rounds=60)
    opening = opened(image)
    try:
        assert opening.format == "partclone"
        assert not opening.warnings
        assert opening.check is not None
        assert opening.check(NullJob()) == []
        assert opening.facts["subformat"] == "version 2"
        assert opening.facts["checksum"] == ("none" if "-a0" in options else "crc32")
        known = opening.source.extents(0, size)
        assert known.total(State.ZERO) == opening.facts["unknown_bytes"]
        assert 0 < known.total(State.ZERO) < size
        original = source.read_bytes()
        for extent in known:
            if not extent.state & State.ZERO:
                assert content[extent.start : extent.end] == original[extent.start : extent.end]
    finally:
        opening.close()


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_sparse_file_systems(kind: str, tmp_path: Path) -> None:
    source = volume(tmp_path / "volume", kind)
    image = clone(source, kind)
    opening = opened(image)
    try:
        disk = opening.source
        assert disk.size == source.stat().st_size
        with source.open("rb") as file:
            for extent in disk.extents(0, disk.size):
                if not extent.state & State.ZERO:
                    file.seek(extent.start)
                    assert read(disk, extent.start, extent.length) == file.read(extent.length)
        assert opening.check is not None
        assert opening.check(NullJob()) == []
    finally:
        opening.close()


def test_every_block_of_an_image_without_a_bitmap(tmp_path: Path) -> None:
    need("partclone.imager")
    source = tmp_path / "disk"
    source.write_bytes(random.Random(1).randbytes(3 * MiB + 1024))
    image = clone(source, "imager")
    check_reader(image, source.read_bytes(), rounds=40)


@pytest.mark.parametrize("options", [("-a1", "-k5"), ("-a1", "-k5", "-K")])
def test_damage_is_found_where_partclone_finds_it(options: tuple[str, ...], tmp_path: Path) -> None:
    good = clone(volume(tmp_path / "volume", "ext4"), "ext4", *options).read_bytes()
    rng = random.Random(5)
    begin = 110 + 12 * KiB // 8 + 4
    places = [begin, begin + 5 * KiB + 2, len(good) - 1, *(rng.randrange(begin, len(good)) for _ in range(2))]
    images = [tmp_path / f"{at}.pcl" for at in places]
    for at, image in zip(places, images, strict=True):
        image.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])

    def judge(image: Path) -> None:
        run("partclone.chkimg", "-L", image.with_suffix(".log"), "-s", image, ok=(1,))

    with ThreadPoolExecutor(len(images)) as pool:
        list(pool.map(judge, images))
    for image in images:
        opening = opened(image)
        assert opening.check is not None
        found = opening.check(NullJob())
        opening.close()
        assert found
        assert all("do not match their checksum" in sentence for sentence in found)
        assert len(found) == 1


# ---------------------------------------------------------------------- made by hand


def crc(data: bytes, state: int = 0xFFFFFFFF) -> int:
    """CRC-32 without its last inversion."""
    return ~zlib.crc32(data, ~state & 0xFFFFFFFF) & 0xFFFFFFFF


def first_bytes_crc(block: bytes, state: int) -> int:
    """The sum of version 1: it never goes on to the second byte."""
    return crc(block[:1] * len(block), state)


def old_image(blocks: list[bytes | None], size: int, *, room: int = 4, odd: int = 0) -> bytes:
    """An image of version 1; None: not in use, written as ``odd``."""
    used = [block for block in blocks if block is not None]
    head = struct.pack(
        "<15s15s4s2xiQQQ", b"partclone-image", b"EXTFS", b"0001", size, len(blocks) * size, len(blocks), len(used)
    )
    image = head.ljust(4160, b"\0") + bytes(odd if block is None else 1 for block in blocks) + b"BiTmAgIc"
    state = 0xFFFFFFFF
    for block in used:
        state = first_bytes_crc(block, state)
        image += block + struct.pack("<I", state).ljust(room, b"\xaa")
    return image


def new_image(
    blocks: list[bytes | None],
    size: int,
    *,
    mode: int = 1,
    per_sum: int = 4,
    reseed: bool = True,
    bitmap_mode: int = 1,
    device: int | None = None,
    **fields: int,  # of the header, as it is to lie
) -> bytes:
    """An image of version 2."""
    used = [block for block in blocks if block is not None]
    width = {0: 0, 1: 4, 2: 8}[mode]
    values: dict[str, Any] = {
        "endian": 0xC0DE,
        "device": len(blocks) * size if device is None else device,
        "total": len(blocks),
        "super": len(used),
        "used": len(used),
        "block": size,
        "feature": 18,
        "version": 2,
        "bits": 64,
        "sums": (0, 0x20, 0x30)[mode],
        "width": width,
        "per_sum": per_sum if mode else 0,
        "reseed": reseed,
        "bitmap": bitmap_mode,
    } | fields
    head = b"partclone-image\0" + b"0.3.23".ljust(14, b"\0") + b"0002"
    names = ["device", "total", "super", "used", "block", "feature", "version", "bits", "sums", "width", "per_sum"]
    head += struct.pack("<H16s", values["endian"], b"EXTFS")
    head += struct.pack("<QQQQIIHHHHIBB", *(values[name] for name in names), values["reseed"], values["bitmap"])
    image = head + struct.pack("<I", crc(head))
    bits = bytearray(-(-len(blocks) // 8))
    for at, block in enumerate(blocks):
        bits[at // 8] |= (block is not None) << at % 8
    bitmap = bytes(bits)
    if bitmap_mode == 1:
        image += bitmap + struct.pack("<I", crc(bitmap))
    elif bitmap_mode == 8:
        image += bytes(block is not None for block in blocks) + b"BiTmAgIc"
    state, hashed, group = 0xFFFFFFFF, xxhash.xxh64(), 0
    for at, block in enumerate(used):
        image += block
        state, group = crc(block, state), group + 1
        hashed.update(block)
        if width and (group == per_sum or at == len(used) - 1):
            image += struct.pack("<I", state) if mode == 1 else struct.pack("<Q", hashed.intdigest())
            group = 0
            if reseed:
                state, hashed = 0xFFFFFFFF, xxhash.xxh64()
    return image


def some_blocks(count: int, size: int, seed: int = 0, share: float = 0.6) -> list[bytes | None]:
    rng = random.Random(seed)
    blocks: list[bytes | None] = []
    while len(blocks) < count:
        run_of = rng.randint(1, 9)
        keep = rng.random() < share
        blocks += [rng.randbytes(size) if keep else None for _ in range(run_of)]
    return blocks[:count]


def content_of(blocks: list[bytes | None], size: int) -> bytes:
    return b"".join(bytes(size) if block is None else block for block in blocks)


@pytest.mark.parametrize("room", [4, 8])
@pytest.mark.parametrize("odd", [0, 3])
def test_version_1_with_either_size_of_its_sums(room: int, odd: int, tmp_path: Path) -> None:
    blocks = some_blocks(700, 1024, seed=room)
    image = tmp_path / "old.pcl"
    image.write_bytes(old_image(blocks, 1024, room=room, odd=odd))
    content = content_of(blocks, 1024)
    if room == 4:
        need("partclone.restore")
        assert restored(image, len(content)) == content
    check_reader(image, content)
    opening = opened(image)
    assert opening.check is not None
    assert opening.check(NullJob()) == []
    assert opening.facts["subformat"] == "version 1"
    opening.close()


def test_the_sum_of_version_1_sees_first_bytes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "_WINDOW", 5000)
    blocks = some_blocks(300, 512, seed=2)
    image = bytearray(old_image(blocks, 512))
    begin = 4160 + 300 + 8
    path = tmp_path / "old.pcl"
    path.write_bytes(image)
    opening = opened(path)
    assert opening.check is not None
    assert opening.check(NullJob()) == []
    opening.close()
    for at, seen in [(begin, True), (begin + 516 * 90, True), (begin + 516 * 90 + 1, False), (begin + 513, True)]:
        damaged = bytearray(image)
        damaged[at] ^= 0x40
        path.write_bytes(damaged)
        opening = opened(path)
        assert opening.check is not None
        assert bool(opening.check(NullJob())) == seen
        opening.close()


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("reseed", [True, False])
@pytest.mark.parametrize(("size", "per_sum"), [(512, 1), (1024, 3), (4096, 16), (65536, 2)])
def test_every_kind_of_sum_at_any_cut(mode: int, reseed: bool, size: int, per_sum: int) -> None:
    blocks = some_blocks(60 * 4096 // size + 5, size, seed=mode)
    disk = MemoryDisk(new_image(blocks, size, mode=mode, reseed=reseed, per_sum=per_sum))
    image = open_file(disk, Related.nothing())
    assert image.check is not None
    assert image.check(NullJob()) == []
    content = content_of(blocks, size)
    check_source(lambda: image.source, content, rounds=60)
    for end in range(size, len(content), size):  # to both sides of every checksum
        assert read(image.source, end - 1, 1) == content[end - 1 : end]
        assert read(image.source, end - 1, 2) == content[end - 1 : end + 1]
    if not mode:
        return
    for at in (-1, -size // 2, 110 + -(-len(blocks) // 8) + 4):
        disk.data[at] ^= 1
        found = image.check(NullJob())
        disk.data[at] ^= 1
        assert len(found) == 1


@pytest.mark.parametrize("mode", [8, 0])
def test_a_bitmap_of_bytes_and_none_at_all(mode: int) -> None:
    blocks = some_blocks(333, 512, share=1 if mode == 0 else 0.5)
    image = open_file(MemoryDisk(new_image(blocks, 512, bitmap_mode=mode)), Related.nothing())
    check_source(lambda: image.source, content_of(blocks, 512), rounds=60)


def test_many_pages_of_bitmap() -> None:
    """Runs that cross from one page to the next, and a page without any used block."""
    count = 3 * 8 * 64 * KiB + 1000
    chosen = [0, 5, *range(524_280, 524_300), *range(1_572_860, 1_572_870), count - 1]
    blocks: list[bytes | None] = [None] * count
    rng = random.Random(3)
    for at in chosen:
        blocks[at] = rng.randbytes(512)
    image = open_file(MemoryDisk(new_image(blocks, 512, per_sum=5)), Related.nothing())
    for at in chosen:
        assert read(image.source, at * 512, 512) == blocks[at]
    for start in (0, 524_270 * 512, 524_288 * 512 - 700, 1_572_850 * 512, (count - 4) * 512):
        length = min(40 * 512 + 77, image.source.size - start)
        wanted = b"".join(blocks[n] or bytes(512) for n in range(start // 512, min(start // 512 + 42, count)))
        assert read(image.source, start, length) == wanted[start % 512 :][:length]
    known = image.source.extents(0, image.source.size)
    assert image.source.size - known.total(State.ZERO) == len(chosen) * 512
    assert image.check is not None
    assert image.check(NullJob()) == []


@pytest.mark.parametrize("octets", [False, True])
def test_pages_that_are_all_alike(octets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of which every block is used, and none, with odd ends on both sides."""
    page = 512
    monkeypatch.setattr(block_maps, "PAGE", page // 8)
    monkeypatch.setattr(block_maps, "PAGE_BLOCKS", page)
    count = 5 * page + 77
    used = [*range(3), *range(page - 2, 2 * page + 9), count - 1]
    block = {at: at.to_bytes(8, "little") * 64 for at in used}
    blocks: list[bytes | None] = [block.get(at) for at in range(count)]
    whole = new_image(blocks, 512, per_sum=1000, bitmap_mode=8 if octets else 1)
    image = open_file(MemoryDisk(whole), Related.nothing())
    check_source(lambda: image.source, content_of(blocks, 512), rounds=60)
    for first in (0, 2, page - 3, page, page + 1, 2 * page - 5, 2 * page + 5, 3 * page - 2, count - 3):
        length = min(12, count - first)
        wanted = b"".join(blocks[at] or bytes(512) for at in range(first, first + length))
        assert read(image.source, first * 512 + 7, length * 512 - 7) == wanted[7:]
    known = image.source.extents(0, image.source.size)
    assert known.bounds.tolist() == [at * 512 for at in (0, 3, page - 2, 2 * page + 9, count - 1, count)]
    known = image.source.extents((page + 9) * 512 + 5, 4 * page * 512)
    assert known.bounds.tolist()[1] == (2 * page + 9) * 512


def test_a_disk_larger_than_its_blocks_ends_in_zeros() -> None:
    blocks = some_blocks(50, 512)
    image = open_file(MemoryDisk(new_image(blocks, 512, device=50 * 512 + 300)), Related.nothing())
    check_source(lambda: image.source, content_of(blocks, 512) + bytes(300), rounds=40)
    smaller = open_file(MemoryDisk(new_image(blocks, 512, device=512)), Related.nothing())
    assert smaller.source.size == 50 * 512
    assert smaller.warnings


# ---------------------------------------------------------------------- hostile


BLOCKS = some_blocks(90, 512, seed=9)
FIELDS: list[tuple[str, int]] = [
    ("endian", 0xDEC0),
    ("endian", 0),
    ("device", 1 << 63),
    ("device", (1 << 64) - 1),
    ("total", 0),
    ("total", 1 << 40),
    ("total", (1 << 64) - 1),
    ("used", 91),
    ("used", 1 << 63),
    ("block", 0),
    ("block", 1),
    ("block", 513),
    ("block", (1 << 32) - 1),
    ("sums", 1),
    ("sums", 0x31),
    ("width", 0),
    ("width", 8),
    ("per_sum", 0),
    ("bitmap", 2),
    ("bitmap", 255),
]


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_an_impossible_header_is_refused(field: str, value: int) -> None:
    fields: dict[str, Any] = {field: value}
    with pytest.raises(FormatError):
        open_file(MemoryDisk(new_image(BLOCKS, 512, **fields)), Related.nothing())


@pytest.mark.parametrize(
    ("field", "value"), [("per_sum", 1 << 31), ("total", 89), ("block", 1024), ("bitmap", 0), ("super", 1 << 60)]
)
def test_a_possible_header_that_lies_does_no_harm(field: str, value: int) -> None:
    fields: dict[str, Any] = {field: value} | ({"total": 1 << 50, "used": 90} if field == "bitmap" else {})
    try:
        image = open_file(MemoryDisk(new_image(BLOCKS, 512, **fields)), Related.nothing())
        image.source.extents(0, image.source.size)
        assert image.check is not None
        image.check(NullJob())
        read(image.source, image.source.size - 4096, 4096)
    except FormatError:
        pass


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_cut_short_is_never_zeros(version: int) -> None:
    whole = old_image(BLOCKS, 512) if version == 1 else new_image(BLOCKS, 512)
    content = content_of(BLOCKS, 512)
    rng = random.Random(version)
    for length in [15, 30, 40, 109, 110, 120, 4159, 4250, len(whole) - 1, *rng.sample(range(len(whole)), 60)]:
        try:
            image = open_file(MemoryDisk(whole[:length]), Related.nothing())
        except FormatError:
            continue
        for at in range(0, len(content), 512):
            try:
                assert read(image.source, at, 512) == content[at : at + 512]
            except InvalidImage:
                assert image.warnings
        assert image.check is not None
        assert image.check(NullJob())


def test_flipped_bits_of_header_and_bitmap_are_caught() -> None:
    whole = new_image(BLOCKS, 512)
    for at in range(30, 110 + 12 + 4):
        damaged = bytearray(whole)
        damaged[at] ^= 0x04
        with pytest.raises(FormatError):
            open_file(MemoryDisk(bytes(damaged)), Related.nothing())


# ---------------------------------------------------------------------- corpus


@pytest.mark.parametrize("entry", entries("partclone"), ids=lambda entry: str(entry["id"]))
def test_corpus(entry: dict[str, Any], tmp_path: Path) -> None:
    path = unpack(entry, tmp_path)
    if entry["validity"] == "malformed":
        image = opened(path)
        assert any("ends early" in warning for warning in image.warnings)
        assert image.check is not None
        assert image.check(NullJob())
        with pytest.raises(InvalidImage, match="the file ends before"):
            read(image.source, 0, image.source.size)
        image.close()
        return
    check_virtual_disk(entry, path)
