"""One flip in each field of each structure of an image that has all of them.

Maps of three levels, an index of several pages with a directory in pieces, many packs, a chain of catalogs, volumes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from ferrotype.block import read
from ferrotype.engine.verify import verify
from ferrotype.errors import FerrotypeError
from ferrotype.extents import State
from ferrotype.job import NullJob
from ferrotype.objects import container as container_module
from ferrotype.objects.container import Container
from ferrotype.objects.layout import ANCHORS_AT, Anchor, CatalogEntry, RecordHeader, VolumeHeader
from ferrotype.objects.volumes import volume_path
from ferrotype.records import Record
from ferrotype.repository import segments as segments_module
from ferrotype.repository.chunkmap import MapBuilder, levels_for
from ferrotype.repository.packs import PackHeader
from ferrotype.repository.segments import SegmentHeader
from ferrotype.repository.snapshots import DiskRecord, Region
from ferrotype.repository.source import SnapshotSource
from ferrotype.repository.store import Repository
from ferrotype.repository.writer import open_writer
from tests.repository.small import CHUNK, back_up, create, open_at, snapshot_of
from tests.rot.small_image import EXHAUSTIVE, QUICK, SECOND, SECRETS, sequential

CELLS = 1024 * 1024 + 5000  # of one chunk: a map with two levels above the bottom
USED = 1100  # of them: more than a page of the index holds


@dataclass(frozen=True)
class Place:
    """A field: what it is, in which volume, where, how long."""

    what: str
    volume: int
    offset: int
    length: int


@dataclass(frozen=True)
class Large:
    path: Path
    secret_name: str
    places: tuple[Place, ...]
    cells: dict[int, bytes]  # some of the content of the large disk; verify looks at all


def content_of(cell: int) -> bytes:
    return struct.pack("<Q", cell) * (CHUNK // 8)


@pytest.fixture(scope="module", params=list(SECRETS))
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Large]:
    path = tmp_path_factory.mktemp("large") / "image.ferro"
    cells = sorted({0, 1, 5, CELLS - 1, CELLS - 4000, *range(2000, 2000 + USED)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(container_module, "_LEAST_SPLIT", 1 << 16)
        patch.setattr(segments_module, "_PIECE", 100)
        store = Container.create(path, split=260 << 10)
        repository = create(store, SECRETS[request.param])
        with open_writer(repository) as writer:
            builder = MapBuilder(CELLS, writer.add_plain)
            for number, cell in enumerate(cells):
                plain = content_of(cell)
                chunk_id = repository.sealer.id_of(plain)
                writer.add(chunk_id, repository.sealer.seal(chunk_id, plain))
                builder.put(cell, chunk_id)
                if number % 150 == 149:
                    writer.checkpoint()
            root = builder.finish().hex()
            disk = DiskRecord(
                name="large", size=CELLS * CHUNK, sector_size=512, chunk_size=CHUNK,
                regions=(Region(0, CELLS * CHUNK, root),),
            )  # fmt: skip
            writer.commit(snapshot_of(disk, name="large"))
        back_up(repository, SECOND, "second", day=1)
        assert levels_for(CELLS) == 2
        places = tuple(all_places(repository, store))
        repository.close()
    some = cells if EXHAUSTIVE else [cell for cell in cells if not 2000 < cell < CELLS - 5000 or cell % 180 == 0]
    yield Large(path, request.param, places, {cell: content_of(cell) for cell in some})
    for file in path.parent.iterdir():
        file.unlink()


# ---------------------------------------------------------------------- where the fields are


def all_places(repository: Repository, store: Container) -> Iterator[Place]:
    for volume in range(len(store.volume_sizes())):
        yield from fields(VolumeHeader, f"volume header {volume}", volume, 0)
    for at in ANCHORS_AT:
        yield from fields(Anchor, "anchor", 0, at)
    chain = store.catalogs()
    assert len(chain) > 6
    for number, entry in enumerate(chain):
        if number in (0, 1, len(chain) // 2, len(chain) - 1):
            yield from fields(RecordHeader, f"catalog {number}", entry.volume, entry.offset)
            yield from spread(f"catalog {number}", entry, 0, entry.length, 9)
    seen: dict[str, int] = {}
    for entry in store.live():
        kind = entry.name.split("/")[0]
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= 2:
            yield from fields(RecordHeader, kind, entry.volume, entry.offset)
            yield from inside(kind, entry, repository)
    assert set(seen) >= {"config", "pack", "index", "snapshot"}
    yield from map_pages(repository, {entry.name: entry for entry in store.live()})


def fields(record: type[Record], what: str, volume: int, offset: int) -> Iterator[Place]:
    """Every field of a structure."""
    hints = get_type_hints(record, include_extras=True)
    for name in record._names:
        length = struct.calcsize("<" + get_args(hints[name])[1])
        yield Place(f"{what}.{name}", volume, offset, length)
        offset += length


def spread(what: str, entry: CatalogEntry, low: int, high: int, count: int) -> Iterator[Place]:
    """Single bytes of a stretch of a payload, its ends among them."""
    for i in range(count):
        at = low + (high - low - 1) * i // (count - 1)
        yield Place(f"{what}[{at}]", entry.volume, entry.offset + RecordHeader.SIZE + at, 1)


def frame(what: str, entry: CatalogEntry, at: int, length: int, repository: Repository) -> Iterator[Place]:
    """The fields of a sealed frame: its head, its nonce and tag where it is encrypted, its payload."""
    base = entry.offset + RecordHeader.SIZE + at
    for name, offset, size in (("codec", 0, 1), ("flags", 1, 1), ("reserved", 2, 2), ("length", 4, 4)):
        yield Place(f"{what}.{name}", entry.volume, base + offset, size)
    if repository.sealer.encrypted:
        yield Place(f"{what}.nonce", entry.volume, base + 8, 12)
        yield Place(f"{what}.tag", entry.volume, base + length - 16, 16)
    yield from spread(f"{what}.payload", entry, at + repository.sealer.overhead - 1, at + length, 3)


def inside(kind: str, entry: CatalogEntry, repository: Repository) -> Iterator[Place]:
    """The fields of an object."""
    base = entry.offset + RecordHeader.SIZE
    if kind == "pack":
        yield from fields(PackHeader, "pack", entry.volume, base)
        table = repository.pack_table(entry.name)
        first = int(table.offsets[0])
        yield from frame("pack table", entry, PackHeader.SIZE, first - PackHeader.SIZE, repository)
        for i in (0, len(table) - 1):
            yield from frame("chunk", entry, int(table.offsets[i]), int(table.lengths[i]), repository)
    elif kind == "index":
        yield from fields(SegmentHeader, "segment", entry.volume, base)
        yield from index_parts(entry, repository)
    elif kind == "snapshot":
        yield from frame("snapshot", entry, 0, entry.length, repository)
    else:
        yield from spread(kind, entry, 0, entry.length, 12)


def index_parts(entry: CatalogEntry, repository: Repository) -> Iterator[Place]:
    """The pieces of a segment's directory, and its pages."""
    head = SegmentHeader.unpack(repository.store.get(entry.name, 0, SegmentHeader.SIZE))
    at, end, pieces = SegmentHeader.SIZE, SegmentHeader.SIZE + head.directory_length, 0
    while at < end:
        length = int.from_bytes(repository.store.get(entry.name, at, 4), "little")
        if pieces < 3:
            yield Place("directory piece.length", entry.volume, entry.offset + RecordHeader.SIZE + at, 4)
            yield from frame("directory piece", entry, at + 4, length, repository)
        at, pieces = at + 4 + length, pieces + 1
    (segment,) = [s for s in repository.index.segments if s.name == entry.name]
    assert pieces > 2 or segment.page_count == 1
    for number in range(segment.page_count):
        at, length = int(segment._offsets[number]), int(segment._lengths[number])
        yield from frame(f"index page {number}", entry, at, length, repository)


