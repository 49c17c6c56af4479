"""Hostile images that were, or could have been, too much: each small, made by hand, and answered within bounds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash

from ferrotype.block import read
from ferrotype.engine.checksum import checksum
from ferrotype.engine.salvage import SalvageResult, salvage
from ferrotype.engine.survey import survey
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.errors import Cancelled, CorruptObject, InvalidImage, KeyRefused, UsageError
from ferrotype.extents import State
from ferrotype.filesystems.registry import identify
from ferrotype.job import NullJob
from ferrotype.objects import ObjectInfo
from ferrotype.objects.container import Container
from ferrotype.objects.layout import ANCHORS_AT, BLOCK, RECORDS_AT, Kind, RecordHeader
from ferrotype.objects.layout import checksum as xxh3
from ferrotype.objects.memory import MemoryStore
from ferrotype.repository import bare_frames, keys, merging, segments, snapshots, source
from ferrotype.repository.keys import Cost, Secret, lock, unlock
from ferrotype.repository.packs import PackBuilder, read_table
from ferrotype.repository.sealing import Keys, Sealer
from ferrotype.repository.source import SnapshotSource
from ferrotype.repository.store import Repository
from ferrotype.units import GiB, KiB, MiB
from tests.fuzz.hostile import Impatient
from tests.fuzz.limits import limited
from tests.fuzz.recipe import CONFIG, MASTER, build, reference
from tests.fuzz.sparse import Sparse, SparseDisk
from tests.machine import CORPUS, corpus
from tests.repository.small import QUICK, SECRET, back_up, create, disk_content

PAGE = 32 * KiB
SEALER = Sealer(Keys.derive(MASTER, encrypted=False))


def _small_malformed() -> list[dict[str, Any]]:
    return [
        e for e in corpus() if e["kind"] == "malformed" and len(e["files"]) == 1 and e["decompressed_size"] < 16 * MiB
    ]


def snapshot(size: int, regions: list[dict[str, object]], **more: object) -> bytes:
    disk = {"name": "sda", "size": size, "sector_size": 512, "chunk_size": 4096, "regions": regions, **more}
    facts = {"created": "2026-01-01T00:00:00Z", "host": "h", "name": "n"}
    return msgspec.json.encode({**facts, "disks": [disk]})


def tower(levels: int, *, missing: bool = False) -> Repository:
    """One page of 1,024 equal ids upon the other: a disk of 4 MiB, 4 GiB, 4 TiB ... in a handful of chunks.

    ``missing``: the chunk at the bottom is not stored.
    """
    chunks = [[b"abc", 4096], *([reference(i), PAGE] for i in range(levels))]
    stored = list(range(int(missing), levels + 1))
    size = min(4096 * 1024**levels, 1 << 61)
    top = {"start": 0, "length": size, "map": (reference(levels) + b"@hex").decode()}
    recipe = [
        CONFIG,
        chunks,
        [[stored, b"", -1, -1]],
        [[[[i, 0, -1, -1] for i in stored], -1, [], 1]],
        [snapshot(size, [top])],
    ]
    return Repository.open(build(msgspec.msgpack.encode(recipe)).store)


# ---------------------------------------------------------------------- maps


def test_a_page_that_stands_a_million_times_is_verified_once() -> None:
    repository = tower(5)
    with limited():
        result = verify(repository, VerifyOptions(workers=1, deep=True), NullJob())
    assert result.ok


def test_a_chunk_that_is_lost_a_million_times_is_told_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    from ferrotype.engine import damage

    monkeypatch.setattr(damage, "_RANGES", 10_000)
    repository = tower(4, missing=True)
    with limited():
        result = verify(repository, VerifyOptions(workers=1), NullJob())
    assert [(d.start, d.start + d.length) for d in result.damaged] == [(0, 4096 * 1024**4)]


def test_extents_of_an_endless_map_are_bounded_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_MOST_WORK", 100)
    repository = tower(5)
    opened = SnapshotSource(repository, repository.snapshots()[0].disk())
    with limited():
        found = opened.extents(0, opened.size)
        assert found.length == opened.size
        assert found.total(State.ZERO) == 0  # nothing is called zero that was not looked at
        assert survey(opened).size == opened.size
        with pytest.raises(Cancelled):
            checksum(opened, Impatient(), workers=1)


def test_extents_beyond_the_bound_keep_what_was_seen_before(monkeypatch: pytest.MonkeyPatch) -> None:
    page = reference(0) + bytes(32 * 1023)
    recipe = [
        CONFIG,
        [[b"abc", 4096], [page, PAGE], [reference(1), PAGE]],
        [[[0, 1, 2], b"", -1, -1]],
        [[[[i, 0, -1, -1] for i in range(3)], -1, [], 1]],
        [snapshot(4 * GiB, [{"start": 0, "length": 4 * GiB, "map": (reference(2) + b"@hex").decode()}])],
    ]
    repository = Repository.open(build(msgspec.msgpack.encode(recipe)).store)
    opened = SnapshotSource(repository, repository.snapshots()[0].disk())
    whole = opened.extents(0, opened.size)
    assert whole.total(State.ZERO) == 4 * GiB - 1024 * 4096
    monkeypatch.setattr(source, "_MOST_WORK", 7)
    cut = opened.extents(0, opened.size)
    assert cut.clip(0, 7 * 4 * MiB) == whole.clip(0, 7 * 4 * MiB)
    assert cut.total(State.ZERO) == 7 * (4 * MiB - 4096)


def test_a_hundred_thousand_regions() -> None:
    count = 100_000
    regions: list[dict[str, object]] = [{"start": i * 4096, "length": 4096, "map": "0" * 64} for i in range(count)]
    regions[7]["map"] = (reference(1) + b"@hex").decode()
    recipe = [
        CONFIG,
        [[b"abc", 4096], [reference(0) + bytes(32 * 1023), PAGE]],
        [[[0, 1], b"", -1, -1]],
        [[[[0, 0, -1, -1], [1, 0, -1, -1]], -1, [], 1]],
        [snapshot(count * 4096, regions)],
    ]
    store = build(msgspec.msgpack.encode(recipe)).store
    with limited():
        repository = Repository.open(store)
        opened = SnapshotSource(repository, repository.snapshots()[0].disk())
        assert read(opened, 7 * 4096, 3) == b"abc"
        for i in range(8, 1008):
            assert read(opened, i * 4096, 4096) == bytes(4096)
        assert len(opened._maps) <= 16
        assert verify(repository, VerifyOptions(workers=1), NullJob()).ok


# ---------------------------------------------------------------------- snapshots


def test_a_sector_of_an_exabyte_is_refused() -> None:
    data = snapshot(1 << 61, [{"start": 0, "length": 1 << 61, "map": "0" * 64}], sector_size=1 << 60)
    with pytest.raises(CorruptObject, match="impossible sizes"):
        snapshots.decode("snapshot/00", data)


def test_snapshots_that_unpack_to_gigabytes_are_left_out() -> None:
    store = build(msgspec.msgpack.encode([CONFIG, [], [], [], [snapshot(0, [])]])).store
    for i in range(20):
        bomb = snapshot(0, [], volumes=[{}] * 400_000, name=f"bomb {i}")
        name, frame = SEALER.seal_object("snapshot", bomb)
        store.put(name, [frame])
    assert sum(map(len, store.objects.values())) < 100_000
    with limited(), Repository.open(store) as repository:
        assert "n" in [s.name for s in repository.snapshots()] or repository.warnings
        assert any("unpacks to more" in warning for warning in repository.warnings)


# ---------------------------------------------------------------------- index


def segment_of(directory: bytes, count: int, pages: list[bytes]) -> tuple[MemoryStore, str]:
    """A segment with this directory, named as it has to be."""
    header = segments.SegmentHeader(b"FIDX", 1, count, 0, bytes(16), 0)
    segment_id = SEALER.object_id("index", header.pack() + directory)
    sealed = segments.seal_long(SEALER, segment_id, directory)
    final = segments.SegmentHeader(b"FIDX", 1, count, len(sealed), bytes(16), 0)
    store = MemoryStore()
    store.put(segments.PREFIX + segment_id.hex(), [final.pack(), sealed, *pages])
    return store, segments.PREFIX + segment_id.hex()


def test_a_directory_that_unpacks_to_gigabytes_is_refused_before_it_does() -> None:
    segment_id = bytes(16)
    piece = bytes(16 * MiB)
    sealed = b""
    for number in range(200):
        frame = SEALER.seal(segment_id + number.to_bytes(4, "little"), piece)
        sealed += len(frame).to_bytes(4, "little") + frame
    store = MemoryStore()
    store.put(
        segments.PREFIX + segment_id.hex(),
        [segments.SegmentHeader(b"FIDX", 1, 0, len(sealed), bytes(16), 0).pack(), sealed],
    )
    with limited(), pytest.raises(CorruptObject, match="directory cannot be read"):
        segments.Segment(store, segments.PREFIX + segment_id.hex(), SEALER)


def test_pages_that_unpack_to_more_than_a_page_are_refused() -> None:
    entries = np.zeros(1024, segments.ENTRY)
    big = np.zeros(350_000, segments.ENTRY).tobytes()
    page_hash = SEALER.object_id("index", big)
    frame = SEALER.seal(page_hash, big).ljust(SEALER.overhead + entries.nbytes, b"\0")
    directory = msgspec.msgpack.encode(segments.Directory(["pack/00"], bytes(8), page_hash, [len(frame)]))
    segment = segments.Segment(*segment_of(directory, 1024, [frame]), SEALER)
    with limited(), pytest.raises(CorruptObject, match="page 0"):
        segment.page(0)


def test_entries_that_look_alike_do_not_make_lookups_endless() -> None:
    entries = np.zeros(200_000, segments.ENTRY)
    for i in range(len(entries)):
        entries["id"][i] = bytes(8) + i.to_bytes(24, "big")
    name, parts = merging.build_segment(entries, ["pack/00"], SEALER, bytes(16))
    store = MemoryStore()
    store.put(name, parts)
    wanted = np.frombuffer(b"".join(bytes(8) + (1 << 60 | i).to_bytes(24, "big") for i in range(1024)), "V32")
    segment = segments.Segment(store, name, SEALER)
    with limited(), pytest.raises(CorruptObject, match="look alike"):
        segment.find_many(wanted)
    with limited(), pytest.raises(CorruptObject, match="look alike"):
        segment.find(wanted[0].tobytes())


@pytest.mark.parametrize("ask", ["find", "find_many"])
def test_a_thousand_damaged_segments_are_gone_through(ask: str) -> None:
    count = 450  # more than calls may be nested
    recipe = [
        CONFIG,
        [[b"%d" % i, 4096] for i in range(count)],
        [[[i], b"", -1, -1] for i in range(count)],
        [[[[i, i, -1, -1]], -1, [], 1] for i in range(count)],
        [],
    ]
    built = build(msgspec.msgpack.encode(recipe))
    for name in [name for name in built.store.objects if name.startswith(segments.PREFIX)]:
        data = bytearray(built.store.objects[name])
        data[-1] ^= 1  # in the only page
        built.store.objects[name] = bytes(data)
    repository = Repository.open(built.store)
    with limited(20):
        if ask == "find":
            assert repository.index.find(built.ids[5]) is not None
        else:
            found = repository.locate_many(np.frombuffer(b"".join(built.ids), "V32"))
            assert (found[0] >= 0).all()


# ---------------------------------------------------------------------- keys


def test_the_work_for_all_key_slots_together_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Cost] = []

    def derive(_: Secret, __: bytes, cost: Cost) -> bytes:
        tried.append(cost)
        return bytes(32)

    slot = lock(bytes(32), SECRET, 32 * "0", cost=QUICK)
    dear = msgspec.structs.replace(slot, cost=Cost(memory=256 * 1024, passes=8))
    monkeypatch.setattr(keys, "_derive", derive)
    with pytest.raises(KeyRefused, match="more than can be tried"):
        unlock([dear] * 5000, SECRET, 32 * "0")
    assert sum(cost.memory * cost.passes for cost in tried) * KiB <= 32 * GiB
    assert len(tried) == 16


def test_no_slot_is_added_that_would_not_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MAX_TRIED", 3 * QUICK.work)
    with create(MemoryStore(), SECRET) as repository:
        for word in (b"second", b"third"):
            repository.add_key(Secret(word), cost=QUICK)
        with pytest.raises(UsageError, match="as many key slots"):
            repository.add_key(Secret(b"fourth"), cost=QUICK)
        unlock(list(_slots(repository)), Secret(b"third"), repository.config.id)


def _slots(repository: Repository) -> list[keys.KeySlot]:
    return [keys.decode_slot(repository.store.get(info.name)) for info in repository.store.list("key/")]


# ---------------------------------------------------------------------- disks that others broke


@pytest.mark.parametrize("entry", _small_malformed(), ids=lambda entry: entry["id"])
def test_the_corpus_of_malformed_disks_is_surveyed_in_bounds(entry: dict[str, Any]) -> None:
    stored = entry["files"][0]
    disk = SparseDisk(Sparse.load(CORPUS / stored["stored"], stored["storage"]))
    with limited():
        assert survey(disk, exclude_swap_files=True).size == disk.size
        found = identify(disk)
        if found is not None and found.filesystem is not None:
            found.filesystem.files_at(np.array([0]), np.array([disk.size]))


# ---------------------------------------------------------------------- containers


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "small.ferro"
    with create(Container.create(path)):
        pass
    return path


def with_catalog(path: Path, payload: bytes) -> None:
    """A last catalog with this payload behind everything, found by scanning."""
    data = bytearray(path.read_bytes())
    uuid, end = bytes(data[16:32]), -(-len(data) // BLOCK) * BLOCK
    header = RecordHeader.make(Kind.CATALOG, uuid, 1000, len(payload), xxh3(payload), "")
    data[end:] = bytes(end - len(data)) + header.pack() + payload
    path.write_bytes(data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0"))


def test_a_catalog_of_millions_of_objects_in_a_small_file_is_passed_over(image: Path) -> None:
    entry = b"\x95\xa0\x00\x00\x00\x00"  # six bytes: an object without a name
    count = 3 << 20
    with_catalog(image, b"\x93\xc0\xdd" + count.to_bytes(4, "big") + entry * count + b"\x90")
    with limited():
        store = Container.open(image)
        assert store.size("config")
        store.close()


def test_a_deep_catalog_is_passed_over(image: Path) -> None:
    with_catalog(image, b"\x93\xc0" + b"\x91" * 100_000 + b"\x90" + b"\x90")
    with limited():
        store = Container.open(image)
        assert store.size("config")
        store.close()


def test_an_image_of_terabytes_of_holes_is_searched_at_once(image: Path) -> None:
    with image.open("r+b") as file:
        for at in ANCHORS_AT:
            file.seek(at)
            file.write(bytes(BLOCK))
        file.truncate(1 << 43)
    with limited():
        store = Container.open(image)
        assert store.size("config")
        store.close()


def test_records_that_claim_each_others_bytes_are_not_read_again_and_again(image: Path) -> None:
    """Each claims all that follows, with a wrong checksum: quadratic, were every one of them proven."""
    data = bytearray(image.read_bytes())
    uuid, count = bytes(data[16:32]), 4000
    at = RECORDS_AT
    del data[at:]
    for number in range(count):
        rest = (count - number) * BLOCK - RecordHeader.SIZE
        data += (
            RecordHeader.make(Kind.OBJECT, uuid, number, rest, bytes(16), f"pack/{number}").pack().ljust(BLOCK, b"\1")
        )
    image.write_bytes(data)
    with limited(10), contextlib.suppress(InvalidImage):
        Container.open(image, writable=True).close()


# ---------------------------------------------------------------------- lengths


class Vast(MemoryStore):
    """Objects of a terabyte, as a file full of holes has them for nothing; nobody has memory to get one."""

    def __init__(self, inner: MemoryStore, names: set[str]) -> None:
        super().__init__()
        self.objects = inner.objects
        self._names = names

    def size(self, name: str, /) -> int:
        return 1 << 40 if name in self._names else super().size(name)

    def list(self, prefix: str, /) -> Iterator[ObjectInfo]:
        return (ObjectInfo(info.name, self.size(info.name)) for info in super().list(prefix))

    def get(self, name: str, /, offset: int = 0, length: int | None = None) -> bytes:
        assert name not in self._names or (length is not None and length <= 16 * MiB), f"all of {name} is read"
        return super().get(name, offset, length)

    def check(self, name: str, /, *, from_medium: bool = False) -> None:  # noqa: ARG002
        assert name not in self._names, f"all of {name} is read"


def test_objects_of_a_terabyte_are_not_read_whole() -> None:
    store = MemoryStore()
    with create(store, SECRET) as repository:
        for day in range(2):
            back_up(repository, disk_content(3, day), f"day {day}", day=day)
        repository.add_key(Secret(b"second"), cost=QUICK)
    key, name = next(store.list("key/")).name, next(store.list("snapshot/")).name
    with Repository.open(Vast(store, {key, name}), Secret(b"second")) as opened:
        assert len(opened.snapshots()) == 1
        assert any("larger than" in warning for warning in opened.warnings)


def test_a_frame_of_gigabytes_is_refused_before_it_is_read() -> None:
    entries = np.zeros(1, segments.ENTRY)
    entries["length"] = 0xFFFFFFFF
    name, parts = merging.build_segment(entries, ["pack/00"], SEALER, bytes(16))
    store = MemoryStore()
    store.put(name, parts)
    with pytest.raises(CorruptObject, match="longer than any"):
        segments.Segment(store, name, SEALER).find(bytes(32))


def test_a_pack_whose_table_names_a_frame_of_gigabytes_is_refused() -> None:
    recipe = [CONFIG, [[b"abc", 4096]], [[[0], bytes(34) + b"\xff\xff", -1, -1]], [], []]
    store = build(msgspec.msgpack.encode(recipe)).store
    with pytest.raises(CorruptObject, match="longer than any"):
        read_table(store, next(store.list("pack/")).name, SEALER)


def test_chunks_that_are_longer_than_their_cells_are_not_kept_whole() -> None:
    recipe = [
        CONFIG,
        [[b"abc", PAGE], [reference(0) + bytes(32 * 1023), PAGE]],
        [[[0, 1], b"", -1, -1]],
        [[[[0, 0, -1, -1], [1, 0, -1, -1]], -1, [], 1]],
        [snapshot(8192, [{"start": 0, "length": 8192, "map": (reference(1) + b"@hex").decode()}])],
    ]
    repository = Repository.open(build(msgspec.msgpack.encode(recipe)).store)
    opened = SnapshotSource(repository, repository.snapshots()[0].disk())
    assert read(opened, 0, 3) == b"abc"
    assert sum(map(len, opened._kept.values())) <= 4096


def test_volumes_and_losses_by_the_thousand() -> None:
    """Each volume may be asked for the files in each lost range."""
    count = 8_000
    volumes = [{"index": i + 1, "start": i * 8192, "size": 8192, "filesystem": "ext4"} for i in range(count)]
    regions: list[dict[str, object]] = [
        {"start": i * 8192, "length": 8192, "map": (reference(0) + b"@hex").decode()} for i in range(count)
    ]
    recipe = [CONFIG, [[b"abc", 4096]], [], [], [snapshot(count * 8192, regions, volumes=volumes)]]
    repository = Repository.open(build(msgspec.msgpack.encode(recipe)).store)
    with limited(20):
        result = verify(repository, VerifyOptions(workers=1), NullJob())
    assert sum(damage.length for damage in result.damaged) == count * 8192


def test_salvage_does_not_look_for_packs_in_holes(tmp_path: Path) -> None:
    path = tmp_path / "torn.ferro"
    store = Container.create(path)
    with create(store) as repository:
        back_up(repository, disk_content(6, 1), "one")
        packs = [entry for entry in store.live() if entry.name.startswith("pack/")]
    with path.open("r+b") as file:
        for entry in packs:  # nothing but the index knows what stood here
            file.seek(entry.offset)
            file.write(bytes(entry.span))
        file.truncate(1 << 32)
    with limited():
        result = salvage(path, lambda _: None, NullJob(), workers=1)
    assert not result.complete


def salvaged(path: Path, memory: int = 500 * MiB) -> SalvageResult:
    with limited(memory=memory):
        return salvage(path, lambda _: None, NullJob(), workers=1)


def with_snapshot(path: Path) -> None:
    with create(Container.create(path)) as repository:
        back_up(repository, disk_content(6, 1), "one")


@pytest.mark.parametrize(("volume", "offset"), [(1 << 63, 0), (0, 1 << 63), (0, -(1 << 63)), (7, 0)])
def test_salvage_drops_what_lies_outside_of_the_files(tmp_path: Path, volume: int, offset: int) -> None:
    path = tmp_path / "far.ferro"
    store = Container.create(path)
    with create(store) as repository:
        back_up(repository, disk_content(6, 1), "one")
        live = store.live()
    data = bytearray(path.read_bytes())
    uuid, added = bytes(data[16:32]), []
    for entry in live:
        far = entry.name.startswith("pack/")
        place = (volume, offset) if far else (entry.volume, entry.offset)
        added.append((entry.name, *place, entry.length, entry.sequence))
        if far:  # only the index, and a catalog that lies, know of it
            data[entry.offset : entry.offset + RecordHeader.SIZE + 4] = bytes(RecordHeader.SIZE + 4)
    for number, length in enumerate((100, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)):
        kinds = ("pack", "index", "snapshot", "key")
        added += [(f"{kind}/{number:032x}", volume, offset, length, 900 + number) for kind in kinds]
    path.write_bytes(data)
    with_catalog(path, msgspec.msgpack.encode([None, added, []]))
    with path.open("ab") as file:
        file.write(RecordHeader.make(Kind.OBJECT, uuid, 2000, (1 << 64) - 1, bytes(16), "pack/" + "a" * 32).pack())
    result = salvaged(path)
    assert len(result.lost_snapshots) == 4
    assert [one.complete for one in result.snapshots] == [True]


def test_packs_that_only_the_index_knows_are_looked_for_all_at_once(tmp_path: Path) -> None:
    """Each of 300 may stand at each of 4,096 blocks."""
    path = tmp_path / "lost.ferro"
    store = Container.create(path)
    with create(store) as repository:
        back_up(repository, disk_content(6, 1), "one")
        packs = [entry for entry in store.live() if entry.name.startswith("pack/")]
        entries = np.zeros(300 * 64, segments.ENTRY)
        entries["id"] = np.frombuffer(np.random.default_rng(1).bytes(len(entries) * 32), "V32")
        entries["pack"], entries["offset"] = np.divmod(np.arange(len(entries)), 64)
        entries["offset"] *= 4000
        entries["length"] = 4000
        name, parts = merging.build_segment(
            entries, [f"pack/{i:032x}" for i in range(300)], repository.sealer, bytes(16)
        )
        store.put(name, parts)
        store.flush()
    data = bytearray(path.read_bytes())
    moved = data[packs[0].offset : packs[0].offset + packs[0].span]
    for entry in packs:
        data[entry.offset : entry.offset + entry.span] = bytes([7]) * entry.span
    data += bytes([7]) * (16 * MiB) + moved  # one of the lost packs, far from where it was
    path.write_bytes(data)
    with limited():
        result = salvage(path, lambda _: None, NullJob(), workers=1)
    assert result.intact > 0


def test_objects_of_holes_are_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "holes.ferro"
    with_snapshot(path)
    uuid, at = path.read_bytes()[16:32], -(-path.stat().st_size // BLOCK) * BLOCK
    names = ["snapshot/" + "ab" * 16, "pack/" + "ab" * 16, "index/" + "ab" * 16, "key/" + "ab" * 16]
    with path.open("r+b") as file:
        for number, name in enumerate(names):
            file.seek(at + number * BLOCK)
            file.write(RecordHeader.make(Kind.OBJECT, uuid, 2000, 3 << 30, bytes(16), name).pack())
        file.truncate(4 << 30)
    result = salvaged(path, 150 * MiB)
    assert len(result.snapshots) == 1
    assert result.snapshots[0].complete


def test_a_catalog_of_a_hole_is_not_read(image: Path) -> None:
    size, length = image.stat().st_size, 250 * MiB
    uuid, digest = image.read_bytes()[16:32], xxhash.xxh3_128()
    for _ in range(length // MiB):
        digest.update(bytes(MiB))
    with image.open("r+b") as file:
        file.seek(-(-size // BLOCK) * BLOCK)
        file.write(RecordHeader.make(Kind.CATALOG, uuid, 1000, length, digest.digest(), "").pack())
        file.truncate(size + length + 2 * BLOCK)
    salvaged(image, 150 * MiB)


def test_a_record_that_stands_thousands_of_times_is_looked_into_a_few_times(tmp_path: Path) -> None:
    """All of one pack, whose table lists 4,000 chunks: as many places each, were every one of them kept."""
    path = tmp_path / "often.ferro"
    store = Container.create(path)
    with create(store) as repository:
        back_up(repository, disk_content(6, 1), "one")
        builder = PackBuilder()
        for number in range(4000):
            builder.add(number.to_bytes(32, "big"), b"")
        name, parts, _ = builder.build(repository.sealer)
        store.put(name, parts)
        store.flush()
        entry = next(entry for entry in store.live() if entry.name == name)
    data = bytearray(path.read_bytes())
    head = bytes(data[entry.offset : entry.offset + RecordHeader.SIZE])
    rest = bytes(data[entry.offset + RecordHeader.SIZE : entry.offset + entry.span])
    data += 4000 * head + rest  # only the last of them is whole
    path.write_bytes(data)
    result = salvaged(path, 150 * MiB)
    assert result.snapshots[0].complete


def test_bytes_that_all_look_like_heads_of_frames_take_little_memory() -> None:
    looks = (b"\1" + bytes(7)) * (MiB // 8)
    data = looks * 24  # what is read at a time
    with limited(memory=100 * MiB):
        assert not list(bare_frames._heads(data, frozenset({4096})))


def test_a_page_that_a_directory_names_often_takes_little_memory(tmp_path: Path) -> None:
    """Two directories that name one page 1,500 times each."""
    path = tmp_path / "few.ferro"
    store = Container.create(path)
    with create(store) as repository:
        back_up(repository, disk_content(6, 1), "one")
        entries = np.zeros(1024, segments.ENTRY)
        entries["id"] = np.frombuffer(np.random.default_rng(1).bytes(len(entries) * 32), "V32")
        page = entries.tobytes()
        page_hash = repository.sealer.object_id("index", page)
        frame = repository.sealer.seal(page_hash, page, compress=False)
        count = 1500
        directory = segments.Directory(
            ["pack/" + "ab" * 16], bytes(8 * count), page_hash * count, [len(frame)] * count
        )
        for number in range(2):
            plain = msgspec.msgpack.encode(directory)
            header = segments.SegmentHeader(b"FIDX", 1, 1024 * count, 0, bytes(15) + bytes([number]), 0)
            segment_id = repository.sealer.object_id("index", header.pack() + plain)
            sealed = segments.seal_long(repository.sealer, segment_id, plain)
            final = segments.SegmentHeader(b"FIDX", 1, 1024 * count, len(sealed), header.salt, 0)
            store.put("index/" + segment_id.hex(), [final.pack(), sealed, *[frame] * count])
        store.flush()
    salvaged(path, 150 * MiB)
