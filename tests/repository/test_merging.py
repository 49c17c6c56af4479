"""Segments made of segments, the cache of their pages, and a writer that keeps little."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from ferrotype.engine import prune as pruning
from ferrotype.engine.forget import forget
from ferrotype.engine.prune import prune
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.errors import WriteError
from ferrotype.job import NullJob
from ferrotype.objects import Streamed
from ferrotype.objects.container import Container
from ferrotype.objects.memory import MemoryStore
from ferrotype.repository import merging, segments, writer
from ferrotype.repository.merging import EntryRun, MergedSegment, SegmentRun, build_segment, renumbered
from ferrotype.repository.sealing import Keys, Sealer
from ferrotype.repository.segments import ENTRY, PAGE_ENTRIES, Entries, PageCache, Segment, keys_of, sorted_entries
from ferrotype.repository.writer import open_writer
from tests.repository.small import add_disk, back_up, changed, contents, create, disk_content, open_at, snapshot_of

SEALERS = [Sealer(Keys.derive(bytes(32), encrypted=encrypted)) for encrypted in (False, True)]
EITHER = pytest.mark.parametrize("sealer", SEALERS, ids=["plain", "encrypted"])
DEEPLY = VerifyOptions(deep=True, workers=1)


def some_entries(count: int, packs: int, seed: int, alike: float = 0.1) -> Entries:
    """Entries of random ids, some of which share their leading eight bytes."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 256, (count, 32), np.uint8)
    same = rng.random(count) < alike
    ids[same, :8] = [1, 2, 3, 4, 5, 6, 7, 0]
    ids[same, 7] = rng.integers(0, 8, int(same.sum()))
    entries = np.zeros(count, ENTRY)
    entries["id"] = np.ascontiguousarray(ids).view("V32").ravel()
    entries["pack"] = rng.integers(0, packs, count)
    entries["offset"], entries["length"] = np.arange(count), rng.integers(1, 1000, count)
    return entries


def named(entries: Entries, packs: list[str]) -> set[tuple[bytes, str, int, int]]:
    rows = zip(*(entries[field].tolist() for field in ("id", "pack", "offset", "length")), strict=True)
    return {(bytes(i), packs[p], o, n) for i, p, o, n in rows}