def map_pages(repository: Repository, entries: dict[str, CatalogEntry]) -> Iterator[Place]:
    """A page of the map at each level."""
    disk = repository.snapshot("large").disk()
    levels = set()
    for page in repository.map(disk, disk.regions[0]).walk(lambda _: False):
        if page.level not in levels:
            levels.add(page.level)
            where = repository.locate(page.page_id)
            yield from frame(
                f"map page of level {page.level}", entries[where.pack], where.offset, where.length, repository
            )
    assert levels == {0, 1, 2}


# ---------------------------------------------------------------------- what a flip does


def flip(image: Path, place: Place) -> None:
    with volume_path(image, place.volume).open("r+b") as file:
        file.seek(place.offset + place.length // 2)
        old = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([old[0] ^ 0x10]))


def outcome(large: Large) -> str:
    """Like that of a small image; of the large disk what can be read must be right."""
    try:
        with open_at(large.path, SECRETS[large.secret_name]) as repository, sequential():
            repository.warnings += getattr(repository.store, "warnings", [])
            found = {snapshot.name: snapshot for snapshot in repository.snapshots()}
            lost = len({"large", "second"} - set(found))
            for name, snapshot in found.items():
                disk = snapshot.disk()
                source = SnapshotSource(repository, disk)
                wanted = large.cells if name == "large" else cells_of(SECOND)
                for cell, content in wanted.items():
                    try:
                        assert read(source, cell * CHUNK, CHUNK) == content, "wrong bytes came out"
                    except FerrotypeError:
                        lost += 1
            result = verify(repository, QUICK, NullJob())
    except FerrotypeError:
        return "refused"
    if result.ok:
        assert not lost, "verify says it is whole, and it is not"
        return "ok"
    return "told"


def cells_of(content: bytes) -> dict[int, bytes]:
    return {at // CHUNK: content[at : at + CHUNK] for at in range(0, len(content), CHUNK)}


def test_a_flip_in_any_field_is_told(large: Large) -> None:
    assert outcome(large) == "ok"
    assert len({place.what for place in large.places}) > 100
    assert {place.volume for place in large.places} >= {0, 1}
    for place in large.places:
        flip(large.path, place)
        said = outcome(large)
        flip(large.path, place)
        assert said != "ok", place
    assert outcome(large) == "ok"
    print(f"{len(large.places)} flips, one in each field, all told")  # noqa: T201


def test_a_large_sparse_disk_is_known_by_its_extents(large: Large) -> None:
    with open_at(large.path, SECRETS[large.secret_name]) as repository:
        disk = repository.snapshot("large").disk()
        extents = SnapshotSource(repository, disk).extents(0, disk.size)
        assert disk.size - extents.total(State.ZERO) == (USED + 5) * CHUNK
