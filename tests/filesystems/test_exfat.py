"""exFAT: maps against partclone, sleuthkit and dump.exfat, on volumes that exfat-fuse filled and aged."""

from __future__ import annotations

import contextlib
import random
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferrotype.block.memory import MemoryDisk
from ferrotype.errors import FormatError, InvalidImage, UnsupportedError
from ferrotype.extents import ExtentMap, State, merge
from ferrotype.filesystems import exfat
from ferrotype.units import KiB, MiB
from tests.filesystems.test_fat import OnFile, claimed, digest, partclone, sleuthkit, used
from tests.machine import corpus, loop, mounted, need, run, unpack


def make(image: Path, size: int, *options: str, sector_size: int = 512) -> Path:
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(size)
    with loop(image, sector_size=sector_size) as device:
        run("mkfs.exfat", *options, device, env={"LC_ALL": "C.UTF-8"})
    return image


def age(image: Path, folder: Path, seed: int, sector_size: int = 512, most: int = MiB) -> None:
    """Fill the volume, delete every other file, and fill the gaps with longer ones."""
    rng = random.Random(seed)
    with loop(image, sector_size=sector_size) as device, mounted(device, "exfat", folder / "mnt") as root:
        names = [f"file {n}" for n in range(80)]
        for name in names:
            (root / name).write_bytes(rng.randbytes(rng.randrange(1, most // 40)))
        for name in rng.sample(names, 40):
            (root / name).unlink()
        for name in ("big", "bigger"):
            (root / name).write_bytes(rng.randbytes(most // 3))


SIZES = [
    ("512", 3 * MiB, 512),
    ("1k", 5 * MiB, 512),
    ("4k", 16 * MiB, 512),
    ("4k", 16 * MiB, 4096),
    ("32k", 40 * MiB, 512),
    ("256k", 80 * MiB, 4096),
    ("2m", 700 * MiB, 512),
    ("32m", 6000 * MiB, 512),
]


@pytest.mark.parametrize(("cluster", "size", "sector"), SIZES)
def test_aged_volumes_agree_with_the_tools(tmp_path: Path, cluster: str, size: int, sector: int) -> None:
    need("mount.exfat-fuse", "partclone.exfat", "blkls", "dump.exfat")
    image = make(tmp_path / "exfat.img", size, "-c", cluster, "-L", "Größe ☃", sector_size=sector)
    age(image, tmp_path, seed=size, sector_size=sector, most=size // 4 if size < 100 * MiB else MiB)
    assert exfat.probe(OnFile(image))
    opened = exfat.open(OnFile(image))
    facts, allocation = opened.facts, opened.allocation()
    with loop(image, sector_size=sector) as device:
        dump = dict(re.findall(r"^(.+?):\s+(\S+)", run("dump.exfat", device), re.MULTILINE))
        serial = run("blkid", "-p", "-s", "UUID", "-o", "value", device).strip()
    assert (facts.kind, facts.label, facts.uuid, facts.unclean) == ("exfat", "Größe ☃", serial, None)
    assert facts.block_size == int(dump["Cluster size"])
    assert facts.size == size
    assert allocation.total(State.FREE) == int(dump["Free Clusters"]) * facts.block_size
    heap = int(dump["Cluster Heap Offset (sector offset)"]) * sector
    end = (heap + int(dump["Cluster Count"]) * facts.block_size) // sector
    ours = used(allocation, sector, end)
    if end < 1 << 20:
        assert ours == sleuthkit(image, "exfat", end)
    if sector == 512:  # partclone counts in 512 whatever the volume says
        assert ours == partclone(image, "exfat", sector, end, tmp_path)
    assert allocation.clip(end * sector, size - end * sector).total(State.FREE) == 0
    assert allocation.clip(0, heap).total(State.FREE) == 0


# ---------------------------------------------------------------------- single facts, on patched volumes


class Patched:
    """A volume in memory of 512-byte sectors, whose fields can be changed."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        fields: tuple[int, ...] = struct.unpack_from("<5I", self.data, 80)
        self.fat, _, self.heap, self.clusters, self.root = fields
        self.fat *= 512
        self.heap *= 512
        self.cluster = 512 << self.data[109]

    def at(self, cluster: int) -> int:
        return self.heap + (cluster - 2) * self.cluster

    def link(self, cluster: int, following: int) -> None:
        struct.pack_into("<I", self.data, self.fat + 4 * cluster, following)

    def entry(self, kind: int) -> int:
        """Where the root directory holds its first entry of that type."""
        root = self.at(self.root)
        return next(at for at in range(root, root + self.cluster, 32) if self.data[at] == kind)

    def seal(self, regions: tuple[int, ...] = (0, 12)) -> None:
        """Write the boot regions' checksums, byte after byte as section 3.4 says."""
        for start in regions:
            total = 0
            for at in range(11 * 512):
                if at not in (106, 107, 112):
                    total = ((total & 1) << 31) + (total >> 1) + self.data[start * 512 + at] & 0xFFFFFFFF
            self.data[(start + 11) * 512 : (start + 12) * 512] = struct.pack("<I", total) * 128

    def open(self) -> exfat.ExFat:
        return exfat.open(MemoryDisk(self.data))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make(tmp_path_factory.mktemp("exfat") / "exfat.img", 8 * MiB, "-c", "512").read_bytes()


def test_a_fragmented_bitmap_is_followed_through_the_fat(pristine: bytes) -> None:
    volume = Patched(pristine)
    before = volume.open().allocation()
    first = struct.unpack_from("<I", volume.data, volume.entry(0x81) + 20)[0]
    length = -(-((volume.clusters + 7) // 8) // volume.cluster)
    assert length >= 3
    pieces = [volume.data[volume.at(first + n) : volume.at(first + n + 1)] for n in range(length)]
    # the second piece moves far away, and its old place is filled with what would look like free clusters
    far = volume.clusters - 5
    pieces[(far - 2) // 8 // volume.cluster][(far - 2) // 8 % volume.cluster] |= 1 << (far - 2) % 8
    for n, piece in enumerate(pieces):
        place = far if n == 1 else first + n
        volume.data[volume.at(place) : volume.at(place + 1)] = piece
    volume.data[volume.at(first + 1) : volume.at(first + 2)] = bytes(volume.cluster)
    volume.link(first, far)
    volume.link(far, first + 2)
    after = volume.open().allocation()
    apart = ExtentMap.from_runs(0, len(volume.data), [volume.at(far)], [volume.at(far + 1)], State.FREE)
    assert merge(after, apart) == before
    assert after.clip(volume.at(far), volume.cluster).total(State.FREE) == 0


@pytest.mark.parametrize("more", [1, 512, 100_000])
def test_a_bitmap_may_be_longer_than_needed(pristine: bytes, more: int) -> None:
    """Section 7.1.5 asks for a minimum; fsck.exfat and Linux take longer ones."""
    volume = Patched(pristine)
    before = volume.open().allocation()
    struct.pack_into("<Q", volume.data, volume.entry(0x81) + 24, (volume.clusters + 7) // 8 + more)
    assert volume.open().allocation() == before


def test_two_fats_have_two_bitmaps(pristine: bytes) -> None:
    volume = Patched(pristine)
    # make room for a second FAT: the first one is longer than it must be
    needed = -(-(volume.clusters + 2) * 4 // 512)
    room = (volume.heap - volume.fat) // 512 // 2
    assert room >= needed
    for start in (0, 12 * 512):
        struct.pack_into("<I", volume.data, start + 84, room)
        volume.data[start + 110] = 2
    volume.seal()
    volume.data[volume.fat + room * 512 : volume.fat + 2 * room * 512] = volume.data[volume.fat :][: room * 512]
    entry = volume.entry(0x81)
    first, size = struct.unpack_from("<IQ", volume.data, entry + 20)
    copy = 9000
    count = -(-size // volume.cluster)
    volume.data[volume.at(copy) : volume.at(copy) + size] = volume.data[volume.at(first) : volume.at(first) + size]
    for fat in (volume.fat, volume.fat + room * 512):
        volume.fat = fat
        for n in range(count):
            volume.link(copy + n, copy + n + 1 if n + 1 < count else 0xFFFFFFFF)
    blank = next(at for at in range(entry, entry + 512, 32) if volume.data[at] == 0)
    volume.data[blank : blank + 32] = struct.pack("<BB18xIQ", 0x81, 1, copy, size)
    for bitmap in (first, copy):
        octets = np.frombuffer(volume.data, np.uint8)[volume.at(bitmap) :][:size]
        for cluster in range(copy, copy + count):
            octets[(cluster - 2) // 8] |= 1 << (cluster - 2) % 8
        del octets
    octet = volume.at(copy) + (7000 - 2) // 8
    volume.data[octet] |= 1 << (7000 - 2) % 8  # in use in the second bitmap only
    one = volume.open().allocation()
    volume.data[106] = 1
    two = volume.open().allocation()
    assert one.total(State.FREE) == two.total(State.FREE) + volume.cluster
    assert two.clip(volume.at(7000), volume.cluster).total(State.FREE) == 0
    assert one.clip(volume.at(7000), volume.cluster).total(State.FREE) == volume.cluster


def test_a_damaged_boot_region_is_replaced_by_its_backup(pristine: bytes) -> None:
    whole = Patched(pristine).open()
    volume = Patched(pristine)
    volume.data[92] ^= 1  # ClusterCount
    opened = volume.open()
    assert "backup" in str(opened.facts.unclean)
    assert opened.allocation() == whole.allocation()
    volume.data[12 * 512 + 400] ^= 1
    with pytest.raises(InvalidImage, match="checksum"):
        volume.open()


def test_flags_make_it_unclean_without_breaking_the_checksum(pristine: bytes) -> None:
    volume = Patched(pristine)
    assert volume.open().facts.unclean is None
    volume.data[106] = 2
    assert "cleanly" in str(volume.open().facts.unclean)
    volume.data[106] = 4
    assert "media" in str(volume.open().facts.unclean)


def test_chains_that_lead_nowhere_are_refused(pristine: bytes) -> None:
    volume = Patched(pristine)
    first = struct.unpack_from("<I", volume.data, volume.entry(0x81) + 20)[0]
    for following in (0, 1, volume.clusters + 2, 0xFFFFFFF7):
        volume.link(first, following)
        with pytest.raises(InvalidImage, match="a chain leads to"):
            volume.open()
    volume.link(first, 0xFFFFFFFF)
    with pytest.raises(InvalidImage, match="too short"):
        volume.open()
    volume = Patched(pristine)
    volume.data[volume.entry(0x81)] = 0x82  # no bitmap, and a directory that never ends
    root = volume.at(volume.root)
    volume.data[root : root + 512] = (b"\x82" + bytes(31)) * 16
    volume.link(volume.root, volume.root)
    with pytest.raises(UnsupportedError, match="pieces"):
        volume.open()


def test_contradictions_are_refused(pristine: bytes) -> None:
    volume = Patched(pristine)
    entry = volume.entry(0x81)
    changes: dict[str, tuple[int, bytes]] = {
        "are needed": (entry + 24, struct.pack("<Q", (volume.clusters + 7) // 8 - 1)),
        "bitmap has": (entry + 24, struct.pack("<Q", 1 << 62)),
        "names no": (entry, b"\x01"),
        "marked free": (volume.at(struct.unpack_from("<I", volume.data, entry + 20)[0]), bytes(64)),
    }
    for message, (at, value) in changes.items():
        changed = Patched(pristine)
        changed.data[at : at + len(value)] = value
        with pytest.raises(InvalidImage, match=message):
            changed.open()
    fields: dict[str, tuple[int, bytes]] = {
        "sectors of": (108, b"\x0d"),
        "2\\^": (109, b"\x11"),
        "FATs": (110, b"\x03"),
        "clusters": (92, struct.pack("<I", 0)),
        "too short": (84, struct.pack("<I", 1)),
        "overlaps": (80, struct.pack("<I", 20)),
        "reach beyond": (72, struct.pack("<Q", 2000)),
        "leads to": (96, struct.pack("<I", 1)),
    }
    for message, (at, value) in fields.items():
        changed = Patched(pristine)
        for start in (0, 12 * 512):
            changed.data[start + at : start + at + len(value)] = value
        changed.seal()
        with pytest.raises(FormatError, match="checksum" if at == 108 else message):
            changed.open()


def test_a_cut_volume_is_unclean_or_refused(pristine: bytes) -> None:
    volume = Patched(pristine)
    shorter = exfat.open(MemoryDisk(pristine[: 6 * MiB]))
    assert "longer" in str(shorter.facts.unclean)
    assert shorter.allocation().end == 6 * MiB
    for size in (0, 511, 512, 12 * 512, volume.fat + 8 * KiB, volume.heap, volume.heap + 700):
        with pytest.raises(InvalidImage):
            exfat.open(MemoryDisk(pristine[:size]))


def test_flipped_bytes_raise_only_what_is_promised(pristine: bytes) -> None:
    rng = random.Random(7)
    volume = Patched(pristine)
    places = [*range(64, 120), *range(volume.at(volume.root), volume.at(volume.root) + 96)]
    places += range(volume.fat + 8, volume.fat + 80)
    for _ in range(60):
        changed = Patched(pristine)
        for place in rng.sample(places, 2):
            value = rng.choice((0, 1, 2, 0x7F, 0x80, 0xFF))
            changed.data[place] = value
            if place < 512:
                changed.data[12 * 512 + place] = value
        changed.seal()
        with contextlib.suppress(FormatError):
            assert changed.open().allocation().length == len(pristine)


# ---------------------------------------------------------------------- images made by other software

ENTRIES = [
    e
    for e in corpus()
    if e["format"] == "raw"
    and e["decompressed_size"] <= 200 * MiB  # unpacking takes longer than the tests
    and any(t["value"].get("TYPE") == "exfat" for t in e["truth"])
]
SLACK_FREED = {"ul-exfat": "partclone frees the sectors behind the last cluster"}
REFUSED = {"exfat-bad-bitmap-size": "the allocation bitmap has", "exfat-bad-root": "a chain leads to"}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e["id"])
def test_corpus(entry: dict[str, Any], tmp_path: Path) -> None:
    image = unpack(entry, tmp_path)
    if entry["id"] in REFUSED:
        with pytest.raises(InvalidImage, match=REFUSED[entry["id"]]):
            exfat.open(OnFile(image))
        return
    opened = exfat.open(OnFile(image))
    allocation = opened.allocation()
    image.unlink()
    stated = next(t["value"] for t in entry["truth"] if t["claim"] == "blkid" and t["at"] == 0)
    assert opened.facts.uuid == stated["UUID"]
    for claim in (c["value"] for c in claimed(entry)):
        unit = claim.get("unit_bytes") or claim["block_size"]
        ours = used(allocation, unit, claim.get("units_listed") or claim["total_blocks"])
        if entry["id"] in SLACK_FREED:
            start, count = ours.pop()
            ours.append((start, count - 3))
        assert digest(ours) == claim["used_ranges_sha256"]