@EITHER
@pytest.mark.parametrize("window", [1, 3, 64])
def test_a_merged_segment_holds_what_its_runs_hold(
    sealer: Sealer, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_WINDOW", window)
    store = MemoryStore()
    wanted: set[tuple[bytes, str, int, int]] = set()
    opened: list[Segment] = []
    for number, count in enumerate((5000, 1024, 3000, 1)):
        packs = [f"pack/{number}-{n}" for n in range(7)] + ["pack/shared"]
        entries = some_entries(count, len(packs), number)
        wanted |= named(entries, packs)
        name, parts = build_segment(entries, packs, sealer, bytes(16))
        store.put(name, parts)
        opened.append(Segment(store, name, sealer))
    numbers, packs = renumbered(opened)
    fresh = some_entries(2500, 3, 99)
    wanted |= named(fresh, ["x", "y", "z"])
    fresh["pack"] += len(packs)
    runs = [SegmentRun(segment, n) for segment, n in zip(opened, numbers, strict=True)]
    merged = MergedSegment([*runs, EntryRun.of(fresh)], [*packs, "x", "y", "z"], sealer, bytes(16))
    store.put(merged.name, merged.parts())
    assert store.size(merged.name) == merged.length
    segment = Segment(store, merged.name, sealer)
    found = segment.entries()
    assert segment.count == len(found) == len(wanted) == 11525
    assert named(found, segment.packs) == wanted
    keys = keys_of(found["id"])
    assert (keys[1:] >= keys[:-1]).all()
    assert all(len(segment.page(n)) == PAGE_ENTRIES for n in range(segment.page_count - 1))
    for raw, pack, offset, _ in random.Random(1).sample(sorted(wanted), 200):
        location = segment.find(raw)
        assert location is not None
        assert (location.pack, location.offset) == (pack, offset)


@EITHER
def test_only_the_entries_that_are_kept_are_merged(sealer: Sealer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_WINDOW", 2)
    store = MemoryStore()
    entries = sorted_entries(some_entries(9001, 2, 5))
    name, parts = build_segment(entries, ["pack/a", "pack/b"], sealer, bytes(16))
    store.put(name, parts)
    kept = np.random.default_rng(1).random(len(entries)) < 0.3
    run = SegmentRun(Segment(store, name, sealer), np.array([0, 1], np.uint32), np.packbits(kept))
    merged = MergedSegment([run], ["pack/a", "pack/b"], sealer, bytes(16))
    store.put(merged.name, merged.parts())
    assert Segment(store, merged.name, sealer).entries().tobytes() == entries[kept].tobytes()


@EITHER
def test_the_cache_holds_no_more_than_its_room(sealer: Sealer) -> None:
    store, gets = MemoryStore(), 0
    entries = some_entries(20_000, 3, 1, alike=0)
    name, parts = build_segment(entries, ["a", "b", "c"], sealer, bytes(16))
    store.put(name, parts)
    page = PAGE_ENTRIES * ENTRY.itemsize
    segment = Segment(store, name, sealer, PageCache(4 * page))
    whole = MemoryStore.get

    def counted(*args: object, **kwargs: object) -> bytes:
        nonlocal gets
        gets += 1
        return whole(store, *args[1:], **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryStore, "get", counted)
        ids = [raw.tobytes() for raw in segment.page(3)["id"][:50]]
        assert gets == 1
        assert all(segment.find(raw) for raw in ids)
        assert gets == 1
        for number in (4, 5, 6, 7):  # the first one goes
            segment.page(number)
        segment.page(3)
        assert gets == 6


@EITHER
def test_a_new_id_asks_no_page_once_that_has_paid(sealer: Sealer) -> None:
    store = MemoryStore()
    entries = some_entries(20_000, 3, 1)
    name, parts = build_segment(entries, ["a", "b", "c"], sealer, bytes(16))
    store.put(name, parts)
    segment = Segment(store, name, sealer, PageCache(0))
    rng = random.Random(3)
    asked: list[int] = []
    segment_page = Segment._page

    def counted(self: Segment, number: int) -> bytes:
        asked.append(number)
        return segment_page(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segment, "_page", counted)
        assert not any(segment.find(rng.randbytes(32)) for _ in range(100))
        assert len(asked) >= segment.page_count
        asked.clear()
        assert not any(segment.find(rng.randbytes(32)) for _ in range(2000))
        assert len(asked) < 2000 // 5
    for entry in entries[::97]:
        location = segment.find(entry["id"].tobytes())
        assert location is not None
        assert location.offset == entry["offset"]


@pytest.mark.parametrize("seed", range(4))
def test_a_writer_with_many_checkpoints_keeps_little(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints, merges and longer packs at every few chunks."""
    monkeypatch.setattr(writer, "_REMEMBERED", 7)
    monkeypatch.setattr(writer, "_NEWEST", 3)
    monkeypatch.setattr(writer, "_PACKS", 4)
    path = tmp_path / "laptop.ferro"
    repository = create(Container.create(path))
    content, disks = disk_content(150, seed), {}
    for number in range(4):
        disks[f"s{number}"] = content
        with open_writer(repository) as w:
            w.commit(snapshot_of(add_disk(w, repository, content), name=f"s{number}", day=number))
            assert len(w._recent) <= 7
        content = changed(content, seed + number, 0.2)
        counts = [segment.count for segment in repository.index.segments]
        assert counts == sorted(counts, reverse=True)
        assert len(counts) <= 6
        assert sum(counts) == len({e.tobytes() for s in repository.index.segments for e in s.entries()["id"]})
    sizes = [info.size for info in repository.store.list("pack/")]
    assert max(sizes) > 3 * repository.config.pack_size
    assert contents(repository) == disks
    repository.close()
    with open_at(path) as again:
        assert contents(again) == disks
        assert verify(again, DEEPLY, NullJob()).ok


@pytest.mark.parametrize("seed", range(3))
def test_prune_in_parts(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are more chunks than are marked, and more frames than are moved, at a time."""
    for name, value in (("_MARKED", 16), ("_FOLD", 3), ("_MOVED", 5), ("_READ", 8192)):
        monkeypatch.setattr(pruning, name, value)
    repository = create(Container.create(tmp_path / "laptop.ferro"))
    content, alive = disk_content(60, seed), {}
    for number in range(6):
        content = changed(content, seed * 100 + number, 0.3)
        alive[f"s{number}"] = content
        back_up(repository, content, f"s{number}", day=number)
    gone = random.Random(seed).sample(sorted(alive), 3)
    forget(repository, [s for s in repository.snapshots() if s.name in gone])
    done = prune(repository, NullJob())
    assert done.rewritten_packs > 5
    alive = {name: data for name, data in alive.items() if name not in gone}
    assert contents(repository) == alive
    assert verify(repository, DEEPLY, NullJob()).ok
    again = prune(repository, NullJob())
    assert (again.dead_bytes, again.deleted_packs) == (0, 0)
    repository.close()


def test_streamed_parts_are_stored_as_others_are(tmp_path: Path) -> None:
    path = tmp_path / "a.ferro"
    rng = random.Random(1)
    objects = {
        f"pack/{n:032x}": rng.randbytes(length) for n, length in enumerate((0, 1, 3968, 3969, 70_000, 5 << 20))
    }
    with closing(Container.create(path)) as store:
        for name, data in objects.items():
            cuts = sorted(rng.randrange(len(data) + 1) for _ in range(5))
            pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
            store.put(name, Streamed(len(data), lambda pieces=pieces: iter(pieces)))  # type: ignore[misc]
        store.flush()
    with closing(Container.open(path)) as store:
        for name, data in objects.items():
            assert store.get(name) == data
            store.check(name)


def test_streamed_parts_that_fail_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.ferro"

    def half() -> object:
        yield bytes(3 << 20)
        raise WriteError("no more")

    with closing(Container.create(path)) as store:
        store.put("pack/00", [b"first"])
        store.flush()
        size = path.stat().st_size
        with pytest.raises(WriteError, match="no more"):
            store.put("pack/01", Streamed(6 << 20, half))  # type: ignore[arg-type]
        assert path.stat().st_size == size
        store.put("pack/02", [b"second"])
        store.flush()
    with closing(Container.open(path)) as store:
        assert [info.name for info in store.list("pack/")] == ["pack/00", "pack/02"]


def test_a_small_volume_takes_no_segment_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ferro"
    with closing(Container.create(path, split=64 << 20)) as store:
        assert store.traits.max_object < 64 << 20
        repository = create(store)
        monkeypatch.setattr(writer, "_ENTRY_STORED", 1 << 20)  # as if entries were that long
        content = disk_content(60, 1)
        for number in range(3):
            back_up(repository, changed(content, number, 1.0), f"s{number}")
        assert len(repository.index.segments) == 3
        assert segments.PREFIX in repository.index.segments[0].name
