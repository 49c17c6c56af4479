"""What chunk size, compression level and pack size cost: the table from which the defaults were chosen."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from measure import CommandError, Sample, shell, timed
from workspace import BENCH, Workspace, empty

MB: Final = 1e6
INDEX_ENTRY: Final = 48  # bytes a chunk that the index may take in memory while an image is written
READS: Final = 2000
COLUMNS: Final = (
    "| chunk | level | pack | full MB | wall s | CPU s | day two MB | wall s | CPU s "
    "| peak MiB | chunks | index MiB | 4 KiB read µs | 95th |"
)

CHUNK_SIZES: Final = ("64KiB", "128KiB", "256KiB", "512KiB", "1MiB", "2MiB", "4MiB")
MIDDLE: Final = "256KiB"  # the chunk size at which levels and pack sizes are varied
LEVELS: Final = (-5, 1, 2, 3, 6, 9)
PACK_SIZES: Final = ("4MiB", "8MiB", "16MiB", "32MiB", "64MiB")


@dataclass(frozen=True, slots=True)
class Setting:
    chunk_size: str
    level: int
    pack_size: str = ""  # '' for ferrotype's own choice

    @property
    def options(self) -> str:
        pack = f" --pack-size {self.pack_size}" if self.pack_size else ""
        return f"--chunk-size {self.chunk_size} --level={self.level}{pack}"


SETTINGS: Final = tuple(
    dict.fromkeys(
        [Setting(size, level) for size in CHUNK_SIZES for level in (1, 3)]
        + [Setting(MIDDLE, level) for level in LEVELS]
        + [Setting(MIDDLE, 1, pack) for pack in PACK_SIZES]
    )
)


@dataclass(frozen=True, slots=True)
class Cell:
    """What one setting gave; ``stored`` of the samples is the growth of the image."""

    full: Sample
    day_two: Sample
    chunks: int | None
    read_median: float  # microseconds for 4 KiB at random
    read_95th: float


def measure_matrix(space: Workspace) -> tuple[str, list[dict[str, Any]], bool]:
    """The table, its numbers, and whether any setting failed.  Day by day, so that only one disk need be there."""
    space.use("day1")
    images = {setting: _first(space, setting) for setting in SETTINGS}
    space.use("day2")
    cells = {setting: _second(space, setting, first) for setting, first in images.items()}
    record = [asdict(s) | (asdict(c) if isinstance(c, Cell) else {"failure": c}) for s, c in cells.items()]
    return _table(cells), record, any(isinstance(cell, str) for cell in cells.values())


def _names(space: Workspace, setting: Setting) -> dict[str, str]:
    return space.names("matrix " + setting.options)


def _stored(space: Workspace, setting: Setting) -> Path:
    return space.kept / "stores" / (Path(_names(space, setting)["at"]).name + ".ferro")


def _backup(space: Workspace, setting: Setting) -> tuple[Sample, dict[str, Any]]:
    names = _names(space, setting)
    image = Path(names["at"], "disk.ferro")
    command = f"{names['ferrotype']} backup {names['source']} {image} {setting.options} --json"
    sample, said = timed(command, image, space.fast / "said")
    return sample, json.loads(said)


def _first(space: Workspace, setting: Setting) -> tuple[Sample, int | None] | str:
    """A first backup, its image put aside on the slower folder; or why it failed."""
    at = _names(space, setting)["at"]
    try:
        empty(at)
        sample, facts = _backup(space, setting)
        stored = _stored(space, setting)
        shell(f"mkdir -p {stored.parent} && mv {at}/disk.ferro {stored} && rm -r {at}")
    except CommandError as error:
        print(f"{setting.options}: {error}", file=sys.stderr)
        return str(error)
    print(f"{setting.options}: full {sample.wall:.2f} s, {sample.stored / MB:.1f} MB", file=sys.stderr)
    return sample, facts.get("chunks")


def _second(space: Workspace, setting: Setting, first: tuple[Sample, int | None] | str) -> Cell | str:
    """A second backup into the same image, and reads from it; or why either backup failed."""
    if isinstance(first, str):
        return first
    full, chunks = first
    at = _names(space, setting)["at"]
    try:
        empty(at)
        shell(f"mv {_stored(space, setting)} {at}/disk.ferro")
        sample, facts = _backup(space, setting)
        program = f"{sys.executable} {BENCH}/latency.py"
        reads = json.loads(shell(f"{program} {at}/disk.ferro {space.source} {space.disks} {READS}"))
        shell(f"rm -r {at}")
    except CommandError as error:
        print(f"{setting.options}: {error}", file=sys.stderr)
        return str(error)
    print(f"{setting.options}: day two {sample.wall:.2f} s, {sample.stored / MB:.1f} MB", file=sys.stderr)
    return Cell(full, sample, facts.get("chunks", chunks), reads["median"], reads["95th"])


def _table(cells: dict[Setting, Cell | str]) -> str:
    lines = [COLUMNS, "|" + (COLUMNS.count("|") - 1) * "--:|"]
    for setting, cell in cells.items():
        label = f"| {setting.chunk_size} | {setting.level} | {setting.pack_size or 'default'} |"
        lines.append(f"{label} failed |||||||||||" if isinstance(cell, str) else f"{label} {_cells(cell)} |")
    return "\n".join(lines) + "\n"


def _cells(cell: Cell) -> str:
    chunks = "" if cell.chunks is None else str(cell.chunks)
    index = "" if cell.chunks is None else f"{cell.chunks * INDEX_ENTRY / 2**20:.2f}"
    texts = [f"{s.stored / MB:.1f} | {s.wall:.2f} | {s.cpu:.2f}" for s in (cell.full, cell.day_two)]
    peak = f"{max(cell.full.peak, cell.day_two.peak) / 2**20:.0f}"
    return " | ".join([*texts, peak, chunks, index, f"{cell.read_median:.0f}", f"{cell.read_95th:.0f}"])
