"""What a benchmark run leaves behind: performance.json, from which the report can be written again without measuring.

A later run of some jobs replaces the rows of these jobs, provided that disks and machine are the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from contest import Row
from measure import Sample
from scale import Curve, Point

from disks import Manifest


@dataclass(slots=True)
class Record:
    machine: dict[str, Any]  # versions, processor
    disks: Manifest
    floor: int  # bytes; peaks below it cannot be told apart
    rows: list[Row] = field(default_factory=list)
    rates: dict[str, list[float]] = field(default_factory=dict)  # "threads work" -> MB/s, one each repetition

    curves: list[Curve] = field(default_factory=list)

    def replace(self, job: str, rows: list[Row]) -> None:
        self.rows = [row for row in self.rows if row.job != job] + rows

    def ours(self, job: str) -> list[Sample]:
        """ferrotype's runs of a job, whoever it was paired with."""
        return [sample for row in self.rows if row.job == job for sample in row.ours]

    def save(self, path: Path) -> None:
        """One row a line, so that a changed job is a changed line."""
        rows = ",\n  ".join(json.dumps(_row(row)) for row in self.rows)
        facts = {"machine": self.machine, "disks": asdict(self.disks), "floor": self.floor, "rates": self.rates}
        facts["curves"] = [asdict(curve) for curve in self.curves]
        lines = ",\n ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in facts.items())
        path.write_text(f'{{{lines},\n "rows": [\n  {rows}\n ]}}\n')

    @classmethod
    def load(cls, path: Path) -> Record:
        raw = json.loads(path.read_text())
        rows = [
            Row(r["job"], r["name"], _samples(r["ours"]), _samples(r["theirs"]), r["failure"]) for r in raw["rows"]
        ]
        curves = [Curve(**c | {"points": [Point(**p) for p in c["points"]]}) for c in raw["curves"]]
        return cls(raw["machine"], Manifest.parse(raw["disks"]), raw["floor"], rows, raw["rates"], curves)


def _row(row: Row) -> dict[str, Any]:
    sides = {side: [_figures(s) for s in samples] for side, samples in (("ours", row.ours), ("theirs", row.theirs))}
    return {"job": row.job, "name": row.name, **sides, "failure": row.failure}


def _figures(sample: Sample) -> list[float]:
    """wall, cpu, peak, stored, busy"""
    return [round(sample.wall, 4), round(sample.cpu, 4), sample.peak, sample.stored, round(sample.busy, 2)]


def _samples(rows: Sequence[Sequence[float]]) -> list[Sample]:
    return [Sample(wall, cpu, int(peak), int(stored), busy) for wall, cpu, peak, stored, busy in rows]
