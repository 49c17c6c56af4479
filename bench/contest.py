"""Runs one job for ferrotype and each of its peers in turn, pair by pair."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from jobs import Job, Step
from measure import CommandError, Sample, shell, timed
from workspace import Workspace, empty


@dataclass(slots=True)
class Row:
    """One program in one job.  ``ours`` are the runs its own were paired with; ferrotype's own row has none."""

    job: str
    name: str
    samples: list[Sample] = field(default_factory=list)
    ours: list[Sample] = field(default_factory=list)
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Rules:
    repetitions: int  # counted pairs; one more comes first, to warm up
    check_once: bool  # check the results of the first pair only


def hold(job: Job, space: Workspace, rules: Rules) -> list[Row]:
    """All pairs of a job: A B A B with the first peer, then with the next.  A row that failed says why."""
    mine = Row(job.name, job.ours.name)
    rows = [mine]
    try:
        _prepare(job, job.ours, space)
        for peer in job.peers:
            if peer.needs and shutil.which(peer.needs) is None:
                say(f"{job.name}: {peer.name} is left out, {peer.needs} is not installed")
                continue
            row = Row(job.name, peer.name)
            rows.append(row)
            try:
                _prepare(job, peer, space)
                _pairs(job, peer, space, rules, mine, row)
            except CommandError as error:
                _lost(row, error)
            _remove(peer, space)
        _remove(job.ours, space)
    except CommandError as error:
        _lost(mine, error)
    return rows


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def _pairs(job: Job, peer: Step, space: Workspace, rules: Rules, mine: Row, row: Row) -> None:
    for turn in range(rules.repetitions + 1):
        check = turn == 0 or not rules.check_once
        ours, theirs = (_once(job, step, space, check) for step in (job.ours, peer))
        if turn:
            mine.samples.append(ours)
            row.ours.append(ours)
            row.samples.append(theirs)
            say(f"{job.name} {turn}: {job.ours.name} {ours.wall:.2f} s, {peer.name} {theirs.wall:.2f} s")


def _prepare(job: Job, step: Step, space: Workspace) -> None:
    if not step.once:
        return
    names = space.names(step.name)
    space.use("day1")
    empty(names["at"])
    shell(step.once.format(**names))
    if not job.keeps:
        stored = _stored(step, space)
        shell(f"mkdir -p {stored.parent} && rm -rf {stored} && mv {names['at']} {stored}")


def _stored(step: Step, space: Workspace) -> Path:
    """Where a tool's folder waits in the state from which every run starts."""
    return space.kept / "stores" / Path(space.names(step.name)["at"]).name


def _once(job: Job, step: Step, space: Workspace, check: bool) -> Sample:
    """One run of one program, from a clean start to a checked end."""
    names = space.names(step.name)
    space.use(job.day)
    empty(names["out"])
    if not job.keeps:
        empty(names["at"])
        if step.once:
            shell(f"cp -a {_stored(step, space)}/. {names['at']}")
    if step.reset:
        shell(step.reset.format(**names))
    sample, _ = timed(step.run.format(**names), Path(step.result.format(**names)), space.fast / "said")
    if check:
        shell(step.check.format(**names))
    empty(names["out"])
    if not job.keeps:
        empty(names["at"])
    return sample


def _remove(step: Step, space: Workspace) -> None:
    shell(f"rm -rf {space.names(step.name)['at']} {_stored(step, space)}")


def _lost(row: Row, error: CommandError) -> None:
    row.failure = str(error)
    say(f"{row.job}: {row.name} failed: {error}")
