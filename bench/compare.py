"""ferrotype beside the programs people use today and beside the machine's own limits; see README.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contest import Rules, hold, say
from jobs import JOBS
from matrix import measure_matrix
from measure import shell, timed
from rates import measure_rates
from record import Record
from report import write_report
from scale import Bench, measure_scale
from workspace import BENCH, Workspace, workspace

FAST = Path("/dev/shm")  # noqa: S108  a folder of our own is made in it
FERROTYPE = str(BENCH.parent / "ferrotype")
VERSIONS = (
    "zstd --version",
    "lz4 --version",
    "qemu-img --version",
    "borg --version",
    "restic version",
    "partclone.ext4 -v",
    "uname -sr",
)
LIBRARIES = ("numpy", "blake3", "xxhash", "cryptography", "backports.zstd")
RATES, CURVES = "limits", "scale"  # what --only knows the table of rates, and the curves of scale.py, by


def machine() -> dict[str, Any]:
    """Versions and processor.  Asking for a version also loads a program, so that its first run is no colder."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, Any] = {
        "processor": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{memory / 2**30:.0f} GiB",
        "python": platform.python_version(),
    }
    for library in LIBRARIES:
        with_version = shell(f"{sys.executable} -m pip list --format=freeze | grep -i ^{library}== || true").strip()
        if with_version:
            found[library] = with_version.partition("==")[2]
    for command in VERSIONS:
        program = command.split()[0]
        if shutil.which(program):
            found[program] = shell(f"{command} 2>&1 || true").strip().splitlines()[0]
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run", description=__doc__)
    parser.add_argument("--scale", type=float, default=1, help="1 is a disk of 8 GiB (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=10_000_000, help="of the largest image of 'scale'")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5, help="pairs of each job (default: %(default)s)")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help=f"jobs whose name matches; also '{RATES}', '{CURVES}'"
    )
    parser.add_argument("--check-all", action="store_true", help="check every result, not the first of each program")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing; write the report from the record again"
    )
    parser.add_argument("--matrix", action="store_true", help="chunk size, level and pack size instead of peers")
    parser.add_argument("--fast", type=Path, default=FAST, help="needs 12 GiB x scale (default: %(default)s)")
    parser.add_argument("--kept", type=Path, help="for built disks (default: ~/.cache/ferrotype-bench/SCALE-SEED)")
    parser.add_argument("--out", type=Path, help="for performance.md and .json (default: docs; with --matrix: here)")
    parser.add_argument("--ferrotype", default=FERROTYPE, help="the command (default: %(default)s)")
    return parser.parse_args()


def begin(space: Workspace, options: argparse.Namespace) -> Record:
    """The record to fill: that of earlier runs, where only some jobs are to be measured again."""
    floor = timed("true", None, space.fast / "said")[0].peak
    record = Record(machine(), space.build_disks(options.scale, options.seed), floor)
    path = options.out / "performance.json"
    if not path.exists():
        return record
    old = Record.load(path)
    if old.disks != record.disks:
        sys.exit(f"{path} is about other disks (scale {old.disks.scale:g}); name another --out")
    if not options.only:
        return record
    if old.machine != record.machine:
        sys.exit(f"{path} is about another machine or other programs; measure all jobs, or name another --out")
    return old


def measure_jobs(space: Workspace, options: argparse.Namespace) -> bool:
    """Measure, writing the record and the report after each job; whether all went well."""
    record = begin(space, options)
    rules = Rules(options.repetitions, options.check_all)
    if re.search(options.only, RATES):
        record.rates = measure_rates(space, rules.repetitions)
    for job in JOBS:
        if re.search(options.only, job.name):
            record.replace(job.name, hold(job, space, rules))
            write(record, options.out)
    if re.search(options.only, CURVES):
        space.use("")
        bench = Bench(
            space.fast / "scale", options.ferrotype, sys.executable, min(3, rules.repetitions), options.chunks
        )
        record.curves = measure_scale(bench)
    write(record, options.out)
    return not any(row.failure for row in record.rows)


def write(record: Record, out: Path) -> None:
    record.save(out / "performance.json")
    write_report(record, out / "performance.md")


def main() -> int:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what stands in memory goes
    options.out = options.out or (Path() if options.matrix else BENCH.parent / "docs")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.report:
        write(Record.load(options.out / "performance.json"), options.out)
        return 0
    kept = options.kept or Path.home() / f".cache/ferrotype-bench/{options.scale:g}-{options.seed}"
    with workspace(options.fast, kept, options.ferrotype) as space:
        if options.matrix:
            return 0 if matrix(space, options) else 1
        good = measure_jobs(space, options)
    say(f"the report is {options.out / 'performance.md'}")
    return 0 if good else 1


def matrix(space: Workspace, options: argparse.Namespace) -> bool:
    """Write matrix.md and matrix.json; whether no setting failed."""
    manifest = space.build_disks(options.scale, options.seed)
    table, record, failed = measure_matrix(space)
    print(table)
    (options.out / "matrix.md").write_text(table)
    document = {"machine": machine(), "disks": asdict(manifest), "matrix": record}
    (options.out / "matrix.json").write_text(json.dumps(document, indent=1) + "\n")
    return not failed


if __name__ == "__main__":
    sys.exit(main())
