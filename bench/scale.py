"""How cost grows: curves of wall time, CPU time and peak memory over what an image, or a disk, holds.

    scale.py                                 all curves, to scale.md and scale.json in the current folder
    scale.py --largest 1000000 --only open   the curves whose name begins with `open`, of smaller images
    scale.py --lookup IMAGE COUNT            open the index of an image and look up so many chunks (a job of its own)

Images and disks are made by synthetic.py; at the largest size they take 3 GiB of memory below --fast.
Every job is a process of its own.  A line `a + b * x` is fitted to each curve, by relative error, and carried on to
where the column says; a model with two numbers is no measurement of what lies ten times beyond the last point.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from measure import shell, timed

BENCH: Final = Path(__file__).resolve().parent
FAST: Final = Path("/dev/shm/ferrotype-scale")  # noqa: S108  a folder of our own
MiB: Final = 1 << 20
TiB: Final = 1 << 40
_ONCE: Final = 3_000_000  # from this size on each job is run once


@dataclass(frozen=True, slots=True)
class Point:
    """One size, and what the job cost there: medians."""

    x: float
    wall: float  # seconds
    cpu: float  # seconds
    peak: float  # MiB


@dataclass(slots=True)
class Curve:
    """A job over sizes."""

    name: str
    job: str  # what is run
    unit: str  # of x
    beyond: float  # x of the last column
    meaning: str  # what the slope comes from
    bounded: bool = False  # peak memory does not follow the line: a cache or a batch fills up
    points: list[Point] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Line:
    """``fixed + slope * x``."""

    fixed: float
    slope: float

    def at(self, x: float) -> float:
        return self.fixed + self.slope * x


def fit(pairs: Sequence[tuple[float, float]]) -> Line:
    """Least squares of the relative error, with nothing below zero."""
    weights = [1 / max(y, 1e-3) ** 2 for _, y in pairs]
    total = sum(weights)
    x_mean = sum(w * x for w, (x, _) in zip(weights, pairs, strict=True)) / total
    y_mean = sum(w * y for w, (_, y) in zip(weights, pairs, strict=True)) / total
    spread = sum(w * (x - x_mean) ** 2 for w, (x, _) in zip(weights, pairs, strict=True))
    common = sum(w * (x - x_mean) * (y - y_mean) for w, (x, y) in zip(weights, pairs, strict=True))
    slope = max(0.0, common / spread) if spread else 0.0
    if (fixed := y_mean - slope * x_mean) < 0:
        fixed, slope = (
            0.0,
            sum(w * x * y for w, (x, y) in zip(weights, pairs, strict=True))
            / sum(w * x * x for w, (x, _) in zip(weights, pairs, strict=True)),
        )
    return Line(fixed, slope)


# ---------------------------------------------------------------------- running


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and how often."""

    fast: Path
    ferrotype: str
    python: str
    repetitions: int
    largest: int  # chunks

    def measure(self, x: float, command: str, before: Callable[[], object] = lambda: None) -> Point:
        """``before`` prepares each run; the last one's result is left."""
        samples = []
        for _ in range(self.repetitions if x < _ONCE else 1):
            before()
            samples.append(timed(command, None, self.fast / "log")[0])
            print(f"{x:,.9g}: {samples[-1].wall:.2f} s, {samples[-1].peak // MiB} MiB: {command}", file=sys.stderr)
        wall, cpu = statistics.median(s.wall for s in samples), statistics.median(s.cpu for s in samples)
        return Point(x, wall, cpu, statistics.median(s.peak for s in samples) / MiB)

    def make(self, what: str, *options: object) -> Path:
        """An image or disk of synthetic.py."""
        path = self.fast / what
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        shell(f"{self.python} {BENCH}/synthetic.py {path} {' '.join(map(str, options))}")
        return path

    def copied(self, path: Path) -> Callable[[], object]:
        """Puts a fresh copy of an image into the place of ``work.ferro``."""
        return lambda: shell(f"cp --sparse=always {path} {self.fast}/work.ferro.new; cd {self.fast}; "
                             "rm -f work.ferro*.lock; mv work.ferro.new work.ferro")  # fmt: skip

    def sizes(self) -> list[int]:
        return [n for n in (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000) if n <= self.largest]


CHUNKS: Final = "chunks in the image"


