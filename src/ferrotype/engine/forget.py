"""Forget snapshots by rule.  A rule keeps the newest snapshot of each of the newest periods that have one.

What is newer is the order of the commits (``repository.snapshots.ordered``), whatever the clock said; which hour or
day a snapshot belongs to is the clock's.  So every rule keeps the newest one, were it taken in a year long past.

Snapshots of different disks are judged apart, so that a rare backup of one disk does not fall victim to the daily one
of another.  What no rule keeps is forgotten; without any rule nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from ferrotype.engine.same_disks import together
from ferrotype.errors import UsageError
from ferrotype.repository.snapshots import PREFIX, Snapshot, ordered
from ferrotype.repository.store import Repository


@dataclass(frozen=True, slots=True)
class KeepRules:
    """How many to keep of each kind; 0 means the rule is not used."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    tags: tuple[str, ...] = ()

    @property
    def given(self) -> bool:
        return bool(self.last or self.hourly or self.daily or self.weekly or self.monthly or self.yearly or self.tags)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a snapshot; ``reasons`` name the rules that keep it."""

    snapshot: Snapshot
    reasons: tuple[str, ...]

    @property
    def kept(self) -> bool:
        return bool(self.reasons)


def _week(when: datetime) -> tuple[int, int]:
    year, week, _ = when.isocalendar()
    return year, week


_PERIODS: Final[tuple[tuple[str, Callable[[datetime], object]], ...]] = (
    ("hourly", lambda when: (when.date(), when.hour, when.utcoffset())),  # an hour that summer time repeats is two
    ("daily", lambda when: when.date()),
    ("weekly", _week),
    ("monthly", lambda when: (when.year, when.month)),
    ("yearly", lambda when: when.year),
)


def judge(known: Sequence[Snapshot], rules: KeepRules) -> list[Verdict]:
    """A verdict for each snapshot, oldest first.  Periods are those of this machine's local time."""
    if not rules.given:
        raise UsageError("give at least one rule, such as --keep-daily 7; without one everything would be forgotten")
    known = ordered(known)
    reasons: dict[str, list[str]] = {snapshot.id: [] for snapshot in known}
    for group in together(known):
        newest_first = group.snapshots[::-1]
        for snapshot in newest_first[: rules.last]:
            reasons[snapshot.id].append("last")
        for rule, period_of in _PERIODS:
            seen: set[object] = set()
            for snapshot in newest_first:
                if len(seen) >= getattr(rules, rule):
                    break
                period = period_of(snapshot.local_time)
                if period not in seen:
                    seen.add(period)
                    reasons[snapshot.id].append(rule)
        for snapshot in newest_first:
            reasons[snapshot.id] += [f"tag {tag}" for tag in rules.tags if tag in snapshot.tags]
    return [Verdict(s, tuple(reasons[s.id])) for s in known]


def forget(repository: Repository, forgotten: Sequence[Snapshot]) -> None:
    """Drop snapshots, durably.  Their space comes back with ``prune``."""
    for snapshot in forgotten:
        repository.store.delete(PREFIX + snapshot.id)
    repository.store.flush()
