"""Snapshots stand in the order in which they were committed, whatever the clock said."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import msgspec
import pytest

from ferrotype.block.memory import MemoryDisk
from ferrotype.engine import backup as engine_backup
from ferrotype.engine.copy import copy
from ferrotype.engine.forget import KeepRules, forget, judge
from ferrotype.engine.prune import prune
from ferrotype.engine.salvage import salvage
from ferrotype.errors import CorruptObject
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.objects.memory import MemoryStore
from ferrotype.repository.keys import Secret
from ferrotype.repository.snapshots import DiskRecord, Snapshot, decode, encode, ordered
from ferrotype.repository.store import Repository
from ferrotype.units import KiB
from tests.engine.images import back_up, in_memory, opened

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
LONG_AGO = datetime(2019, 1, 1, tzinfo=UTC)

Clock = Callable[[datetime], None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Sets the clock that backups are dated by."""

    def set_to(when: datetime) -> None:
        class Stopped(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
                return when.astimezone(tz)

        monkeypatch.setattr(engine_backup, "datetime", Stopped)

    return set_to


def disk(seed: int) -> MemoryDisk:
    source = MemoryDisk(256 * KiB)
    source.write(0, memoryview(random.Random(seed).randbytes(256 * KiB)))
    return source


def take(repository: Repository, name: str, seed: int = 1) -> NullJob:
    """Back up a disk that is known again by the name ``disk``; the job that heard of it."""
    job = NullJob()
    options = engine_backup.BackupOptions(name=name)
    back_up(repository, disk(seed), options=options, job=job)
    return job


def names(repository: Repository) -> list[str]:
    return [snapshot.name for snapshot in repository.snapshots()]


@pytest.fixture
def set_back(clock: Clock) -> Repository:
    """Three snapshots; the clock stood years back at the second."""
    repository = in_memory()
    for name, when in (("first", NOW), ("second", LONG_AGO), ("third", NOW + timedelta(days=1))):
        clock(when)
        take(repository, name)
    return repository


def test_the_latest_is_the_one_that_was_committed_last(clock: Clock) -> None:
    repository = in_memory()
    clock(NOW)
    assert take(repository, "first").warnings == []
    clock(LONG_AGO)
    told = take(repository, "second").warnings
    assert len(told) == 1
    assert "the clock says 20" in told[0]
    assert names(repository) == ["first", "second"]
    assert repository.snapshot("latest").name == "second"
    assert repository.snapshot("latest~1").name == "first"
    assert [v.snapshot.name for v in judge(repository.snapshots(), KeepRules(last=1)) if v.kept] == ["second"]
    clock(NOW + timedelta(seconds=1))
    assert take(repository, "third").warnings == []  # its parent's time is before its own again
    assert names(repository) == ["first", "second", "third"]


def test_a_clock_that_ran_ahead_once_is_told_once(clock: Clock) -> None:
    repository = in_memory()
    clock(NOW + timedelta(days=9999))
    take(repository, "first")
    told = []
    for day in range(3):
        clock(NOW + timedelta(days=day))
        told.append(len(take(repository, f"day {day}").warnings))
    assert told == [1, 0, 0]
    assert names(repository) == ["first", "day 0", "day 1", "day 2"]


@pytest.mark.parametrize("secret", [None, Secret(b"another one")], ids=["same keys", "other keys"])
def test_copies_keep_the_order(set_back: Repository, secret: Secret | None) -> None:
    target = Repository.create(MemoryStore(), secret) if secret else set_back.twin(MemoryStore())
    known = set_back.snapshots()
    copy(set_back, known[2:], target, NullJob())  # the newest one first
    copy(set_back, known, target, NullJob())
    assert names(target) == ["first", "second", "third"]


def test_two_images_brought_together_stand_as_their_clocks_say(set_back: Repository, clock: Clock) -> None:
    other = in_memory()
    for number, when in enumerate((NOW - timedelta(days=1), NOW + timedelta(hours=1), NOW + timedelta(days=2))):
        clock(when)
        take(other, f"other {number}", seed=9)
    copy(other, other.snapshots(), set_back, NullJob())
    assert names(set_back) == ["other 0", "first", "second", "other 1", "third", "other 2"]
    clock(LONG_AGO)
    take(set_back, "last")
    assert names(set_back)[-1] == "last"


def test_prune_compact_and_salvage_keep_the_order(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "x.ferro"
    Repository.create(Container.create(path), chunk_size=64 * KiB, pack_size=1 << 20).close()
    with opened(path, writable=True) as repository:
        for name, when in (("gone", NOW), ("first", NOW), ("second", LONG_AGO), ("third", LONG_AGO)):
            clock(when)
            take(repository, name, seed=len(name))
        forget(repository, repository.snapshots()[:1])
        prune(repository, NullJob())
        assert isinstance(repository.store, Container)
        repository.store.compact(lambda _: None)
        assert names(repository) == ["first", "second", "third"]
    found = salvage(path, lambda _: None, NullJob(), out=tmp_path / "saved.ferro")
    assert [one.snapshot.name for one in found.snapshots] == ["first", "second", "third"]
    with opened(tmp_path / "saved.ferro") as saved:
        assert names(saved) == ["first", "second", "third"]


# ---------------------------------------------------------------------- snapshots of versions that recorded no order


def old(name: str, when: datetime, parent: str | None = None) -> Snapshot:
    record = DiskRecord(name="sda", size=0, sector_size=512, chunk_size=4096, regions=(), identity="gpt:1")
    return Snapshot(created=when, host="h", name=name, disks=(record,), parent=parent, id=name)


def test_without_a_recorded_order_none_stands_before_its_parent() -> None:
    found = [
        old("c", LONG_AGO + timedelta(days=1), "b"),
        old("a", NOW),
        old("b", LONG_AGO, "a"),
        old("d", NOW + timedelta(days=1), "gone"),
        old("e", NOW - timedelta(days=1)),
    ]
    for _ in range(10):
        random.Random(1).shuffle(found)
        assert [s.name for s in ordered(found)] == ["e", "a", "b", "c", "d"]


def test_a_long_line_of_parents_is_walked_without_depth() -> None:
    found = [old(f"{n:05}", NOW - timedelta(days=n), f"{n - 1:05}") for n in range(3000)]
    assert [s.name for s in ordered(reversed(found))] == [s.name for s in found]


def test_a_record_of_a_version_before_this_one_is_read_and_an_impossible_order_is_damage() -> None:
    snapshot = old("a", NOW)
    data = msgspec.json.decode(encode(snapshot))
    assert decode("snapshot/a", msgspec.json.encode({k: v for k, v in data.items() if k != "order"})).order is None
    with pytest.raises(CorruptObject):
        decode("snapshot/a", msgspec.json.encode(data | {"order": 1 << 80}))


# ---------------------------------------------------------------------- rules


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("berlin")
def test_the_hour_that_the_change_of_summer_time_repeats_is_two_hours() -> None:
    midnight = datetime(2026, 10, 25, 0, 10, tzinfo=UTC)  # 02:10 in summer, and again an hour later
    known = [old(f"{n}", midnight + timedelta(minutes=20 * n)) for n in range(9)]
    kept = [v.snapshot.name for v in judge(known, KeepRules(hourly=3)) if v.kept]
    assert kept == ["2", "5", "8"]


def test_every_rule_keeps_the_newest_commit_and_periods_are_those_of_the_clock() -> None:
    days = [old(f"{n}", NOW + timedelta(days=n)) for n in range(4)]
    back = msgspec.structs.replace(old("back", LONG_AGO), parent="3")
    for rules in (KeepRules(last=1), KeepRules(hourly=1), KeepRules(daily=1), KeepRules(yearly=1)):
        assert [v.snapshot.name for v in judge([*days, back], rules) if v.kept] == ["back"]
    kept = [v.snapshot.name for v in judge([*days, back], KeepRules(daily=3)) if v.kept]
    assert kept == ["2", "3", "back"]
    assert [v.snapshot.name for v in judge([*days, back], KeepRules(yearly=2)) if v.kept] == ["3", "back"]
