"""ferrotype beside the programs people use today, job by job, in turn, in one run; see README.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jobs
from contest import Row, Rules, hold
from matrix import measure_matrix
from measure import Sample, median, ratio, shell, timed
from workspace import BENCH, workspace

from disks import Manifest

MB = 1e6
FAST = Path("/dev/shm")  # noqa: S108  a folder of our own is made in it
FERROTYPE = str(BENCH.parent / "ferrotype")
COLUMNS = (
    "| | wall s | CPU s | peak MiB | stored MB | used MB/s | busy "
    "| wall ÷ ferrotype | CPU ÷ ferrotype | stored ÷ ferrotype |"
)
FACTS: tuple[Callable[[Sample], float], ...] = (lambda s: s.wall, lambda s: s.cpu, lambda s: s.stored)
VERSIONS = ("zstd --version", "qemu-img --version", "borg --version", "restic version", "uname -sr")


def as_table(rows: list[Row], used: int) -> str:
    """Markdown, one table a job."""
    lines: list[str] = []
    for job in dict.fromkeys(row.job for row in rows):
        lines += [
            f"### {job}\n",
            COLUMNS,
            "|---|" + (COLUMNS.count("|") - 2) * "--:|",
        ]
        lines += [_line(row, used) for row in rows if row.job == job]
        lines.append("")
    return "\n".join(lines)


def _line(row: Row, used: int) -> str:
    if row.failure or not row.samples:
        return f"| {row.name} | failed or not run ||||||||"
    wall = median(row.samples, lambda s: s.wall)
    cells = [
        f"{wall:.2f}",
        f"{median(row.samples, lambda s: s.cpu):.2f}",
        f"{median(row.samples, lambda s: s.peak) / 2**20:.0f}",
        f"{median(row.samples, lambda s: s.stored) / MB:.1f}",
        f"{used / MB / wall:.0f}",
        f"{median(row.samples, lambda s: s.busy):.1f}",
    ]
    for fact in FACTS:
        times = ratio(row.ours, row.samples, fact) if row.ours else None
        cells.append("" if times is None else f"{times:.2f}")
    return f"| {row.name} | {' | '.join(cells)} |"


def machine() -> dict[str, Any]:
    found = {"python": platform.python_version()}
    for command in VERSIONS:
        program = command.split()[0]
        if shutil.which(program):
            found[program] = shell(command).splitlines()[0]
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found | {"cpu": cpu[1] if cpu else platform.machine(), "cores": len(os.sched_getaffinity(0))}


def heading(manifest: Manifest, facts: dict[str, Any], floor: int) -> str:
    day, changed = manifest.days["day1"], manifest.changed["4096"]
    return (
        f"Disk {manifest.disk_size / MB:.0f} MB, {day.used / MB:.0f} MB in use, {day.allocated / MB:.0f} MB "
        f"allocated; on day two {changed / MB:.1f} MB of 4 KiB blocks differ.  {facts['cores']} cores, "
        f"{facts['cpu']}.  Peaks below {floor / 2**20:.0f} MiB cannot be told apart.\n"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run", description=__doc__)
    parser.add_argument("--scale", type=float, default=0.5, help="1 is a disk of 8 GiB (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3, help="counted pairs, after one that warms up")
    parser.add_argument("--only", default="", metavar="REGEX", help="jobs whose name matches")
    parser.add_argument("--check-once", action="store_true", help="check only the results of the first pair")
    parser.add_argument("--matrix", action="store_true", help="chunk size, level and pack size instead of peers")
    parser.add_argument("--fast", type=Path, default=FAST, help="needs 12 GiB x scale (default: %(default)s)")
    parser.add_argument("--kept", type=Path, help="for built disks (default: ~/.cache/ferrotype-bench/SCALE-SEED)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the .md and the .json (default: here)")
    parser.add_argument("--ferrotype", default=FERROTYPE, help="the command (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    kept = options.kept or Path.home() / f".cache/ferrotype-bench/{options.scale:g}-{options.seed}"
    with workspace(options.fast, kept, options.ferrotype) as space:
        manifest = space.build_disks(options.scale, options.seed)
        facts = machine()
        if options.matrix:
            name, table, record, failed = "matrix", *measure_matrix(space)
        else:
            rules = Rules(options.repetitions, options.check_once)
            rows = [row for job in jobs.JOBS if re.search(options.only, job.name) for row in hold(job, space, rules)]
            name, table, record = "peers", as_table(rows, manifest.days["day1"].used), [asdict(row) for row in rows]
            failed = any(row.failure for row in rows)
        floor = timed("true", None, space.fast / "said")[0].peak
    text = f"{heading(manifest, facts, floor)}\n{table}"
    print(text)
    (options.out / f"{name}.md").write_text(text)
    document = {"machine": facts, "disks": asdict(manifest), name: record}
    (options.out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