def of_chunks(bench: Bench) -> Iterator[Curve]:
    """Jobs on images of one disk whose every cell is another chunk."""
    ft, work, restored = bench.ferrotype, bench.fast / "work.ferro", bench.fast / "restored.img"
    curves = {
        "open": Curve("open", "list", CHUNKS, 1e8, "one catalog entry for each pack of 275 chunks"),
        "index": Curve("index", "open the index, look up 10 chunks", CHUNKS, 1e8,
                       "the catalog, and 28 bytes for each page of 1,024 chunks"),
        "look up": Curve("look up", "open the index, look up 10,000 chunks strewn over it", CHUNKS, 1e8,
                         "a page of 44 KiB for each lookup, until there are no more pages than lookups; memory up to "
                         "that of the page cache", bounded=True),
        "info": Curve("info", "info: the disk's map, page by page", CHUNKS, 1e8,
                      "every map page (32 KiB for 1,024 cells) is looked up, read and hashed once", bounded=True),
        "increment": Curve("increment", "backup of a disk of as many cells, 1 % of them new and strewn", CHUNKS, 1e8,
                           "every page of the parent's map is read, every page of the new one written; 1 % of the "
                           "chunks are looked up, which touches every page of the index, and stored", bounded=True),
        "restore": Curve("restore", "restore of what the increment made, to a new file", CHUNKS, 1e8,
                         "every map page, and 1 % of the chunks, one by one", bounded=True),
        "verify": Curve("verify", "verify of the image with both snapshots", CHUNKS, 1e8,
                        "every stored byte, here 121 for each chunk; every map page; the index "
                        "once for each million chunks", bounded=True),
    }  # fmt: skip
    for count in bench.sizes():
        image = bench.make("image.ferro", "--chunks", count)
        disk = bench.make("disk/disk.img", "--disk", count, "--changed", count // 100)
        at = float(count)
        curves["open"].points.append(bench.measure(at, f"{ft} list {image}"))
        for name, ids in (("index", 10), ("look up", 10_000)):
            lookup = f"{bench.python} {Path(__file__).resolve()} --lookup {image} {ids}"
            curves[name].points.append(bench.measure(at, lookup))
        curves["info"].points.append(bench.measure(at, f"{ft} info {image}"))
        curves["increment"].points.append(bench.measure(at, f"{ft} backup {disk} {work}", bench.copied(image)))
        image.unlink()
        restore = f"{ft} restore {work} {restored}"
        curves["restore"].points.append(bench.measure(at, restore, lambda: restored.unlink(missing_ok=True)))
        shell(f"cmp {disk} {restored}" if count <= 1_000_000 else "true")
        restored.unlink()
        disk.unlink()
        curves["verify"].points.append(bench.measure(at, f"{ft} verify {work}"))
        work.unlink()
    yield from curves.values()


def of_snapshots(bench: Bench) -> Iterator[Curve]:
    curve = Curve("list", "list", "snapshots", 1e5, "one object a snapshot: read, unsealed, decoded, drawn")
    for count in (10, 30, 100, 300, 1000):
        image = bench.make("image.ferro", "--chunks", 1000, "--snapshots", count)
        curve.points.append(bench.measure(count, f"{bench.ferrotype} list {image}"))
    yield curve


def of_pruning(bench: Bench) -> Iterator[Curve]:
    """Twenty snapshots, of which the older half is forgotten."""
    work = bench.fast / "work.ferro"
    command = f"{bench.ferrotype} forget {work} --keep-last 10 --prune"
    total = min(1_000_000, bench.largest)
    for name, how, meaning in (
        ("prune whole packs", "", "packs that go whole cost their catalog entry and a hole"),
        ("prune parts of packs", "--scattered", "what is left in packs that are dead by more than 30 % is moved"),
    ):  # fmt: skip
        curve = Curve(
            name, f"forget and prune 10 of 20 snapshots, {total} chunks", "chunks that go", total * 0.5, meaning
        )
        for own in (0.002, 0.02, 0.2, 0.6, 1.0):
            image = bench.make(
                "image.ferro", "--chunks", total, "--snapshots", 20, "--own", own, *[how] if how else []
            )
            curve.points.append(bench.measure(own / 2 * total, command, bench.copied(image)))
        yield curve
    curve = Curve("prune, what stays", "forget and prune 10 of 20 snapshots, 5,000 chunks go", "chunks that stay",
                  1e8, "the maps of what stays are walked, and the index is read and written once",
                  bounded=True)  # fmt: skip
    for count in bench.sizes():
        image = bench.make("image.ferro", "--chunks", count, "--snapshots", 20, "--own", 10_000 / count)
        curve.points.append(bench.measure(count - 5_000, command, bench.copied(image)))
    yield curve


def of_disks(bench: Bench) -> Iterator[Curve]:
    """Sparse disks with 64 MiB of data in 64 places."""
    ft, work, restored = bench.ferrotype, bench.fast / "work.ferro", bench.fast / "restored.img"
    curves = [
        Curve("disk: backup", "first backup of a sparse disk, 64 MiB of data in 64 places", "TiB", 100, ""),
        Curve("disk: increment", "second backup of it", "TiB", 100, ""),
        Curve("disk: restore", "restore to a new file", "TiB", 100, ""),
        Curve("disk: checksum", "checksum of the snapshot", "TiB", 100, ""),
    ]
    for curve in curves:
        curve.meaning = "holes and zero subtrees are stepped over: nothing grows with the disk"
    for size in (1, 4, 16, 64):
        disk = bench.fast / "disk" / "disk.img"
        disk.parent.mkdir(exist_ok=True)
        rng = random.Random(size)
        with disk.open("wb") as file:
            file.truncate(size * TiB)
            for place in range(64):
                file.seek(place * (size * TiB // 64) + rng.randrange(1024) * MiB)
                file.write(rng.randbytes(MiB))
        curves[0].points.append(
            bench.measure(size, f"{ft} backup {disk} {work}", lambda: work.unlink(missing_ok=True))
        )
        curves[1].points.append(bench.measure(size, f"{ft} backup {disk} {work}"))
        restore = f"{ft} restore {work} {restored}"
        curves[2].points.append(bench.measure(size, restore, lambda: restored.unlink(missing_ok=True)))
        restored.unlink()
        curves[3].points.append(bench.measure(size, f"{ft} checksum {work}"))
        disk.unlink()
    yield from curves


GROUPS: Final[dict[str, Callable[[Bench], Iterator[Curve]]]] = {
    "chunks": of_chunks, "snapshots": of_snapshots, "prune": of_pruning, "disks": of_disks,
}  # fmt: skip


# ---------------------------------------------------------------------- telling


def table(curves: Sequence[Curve]) -> str:
    """One block a curve, in Markdown."""
    lines: list[str] = []
    for curve in curves:
        sizes = [f"{p.x:,.9g}" for p in curve.points]
        wall, peak = fit([(p.x, p.wall) for p in curve.points]), fit([(p.x, p.peak) for p in curve.points])
        lines += [
            f"**{curve.name}** — {curve.job}: {curve.meaning}.",
            "",
            f"| {' | '.join([curve.unit, *sizes])} | slope | line at {curve.beyond:,.9g} |",
            "|---|" + "--:|" * (len(curve.points) + 2),
            _row("wall s", [p.wall for p in curve.points], 2, wall, curve),
            _row("CPU s", [p.cpu for p in curve.points], 2, fit([(p.x, p.cpu) for p in curve.points]), curve),
            _row("peak MiB", [p.peak for p in curve.points], 0, peak, curve, bounded=curve.bounded),
            "",
        ]
    return "\n".join(lines)


def _row(what: str, values: Sequence[float], digits: int, line: Line, curve: Curve, *, bounded: bool = False) -> str:
    per = 10 ** max(0, len(f"{curve.points[-1].x:.0f}") - 1)  # the power of ten below the largest
    slope = f"{line.fixed:,.{digits}f} + {line.slope * per:,.{digits + 1}f} for each {per:,}"
    cells = [f"{value:,.{digits}f}" for value in values]
    rest = ("", "bounded") if bounded else (slope, f"{line.at(curve.beyond):,.{digits}f}")
    return f"| {what} | {' | '.join([*cells, *rest])} |"


def measure_scale(bench: Bench, only: Sequence[str] = ()) -> list[Curve]:
    """All curves of the groups whose names begin with one of ``only``.  Leaves nothing below ``bench.fast``."""
    curves: list[Curve] = []
    bench.fast.mkdir(parents=True, exist_ok=True)
    try:
        for name, group in GROUPS.items():
            if not only or any(name.startswith(wanted) for wanted in only):
                for curve in group(bench):
                    print(table([curve]), flush=True)
                    curves.append(curve)
    finally:
        shutil.rmtree(bench.fast)
    return curves


def write(curves: Sequence[Curve], out: Path) -> None:
    (out / "scale.md").write_text(table(curves))
    (out / "scale.json").write_text(json.dumps([asdict(curve) for curve in curves], indent=1) + "\n")


def look_up(image: Path, count: int) -> None:
    """Open an image and its index, and look up ids strewn evenly over all there are."""
    import numpy as np

    from ferrotype.engine.opening import open_image

    rng = np.random.default_rng(count)
    with open_image(image, lambda _: None) as repository:
        repository.index.find_many(np.frombuffer(rng.bytes(32 * count), "V32"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lookup", nargs=2, metavar=("IMAGE", "COUNT"))
    parser.add_argument("--only", nargs="*", default=[], metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--largest", type=int, default=10_000_000, metavar="CHUNKS")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--fast", type=Path, default=FAST)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--ferrotype", default=str(BENCH.parent / "ferrotype"))
    asked = parser.parse_args()
    if asked.lookup:
        look_up(Path(asked.lookup[0]), int(asked.lookup[1]))
        return
    bench = Bench(asked.fast, asked.ferrotype, sys.executable, asked.repetitions, asked.largest)
    write(measure_scale(bench, asked.only), asked.out)


if __name__ == "__main__":
    main()
