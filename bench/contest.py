"""Runs one job for ferrotype and each of its rivals in turn, pair by pair."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from jobs import Job, Rival
from measure import CommandError, Sample, allocated, shell, timed, warm
from programs import Step
from workspace import Workspace, empty


@dataclass(slots=True)
class Row:
    """One rival in one job, and the runs of ferrotype paired with its own; no ``name`` where there is no rival."""

    job: str
    name: str
    ours: list[Sample] = field(default_factory=list)
    theirs: list[Sample] = field(default_factory=list)
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Rules:
    repetitions: int  # pairs
    check_all: bool  # check every result, not only the first of each program in a job


def hold(job: Job, space: Workspace, rules: Rules) -> list[Row]:
    """All pairs of a job: A B B A with the first rival, then with the next.  A row that failed says why."""
    contest = Contest(job, space, rules)
    rows = []
    for rival in job.rivals or (None,):
        if rival and rival.step.needs and shutil.which(rival.step.needs) is None:
            say(f"{job.name}: {rival.step.name} is left out, {rival.step.needs} is not installed")
            continue
        row = Row(job.name, rival.step.name if rival else "")
        rows.append(row)
        try:
            contest.pairs(rival, row)
        except CommandError as error:
            row.failure = str(error)
            say(f"{job.name}: {row.name or 'ferrotype'} failed: {error}")
    contest.remove(job.ours)
    return rows


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


@dataclass(slots=True)
class Contest:
    job: Job
    space: Workspace
    rules: Rules
    checked: set[str] = field(default_factory=set)  # steps whose result was seen to be right
    placed: set[str] = field(default_factory=set)  # steps whose folder holds the store, and keeps it

    def pairs(self, rival: Rival | None, row: Row) -> None:
        steps = [self.job.ours, *([rival.step] if rival else [])]
        try:
            pairs = min(self.rules.repetitions, (rival and rival.most_pairs) or self.rules.repetitions)
            for turn in range(1, pairs + 1):
                samples = [self.once(step) for step in (steps if turn % 2 else reversed(steps))]
                samples = samples if turn % 2 else samples[::-1]
                row.ours.append(samples[0])
                row.theirs += samples[1:]
                times = ", ".join(f"{s.name} {t.wall:.2f} s" for s, t in zip(steps, samples, strict=True))
                say(f"{self.job.name} {turn}: {times}")
        finally:
            if rival:
                self.remove(rival.step)

    def once(self, step: Step) -> Sample:
        """One run of one program, from a clean start to a checked end."""
        job, space, names = self.job, self.space, self.space.names(step.name)
        store = space.store(step.store) if step.store else None
        space.use(job.day)
        empty(names["out"])
        if step.name not in self.placed:
            empty(names["at"])
            if store:
                shell(f"cp -a {store}/. {names['at']}")
            if job.keeps:
                self.placed.add(step.name)
        if step.reset:
            shell(step.reset.format(**names))
        warm(allocated(space.source))
        sample, said = timed(step.run.format(**names), Path(step.result.format(**names)), space.fast / "said")
        if step.says:
            own = json.loads(said)
            sample = replace(sample, wall=own["wall"], cpu=own["cpu"], peak=own.get("peak", sample.peak))
        if step.check and (self.rules.check_all or step.name not in self.checked):
            shell(step.check.format(**names))
            self.checked.add(step.name)
        empty(names["out"])
        if not job.keeps:
            empty(names["at"])
        return sample

    def remove(self, step: Step) -> None:
        self.placed.discard(step.name)
        shell(f"rm -rf {self.space.names(step.name)['at']}")
