"""The report: the prose of performance.in.md, with tables in the place of {goals}, {details}, {rates} and others."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from contest import Row
from jobs import JOBS, Bound, Job, Rival
from measure import Sample, median
from record import Record
from scale import table
from workspace import BENCH

MB: Final = 1e6
HIGHEST_PEAK: Final = 400  # MiB, of any job
GOALS: Final = (
    "| job | wall s | CPU s | peak MiB | stored MB | against | ratio | goal | share of the limit | met |",
    "|---|--:|--:|--:|--:|---|--:|--:|--:|---|",
)
DETAILS: Final = (
    "| | wall s | CPU s | peak MiB | stored MB | used MB/s | busy | runs | wall ÷ ferrotype | CPU ÷ ferrotype |",
    "|---|" + 9 * "--:|",
)
Fact = Callable[[Sample], float]
FACTS: Final[dict[str, Fact]] = {"wall": lambda s: s.wall, "cpu": lambda s: s.cpu, "stored": lambda s: s.stored}
UNITS: Final = {"wall": (1.0, "s wall"), "cpu": (1.0, "s CPU"), "stored": (MB, "MB stored")}


def write_report(record: Record, path: Path) -> None:
    blocks = {
        "goals": "\n".join(goals(record)),
        "details": "\n".join(details(record)),
        "rates": "\n".join(rates(record)),
        "machine": "\n".join(f"* {name}: {value}" for name, value in record.machine.items()),
        "disk": disk(record),
        "scale": table(record.curves),
    }
    prose = (BENCH / "performance.in.md").read_text()
    path.write_text(re.sub(r"\{(\w+)\}", lambda found: blocks[found[1]], prose))


# ---------------------------------------------------------------------- figures


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and lowest to highest."""
    middle, low, high = (f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low}–{high})"


def ratios(over: Sequence[Sample], under: Sequence[Sample], fact: Fact) -> list[float]:
    """Pair by pair; [] where nothing stands below."""
    if not all(fact(b) for b in under):
        return []
    return [fact(a) / fact(b) for a, b in zip(over, under, strict=True)]


def verdict(*, met: bool) -> str:
    return "yes" if met else "**no**"


# ---------------------------------------------------------------------- goals


def goals(record: Record) -> list[str]:
    """One row a goal."""
    lines = [*GOALS]
    for job in JOBS:
        facts = _ours(job, record)
        for against in _against(job, record):
            lines.append(f"| {facts} | {against} |")
            facts = " | " * 4
    peaks = [sample.peak / 2**20 for row in record.rows for sample in row.ours]
    if peaks:
        highest = max(peaks)
        met = verdict(met=highest < HIGHEST_PEAK)
        lines.append(f"| every job | | | | | peak MiB | {highest:.0f} | < {HIGHEST_PEAK} | | {met} |")
    return lines


def _ours(job: Job, record: Record) -> str:
    samples = record.ours(job.name)
    if not samples:
        return f"{job.name} | not measured | | | "
    cells = (
        job.name,
        spread([s.wall for s in samples]),
        f"{median(samples, lambda s: s.cpu):.2f}",
        f"{max(s.peak for s in samples) / 2**20:.0f}",
        f"{median(samples, lambda s: s.stored) / MB:.2f}" if job.stores else "",
    )
    return " | ".join(cells)


def _against(job: Job, record: Record) -> Iterator[str]:
    """The cells from "against" on."""
    rows = {row.name: row for row in record.rows if row.job == job.name}
    for rival in job.rivals:
        row = rows.get(rival.step.name)
        if row is None or row.failure or not row.theirs:
            yield f"{rival.step.name} | {'failed' if row and row.failure else 'not measured'} | | | "
        elif rival.share is not None:
            yield _share(rival, rival.share, row)
        else:
            yield from _ratio_cells(rival, row)
    for bound in job.bounds:
        yield _bound(bound, record.ours(job.name), record.disks.days["day1"].used)


def _ratio_cells(rival: Rival, row: Row) -> Iterator[str]:
    yield _ratio(rival.step.name, ratios(row.ours, row.theirs, FACTS["wall"]), rival.wall)
    if rival.stored is not None:
        yield _ratio(f"stored, {rival.step.name}", ratios(row.ours, row.theirs, FACTS["stored"]), rival.stored)


