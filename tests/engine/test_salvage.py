"""Salvage: whatever part of a small image is lost, what is left is found, and what is not is told to the byte.

The truth is worked out from the undamaged image and the place of the damage: which frames lie wholly outside it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from ferrotype.engine.salvage import SalvageResult, salvage
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.errors import DeviceError, InvalidImage, KeyRefused, Refused, StoreError, UsageError
from ferrotype.job import NullJob
from ferrotype.objects import container
from ferrotype.objects.container import Container
from ferrotype.objects.layout import BLOCK, RecordHeader, decode_catalog
from ferrotype.objects.volumes import PosixFile, volume_path
from ferrotype.repository.keys import Secret
from ferrotype.repository.packs import PackHeader
from ferrotype.repository.sealing import ZERO_ID
from ferrotype.repository.snapshots import Snapshot
from ferrotype.repository.store import Repository
from tests.repository.small import CHUNK, SECRET, back_up, create, disk_content, open_at, restored

Span = tuple[int, int]  # start, end; bytes
DEEPLY = VerifyOptions(deep=True, workers=1)


# ---------------------------------------------------------------------- the image, and the truth about it


@dataclass(frozen=True)
class Frame:
    """A stored chunk: where its frame stands, and its pack."""

    span: Span
    pack: str


@dataclass
class Specimen:
    """An image that is damaged again and again, and all that is known of it."""

    path: Path
    secret: Secret | None
    whole: bytes
    contents: dict[str, bytes]  # of each snapshot's disk, by id
    snapshots: list[Snapshot]
    frames: dict[bytes, Frame]
    maps: dict[str, list[tuple[bytes, int, int, list[bytes]]]]  # snapshot -> (page, first cell, cells, ids or none)
    headers: dict[str, Span] = field(default_factory=dict)
    payloads: dict[str, Span] = field(default_factory=dict)
    tables: dict[str, Span] = field(default_factory=dict)
    catalogs: list[tuple[Span, set[str]]] = field(default_factory=list)

    def named(self, kind: str) -> list[str]:
        return sorted(name for name in self.headers if name.split("/")[0] == kind)

    def regions(self) -> dict[str, Span]:
        """Every kind of structure, each on its own."""
        out = {"volume header": (0, 80), "anchor A": (4096, 4176), "anchor B": (8192, 8272), "head": (0, 3 * BLOCK)}
        for number, (span, _) in enumerate(self.catalogs):
            out[f"catalog {number}"] = span
        for name, span in self.headers.items():
            out[f"header of {name}"] = span
            out[f"payload of {name}"] = self.payloads[name]
            out[f"record of {name}"] = (span[0], self.payloads[name][1])
        for name, span in self.tables.items():
            out[f"table of {name}"] = span
            out[f"header and table of {name}"] = (self.headers[name][0], span[1])
            out[f"frames of {name}"] = (span[1], self.payloads[name][1])
        half = len(self.whole) // 2
        out |= {"first half": (0, half), "last half": (half, len(self.whole))}
        out |= {"all catalogs": (0, 0), "all indexes": (0, 0), "all indexes and catalogs": (0, 0)}
        return out

    def spans(self, region: str, span: Span) -> list[Span]:
        indexes = [(self.headers[n][0], self.payloads[n][1]) for n in self.named("index")]
        catalogs = [s for s, _ in self.catalogs]
        several = {"all catalogs": catalogs, "all indexes": indexes, "all indexes and catalogs": indexes + catalogs}
        return several.get(region, [span])


def specimen(folder: Path, secret: Secret | None) -> Specimen:
    """Two snapshots of a disk of 1,100 cells, so that its map has two levels; in the clear or not."""
    path = folder / "laptop.ferro"
    store = Container.create(path)
    repository = create(store, secret)
    first = disk_content(24, 1) + bytes(1030 * CHUNK) + disk_content(46, 2)
    second = bytearray(first)
    rng = random.Random(3)
    for cell in (2, 7, 23, 1060, 1090):
        second[cell * CHUNK : (cell + 1) * CHUNK] = rng.randbytes(CHUNK)
    one = back_up(repository, first, "one")
    two = back_up(repository, bytes(second), "two", day=1)
    out = Specimen(path, secret, b"", {one.id: first, two.id: bytes(second)}, [one, two], {}, {})
    for entry in store.live():
        start = entry.offset + RecordHeader.SIZE
        out.headers[entry.name] = (entry.offset, start)
        out.payloads[entry.name] = (start, start + entry.length)
    for entry in store.catalogs():
        added = {e.name for e in decode_catalog(store._log.records.payload(entry, 0, entry.length)).added}
        out.catalogs.append(((entry.offset, entry.offset + RecordHeader.SIZE + entry.length), added))
    for pack in repository.packs():
        table = repository.pack_table(pack)
        base = out.payloads[pack][0]
        out.tables[pack] = (base, base + int(table.offsets[0]))
        assert int(table.offsets[0]) > PackHeader.SIZE
        for number in range(len(table)):
            at = base + int(table.offsets[number])
            out.frames[bytes(table.id(number))] = Frame((at, at + int(table.lengths[number])), pack)
    for snapshot in (one, two):
        disk = snapshot.disk()
        out.maps[snapshot.id] = [
            (bytes(page.page_id), page.first, page.count, ids_of(page.ids) if page.level == 0 else [])
            for page in repository.map(disk, disk.regions[0]).walk(lambda _: False)
        ]
        assert len(out.maps[snapshot.id]) == 3
    repository.close()
    out.whole = path.read_bytes()
    return out


def ids_of(ids: np.ndarray[tuple[int], np.dtype[np.void]] | None) -> list[bytes]:
    return [] if ids is None else [i.tobytes() for i in ids]


@dataclass(frozen=True)
class Truth:
    """What salvage must say of a damage; where two bounds differ, either is right."""

    opens: bool
    snapshots: set[str]
    lost_snapshots: set[str]
    least: dict[str, list[Span]]  # ranges that cannot be found whatever one does
    most: dict[str, list[Span]]  # ranges that somebody may give up
    intact: set[bytes]


def truth(image: Specimen, lost: Sequence[Span]) -> Truth:
    def intact(span: Span) -> bool:
        return not any(span[0] < end and span[1] > start for start, end in lost)

    def whole(name: str) -> bool:
        return intact((image.headers[name][0], image.payloads[name][1]))

    listed = {name for span, names in image.catalogs if intact(span) for name in names}

    def readable(name: str) -> bool:
        return intact(image.payloads[name]) and (intact(image.headers[name]) or name in listed)

    spare = any(whole(name) for name in image.named("spare"))
    opens = spare or all(readable(name) for name in ["config", *image.named("key")])
    if image.secret and any(readable(name) for name in image.named("key")):
        opens = True  # the configuration says nothing that is needed then
    indexed = any(readable(name) for name in image.named("index"))
    snapshots = {name for name in image.named("snapshot") if readable(name)}
    known = {name for name in image.named("snapshot") if name in listed or intact(image.headers[name])}

    there = {chunk_id for chunk_id, frame in image.frames.items() if intact(frame.span)}
    found = set()
    for chunk_id in there:
        frame = image.frames[chunk_id]
        named = intact(image.headers[frame.pack]) or frame.pack in listed or indexed
        if image.secret is None or indexed or (intact(image.tables[frame.pack]) and named):
            found.add(chunk_id)

    ids = {name.removeprefix("snapshot/") for name in snapshots}
    return Truth(
        opens,
        ids,
        {name.removeprefix("snapshot/") for name in known - snapshots},
        {snapshot: lost_ranges(image, snapshot, there) for snapshot in ids},
        {snapshot: lost_ranges(image, snapshot, found) for snapshot in ids},
        there,
    )


def lost_ranges(image: Specimen, snapshot: str, found: set[bytes]) -> list[Span]:
    cells: set[int] = set()
    gone: list[Span] = []
    for page, first, count, ids in image.maps[snapshot]:
        if any(low <= first and first + count <= high for low, high in gone):
            continue
        if page not in found:
            gone.append((first, first + count))
            cells.update(range(first, first + count))
        cells.update(first + slot for slot, i in enumerate(ids[:count]) if i != ZERO_ID and i not in found)
    out: list[Span] = []
    for cell in sorted(cells):
        if out and out[-1][1] == cell * CHUNK:
            out[-1] = (out[-1][0], (cell + 1) * CHUNK)
        else:
            out.append((cell * CHUNK, (cell + 1) * CHUNK))
    return out


# ---------------------------------------------------------------------- damages


def overwritten(image: Specimen, spans: Sequence[Span], filling: bytes | None = None) -> bytes:
    data = bytearray(image.whole)
    for start, end in spans:
        length = min(end, len(data)) - start
        fill = random.Random(start).randbytes(length) if filling is None else filling * length
        data[start : start + length] = fill
    return bytes(data)


def cut_out(image: Specimen, spans: Sequence[Span]) -> bytes:
    data = bytearray(image.whole)
    for start, end in sorted(spans, reverse=True):
        del data[start:end]
    return bytes(data)


def look(image: Specimen, data: bytes, out: Path | None = None) -> SalvageResult | None:
    """What salvage says of the image with these bytes; None where it refuses."""
    image.path.write_bytes(data)
    before = image.path.stat().st_mtime_ns
    try:
        return salvage(image.path, lambda _: image.secret, NullJob(), out=out, workers=1)
    except InvalidImage:
        return None
    finally:
        assert image.path.read_bytes() == data
        assert image.path.stat().st_mtime_ns == before


def told(result: SalvageResult, snapshot: str) -> list[Span]:
    (one,) = [one for one in result.snapshots if one.snapshot.id == snapshot]
    return [(d.start, d.start + d.length) for d in one.lost]


def covers(larger: Sequence[Span], smaller: Sequence[Span]) -> bool:
    return all(any(low <= start and end <= high for low, high in larger) for start, end in smaller)


def compare(image: Specimen, what: str, lost: Sequence[Span], data: bytes) -> bool:
    """Whether the truth left no doubt; fails where salvage says anything else."""
    expected, result = truth(image, lost), look(image, data)
    if not expected.opens:
        assert result is None, what
        return True
    assert result is not None, what
    assert {one.snapshot.id for one in result.snapshots} == expected.snapshots, what
    assert set(result.lost_snapshots) == expected.lost_snapshots, what
    for snapshot in expected.snapshots:
        ranges = told(result, snapshot)
        assert covers(ranges, expected.least[snapshot]), what
        assert covers(expected.most[snapshot], ranges), what
    if expected.least != expected.most:
        return False
    for snapshot in expected.snapshots:
        assert told(result, snapshot) == expected.least[snapshot], what
    if len(expected.snapshots) == 2 and not any(expected.least.values()):
        assert (result.intact, result.damaged, result.missing) == (len(image.frames), 0, 0), what
    return True


@pytest.fixture(params=[None, SECRET], ids=["plain", "encrypted"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Specimen:
    return specimen(tmp_path, request.param)


def windows(size: int, count: int) -> Iterator[Span]:
    """Windows of an eighth of the file, sliding over it; not on the grid of blocks."""
    width = size // 8
    for number in range(count):
        start = (size - width) * number // (count - 1)
        yield start, start + width


# ---------------------------------------------------------------------- what is left is found


def test_an_undamaged_image_is_complete(image: Specimen) -> None:
    result = look(image, image.whole)
    assert result is not None
    assert result.complete
    assert not result.problems
    assert (result.intact, result.damaged, result.missing, result.unused) == (len(image.frames), 0, 0, 0)


def test_any_region_may_be_lost(image: Specimen) -> None:
    sure = 0
    regions = image.regions()
    for what, span in regions.items():
        spans = image.spans(what, span)
        sure += compare(image, f"{what} overwritten", spans, overwritten(image, spans))
        sure += compare(image, f"{what} cut out", spans, cut_out(image, spans))
    assert sure == 2 * len(regions) if image.secret is None else sure > 1.8 * len(regions)


def test_any_block_may_be_lost(image: Specimen) -> None:
    for start in range(0, len(image.whole), BLOCK):
        span = (start, start + BLOCK)
        assert compare(image, f"block at {start} zeroed", [span], overwritten(image, [span], b"\0"))


def test_any_eighth_may_be_lost(image: Specimen) -> None:
    sure = total = 0
    for span in windows(len(image.whole), 41):
        sure += compare(image, f"{span} overwritten", [span], overwritten(image, [span]))
        sure += compare(image, f"{span} cut out", [span], cut_out(image, [span]))
        total += 2
    assert sure == total if image.secret is None else sure > 0.7 * total


def test_any_eighth_may_be_lost_with_all_that_tells_where_things_are(image: Specimen) -> None:
    """Without catalogs, and in an image whose chunks say what they are without the index too."""
    told_by = image.spans("all catalogs" if image.secret else "all indexes and catalogs", (0, 0))
    blank = overwritten(image, told_by, b"\0")
    sure = total = 0
    small = [(start, start + 700) for start in range(20_000, len(image.whole) - 700, 9001)]
    for span in (*windows(len(image.whole), 23), *small):
        what = f"{span} cut out and {len(told_by)} records lost"
        sure += compare(image, what, [*told_by, span], blank[: span[0]] + blank[span[1] :])
        total += 1
    assert sure == total if image.secret is None else sure > 0.7 * total


def test_a_pack_without_a_header_is_known_by_its_table(image: Specimen) -> None:
    """Its name stands in the directory of an index of which the pages are lost, and nowhere else."""
    lost = image.spans("all catalogs", (0, 0))
    lost += [image.headers[name] for name in image.named("pack")]
    lost += [(image.payloads[name][1] - 40, image.payloads[name][1]) for name in image.named("index")]
    result = look(image, overwritten(image, lost))
    assert result is not None
    assert result.complete
    assert (result.intact, result.unused) == (len(image.frames), 0)


def test_the_file_may_be_cut_short_anywhere(image: Specimen) -> None:
    sure = total = 0
    for size in range(1000, len(image.whole), 7001):
        span = (size, len(image.whole))
        sure += compare(image, f"cut at {size}", [span], image.whole[:size])
        total += 1
    assert sure == total if image.secret is None else sure > 0.3 * total


def test_a_few_bytes_may_be_missing_anywhere(image: Specimen) -> None:
    rng = random.Random(5)
    for start in rng.sample(range(len(image.whole) - 5000), 40):
        span = (start, start + rng.randrange(1, 5000))
        compare(image, f"{span} cut out", [span], cut_out(image, [span]))


def test_nothing_at_all_is_left(image: Specimen) -> None:
    for data in (b"", bytes(100_000), random.Random(1).randbytes(100_000)):
        assert look(image, data) is None


# ---------------------------------------------------------------------- a new image


def test_a_new_image_holds_what_is_left(image: Specimen, tmp_path: Path) -> None:
    names = [n for n in image.regions() if n.split()[0] in ("frames", "all", "first", "last", "head")]
    names = names[:1] + names[-7:]
    names += [f"record of {name}" for name in ("config", *image.named("key"), *image.named("snapshot"))]
    for number, what in enumerate(names):
        spans = image.spans(what, image.regions()[what])
        expected = truth(image, spans)
        out = tmp_path / f"{number}.ferro"
        result = look(image, overwritten(image, spans), out)
        if not expected.opens:
            assert result is None
            assert not out.exists(), what
            continue
        assert result is not None
        with open_at(out, image.secret) as repository:
            check_new(image, result, repository, what)


def check_new(image: Specimen, result: SalvageResult, repository: Repository, what: str) -> None:
    """The new image is sound, and gives back everything but the ranges that were told."""
    found = verify(repository, DEEPLY, NullJob())
    assert found.ok, (what, found.problems)
    fresh = {snapshot.name: snapshot for snapshot in repository.snapshots()}
    assert set(fresh) == {one.snapshot.name for one in result.snapshots}, what
    for one in result.snapshots:
        new = fresh[one.snapshot.name]
        content = bytearray(image.contents[one.snapshot.id])
        for lost in one.lost:
            content[lost.start : lost.start + lost.length] = bytes(lost.length)
        assert restored(repository, new) == content, what
        if one.complete:
            assert new.id == one.snapshot.id
            assert not new.tags
        else:
            assert new.tags == ("salvaged",)
            assert new.disk().unreadable == tuple((d.start, d.length) for d in one.lost)


def test_the_new_image_never_takes_the_place_of_a_file(image: Specimen, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"mine")
    for out in (other, image.path, volume_path(image.path, 0)):
        with pytest.raises(Refused):
            salvage(image.path, lambda _: image.secret, NullJob(), out=out)
    assert other.read_bytes() == b"mine"
    assert image.path.read_bytes() == image.whole


def test_a_forgotten_snapshot_stays_forgotten(image: Specimen, tmp_path: Path) -> None:
    store = Container.open(image.path, writable=True)
    store.delete(f"snapshot/{image.snapshots[0].id}")
    store.flush()
    store.close()
    result = look(image, image.path.read_bytes()[:-1] + b"\1")
    assert result is not None
    assert [one.snapshot.id for one in result.snapshots] == [image.snapshots[1].id]


# ---------------------------------------------------------------------- keys, volumes, devices


def test_a_wrong_key_is_refused(image: Specimen) -> None:
    if image.secret is None:
        with pytest.raises(KeyRefused):
            salvage(image.path, lambda _: SECRET, NullJob(), secret_given=True)
        return
    for secret in (Secret(b"wrong"), None):
        with pytest.raises(KeyRefused):
            salvage(image.path, lambda _, secret=secret: secret, NullJob())  # type: ignore[misc]


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, bytes, Snapshot, list[Path]]:
    """An image of several volumes, and what is in it."""
    monkeypatch.setattr(container, "_LEAST_SPLIT", 1)
    path = tmp_path / "split.ferro"
    store = Container.create(path, split=36_000)
    repository = create(store, SECRET)
    content = disk_content(40, 4)
    snapshot = back_up(repository, content, "one")
    repository.close()
    files = [volume_path(path, number) for number in range(100)]
    return path, content, snapshot, [file for file in files if file.exists()]


def test_any_volume_may_be_named_and_any_may_be_missing(
    volumes: tuple[Path, bytes, Snapshot, list[Path]], tmp_path: Path
) -> None:
    path, content, snapshot, files = volumes
    assert len(files) > 3
    whole = {file: file.read_bytes() for file in files}
    seen = 0
    for gone in files:
        gone.unlink()
        for named in (path, files[1] if gone != files[1] else files[2]):
            result = salvage(named, lambda _: SECRET, NullJob(), workers=1)
            assert any(f"{gone.name} is missing" in p or gone == files[-1] for p in result.problems), result.problems
            assert [one.snapshot for one in result.snapshots] in ([], [snapshot])
            seen += len(result.snapshots)
        out = tmp_path / "out.ferro"
        result = salvage(files[2] if gone != files[2] else files[1], lambda _: SECRET, NullJob(), out=out)
        for one in result.snapshots:
            expected = bytearray(content)
            for lost in one.lost:
                expected[lost.start : lost.start + lost.length] = bytes(lost.length)
            with open_at(out, SECRET) as repository:
                assert restored(repository, repository.snapshot("one")) == expected
        out.unlink()
        gone.write_bytes(whole[gone])
    assert seen >= 2 * len(files) - 4
    with pytest.raises(UsageError):
        salvage(tmp_path / "nothing.ferro", lambda _: None, NullJob())
    assert {file: file.read_bytes() for file in files} == whole


def test_sectors_that_cannot_be_read_are_like_lost_ones(image: Specimen, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = 0
    plain_read = PosixFile.read

    def read(self: PosixFile, offset: int, length: int, /) -> bytes:
        if offset < bad + BLOCK and offset + length > bad:
            raise DeviceError("a bad sector")
        return plain_read(self, offset, length)

    monkeypatch.setattr(PosixFile, "read", read)
    for bad in range(0, len(image.whole), 3 * BLOCK):
        result = look(image, image.whole)
        assert result is not None
        expected = truth(image, [(bad, bad + BLOCK)])
        for snapshot in expected.snapshots:
            assert told(result, snapshot) == expected.least[snapshot], bad
        assert any("cannot be read" in problem for problem in result.problems)


def test_a_damaged_image_is_never_written_into(image: Specimen) -> None:
    from ferrotype.engine.salvage import opened

    with opened(image.path, lambda _: image.secret, NullJob()) as (repository, _):
        with pytest.raises(StoreError):
            repository.store.put("pack/0", [b""])
        with pytest.raises(StoreError):
            repository.store.delete("config")
