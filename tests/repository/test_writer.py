"""Writers, prune and keys: what several checkpoints, sharing snapshots and wrong keys may not break."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest

from ferrotype.engine.forget import KeepRules, forget, judge
from ferrotype.engine.prune import prune
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.errors import Cancelled, InvalidImage, KeyRefused, UsageError
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.objects.memory import MemoryStore
from ferrotype.repository import keys
from ferrotype.repository.keys import Cost, Secret
from ferrotype.repository.merging import build_segment
from ferrotype.repository.segments import ENTRY, Segment
from ferrotype.repository.snapshots import DiskRecord, Snapshot
from ferrotype.repository.store import Repository
from ferrotype.repository.writer import open_writer
from tests.repository.small import (
    CHUNK,
    QUICK,
    SECRET,
    add_disk,
    back_up,
    changed,
    contents,
    create,
    disk_content,
    open_at,
    snapshot_of,
    tiny,
)

DEEPLY = VerifyOptions(deep=True, workers=1)


def test_prune_keeps_packs_that_several_checkpoints_of_a_cut_backup_stored(tmp_path: Path) -> None:
    path = tmp_path / "laptop.ferro"
    create(Container.create(path)).close()
    content = random.Random(1).randbytes(40 * CHUNK)
    with open_at(path, writable=True) as repository, pytest.raises(Cancelled), open_writer(repository) as writer:
        add_disk(writer, repository, content, checkpoint=10)
        raise Cancelled
    with open_at(path, writable=True) as repository:
        back_up(repository, content, "whole")
        prune(repository, NullJob())
        assert contents(repository) == {"whole": content}
        assert verify(repository, DEEPLY, NullJob()).ok


def test_one_repository_takes_several_backups() -> None:
    repository = create(MemoryStore())
    disks = {f"disk {n}": disk_content(12, n) for n in range(5)}
    for day, (name, content) in enumerate(disks.items()):
        back_up(repository, content, name, day=day)
    with open_writer(repository) as writer:
        for name in ("a", "b"):
            disks[name] = disk_content(9, ord(name))
            writer.commit(snapshot_of(add_disk(writer, repository, disks[name]), name=name))
    assert contents(repository) == disks
    assert verify(repository, DEEPLY, NullJob()).ok


@pytest.mark.parametrize("seed", range(6))
def test_prune_keeps_what_is_needed_and_nothing_twice(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "laptop.ferro"
    repository = create(Container.create(path))
    content, alive = disk_content(20, seed), {}
    for number in range(8):
        content = changed(content, rng.random().hex().__hash__(), 0.3)
        alive[f"s{number}"] = content
        back_up(repository, content, f"s{number}", day=number)
    gone = rng.sample(sorted(alive), 5)
    forget(repository, [s for s in repository.snapshots() if s.name in gone])
    alive = {name: data for name, data in alive.items() if name not in gone}
    stored = {info.name for info in repository.store.list("")}
    foreseen = prune(repository, NullJob(), dry_run=True)
    assert {info.name for info in repository.store.list("")} == stored
    done = prune(repository, NullJob())
    assert (done.dead_bytes, done.deleted_packs) == (foreseen.dead_bytes, foreseen.deleted_packs)
    assert contents(repository) == alive
    assert verify(repository, DEEPLY, NullJob()).ok
    again = prune(repository, NullJob())
    assert (again.dead_bytes, again.deleted_packs, again.rewritten_packs) == (0, 0, 0)
    repository.close()
    with open_at(path) as reopened:
        assert contents(reopened) == alive


def test_ids_that_begin_alike_are_told_apart() -> None:
    sealer = create(MemoryStore()).sealer
    rng = random.Random(1)
    ids = [bytes(7) + bytes([n // 500]) + rng.randbytes(24) for n in range(3000)]
    entries = np.zeros(len(ids), ENTRY)
    entries["id"] = np.frombuffer(b"".join(ids), "V32")
    entries["offset"] = np.arange(len(ids))
    name, parts = build_segment(entries, ["pack/one"], sealer, bytes(16))
    store = MemoryStore()
    store.put(name, parts)
    segment = Segment(store, name, sealer)
    for n in range(0, 3000, 37):
        location = segment.find(ids[n])
        assert location is not None
        assert location.offset == n
    found, where = segment.find_many(np.frombuffer(b"".join(ids), "V32"))
    assert sorted(found.tolist()) == list(range(3000))
    assert (where["offset"] == found).all()
    assert segment.find(bytes(8) + bytes(24)) is None


def test_keys_open_and_refuse() -> None:
    store = MemoryStore()
    repository = create(store, SECRET)
    back_up(repository, disk_content(5, 1), "one")
    for wrong in (None, Secret(b"wrong"), Secret(SECRET.value, "keyfile")):
        with pytest.raises(KeyRefused):
            Repository.open(store, wrong)
    slot = repository.add_key(Secret(b"\0\xff" * 500, "keyfile"), "on the stick", QUICK)
    assert contents(tiny(Repository.open(store, Secret(b"\0\xff" * 500, "keyfile"))))["one"] == disk_content(5, 1)
    store.objects["key/00"] = b"damaged"
    assert Repository.open(store, SECRET).snapshots()
    del store.objects["key/00"]
    repository.remove_key(slot.id)
    with pytest.raises(KeyRefused):
        Repository.open(store, Secret(b"\0\xff" * 500, "keyfile"))
    last = keys.decode_slot(next(v for k, v in store.objects.items() if k.startswith("key/")))
    with pytest.raises(UsageError, match="last"):
        repository.remove_key(last.id)
    with pytest.raises(KeyRefused, match="not encrypted"):
        plain = MemoryStore()
        create(plain)
        Repository.open(plain, SECRET)


@pytest.mark.parametrize(
    "cost",
    [Cost(1 << 30, 1, 1), Cost(1 << 16, 1000, 1), Cost(64, 0, 1), Cost(64, 1, 0), Cost(1, 1, 1), Cost(64, 1, -5)],
)
def test_absurd_costs_in_a_slot_are_refused_before_they_are_paid(cost: Cost) -> None:
    slot = msgspec.structs.replace(keys.lock(bytes(32), SECRET, 32 * "0", cost=QUICK), cost=cost)
    with pytest.raises(InvalidImage, match="costs"):
        keys.decode_slot(keys.encode_slot(slot))


NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def taken(hours: int, identity: str = "a", *tags: str) -> Snapshot:
    disk = DiskRecord(name="sda", size=0, sector_size=512, chunk_size=4096, regions=(), identity=identity)
    when = NOON - timedelta(hours=hours)
    return Snapshot(created=when, host="h", name=str(hours), disks=(disk,), tags=tags, id=f"{identity}{hours}")


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (KeepRules(last=2), {0, 1}),
        (KeepRules(hourly=3), {0, 1, 5}),
        (KeepRules(daily=2), {0, 24}),
        (KeepRules(daily=2, last=1, tags=("keep",)), {0, 24, 2000}),
        (KeepRules(weekly=2), {0, 24 * 8}),
        (KeepRules(yearly=9), {0, 2000}),
    ],
)
def test_rules_keep_the_newest_of_each_period(
    rules: KeepRules, kept: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    known = [taken(hours) for hours in (0, 1, 5, 24, 30, 24 * 8)] + [taken(2000, "a", "keep")]
    assert {int(v.snapshot.name) for v in judge(known, rules) if v.kept} == kept


def test_disks_are_judged_apart_and_no_rule_is_refused() -> None:
    known = [taken(0), taken(1), taken(500, "b")]
    assert {v.snapshot.id for v in judge(known, KeepRules(last=1)) if v.kept} == {"a0", "b500"}
    with pytest.raises(UsageError):
        judge(known, KeepRules())