def _ratio(name: str, pairs: list[float], most: float | None) -> str:
    if most is None:
        return f"{name} | {spread(pairs)} | | | "
    return f"{name} | {spread(pairs)} | ≤ {most:.2f} | | {verdict(met=statistics.median(pairs) <= most)}"


def _share(rival: Rival, least: float, row: Row) -> str:
    shares = [100 * share for share in ratios(row.theirs, row.ours, FACTS["wall"])]
    goal, met = (
        (f"≥ {100 * least:.0f} %", verdict(met=statistics.median(shares) >= 100 * least)) if least else ("", "")
    )
    return f"the machine: {rival.step.name} | | {goal} | {spread(shares, 0)} % | {met}"


def _bound(bound: Bound, samples: Sequence[Sample], used: int) -> str:
    scale, unit = UNITS[bound.fact]
    most = bound.most + bound.of_used * used
    if not samples:
        return f"{unit} | not measured | ≤ {most / scale:.2f} | | "
    found = median(samples, FACTS[bound.fact])
    values = spread([FACTS[bound.fact](s) / scale for s in samples], 3)
    return f"{unit} | {values} | ≤ {most / scale:.2f} | | {verdict(met=found <= most)}"


# ---------------------------------------------------------------------- details


def details(record: Record) -> list[str]:
    """A table for each job, with absolute figures."""
    used = record.disks.days["day1"].used
    lines = []
    for job in JOBS:
        rows = [row for row in record.rows if row.job == job.name]
        if not rows:
            continue
        lines += [f"### {job.name[0].upper()}{job.name[1:]}\n", *DETAILS]
        lines.append(_detail(job, "ferrotype", record.ours(job.name), [], used))
        lines += [_detail(job, row.name, row.theirs, row.ours, used) for row in rows if row.name and not row.failure]
        lines += [f"\n{row.name or 'ferrotype'} failed: `{row.failure[-200:]!r}`" for row in rows if row.failure]
        lines.append("")
    return lines


def _detail(job: Job, name: str, samples: list[Sample], ours: list[Sample], used: int) -> str:
    if not samples:
        return f"| {name} |" + 9 * " |"
    wall = median(samples, FACTS["wall"])
    machine = any(rival.step.says for rival in job.rivals if rival.step.name == name)
    cells = [
        name,
        spread([s.wall for s in samples]),
        f"{median(samples, FACTS['cpu']):.2f}",
        "" if machine else f"{max(s.peak for s in samples) / 2**20:.0f}",
        f"{median(samples, FACTS['stored']) / MB:.2f}" if job.stores and not machine else "",
        f"{used / MB / wall:.0f}" if job.reads else "",
        f"{median(samples, lambda s: s.busy):.1f}",
        str(len(samples)),
    ]
    cells += [f"{statistics.median(ratios(samples, ours, FACTS[f])):.2f}" if ours else "" for f in ("wall", "cpu")]
    return f"| {' | '.join(cells)} |"


def rates(record: Record) -> list[str]:
    """What the machine can do, MB of plain data a second."""
    threads = sorted({key.split()[0] for key in record.rates}, key=int)
    lines = ["| | " + " | ".join(f"{n} thread{'s' * (n != '1')}, MB/s" for n in threads) + " |"]
    lines.append("|---|" + len(threads) * "--:|")
    for work in dict.fromkeys(key.split()[1] for key in record.rates):
        cells = [work.replace("+", ", "), *(spread(record.rates[f"{n} {work}"], 0) for n in threads)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def disk(record: Record) -> str:
    disks = record.disks
    day, changed = disks.days["day1"], disks.changed["4096"]
    return (
        f"The disk has {disks.disk_size / MB:.0f} MB; {day.used / MB:.0f} MB are in use and "
        f"{day.allocated / MB:.0f} MB allocated. On day two {changed / MB:.1f} MB of 4 KiB blocks differ. "
        f"Peaks below {record.floor / 2**20:.0f} MiB cannot be told apart."
    )
