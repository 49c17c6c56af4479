"""Disks drawn in the terminal: a bar of what is where, and a table of the volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from ferrotype.cli.tables import Cell, coloured, table, width
from ferrotype.engine.survey import Survey, Volume
from ferrotype.extents import State
from ferrotype.units import format_size

_COLOURS: Final = ("cyan", "magenta", "yellow", "green", "blue", "red")
_SHADES: Final = " ░▒▓█"  # share of a cell that is in use


def disk_bar(survey: Survey) -> str:
    """The disk from its first to its last byte: a colour a volume, darker where more is in use."""
    cells = width() - 2
    used = _used_share(survey, cells)
    bar = ["▕"]
    for number in range(cells):
        at = (number + 0.5) * survey.size / cells
        shade = _SHADES[min(len(_SHADES) - 1, int(np.ceil(used[number] * (len(_SHADES) - 1))))]
        bar.append(coloured(shade if shade != " " else "·", _colour(survey.volumes, at)))
    return "".join([*bar, "▏"])


def _colour(volumes: Sequence[Volume], at: float) -> str:
    for number, volume in enumerate(volumes):
        if volume.start <= at < volume.start + volume.size:
            return _COLOURS[number % len(_COLOURS)]
    return "bright_black"


def _used_share(survey: Survey, cells: int) -> list[float]:
    """For each cell of the bar, the share of its bytes that is neither free nor zero."""
    if survey.size == 0:
        return [0.0] * cells
    starts, ends = survey.extents.runs(State.FREE | State.ZERO, present=False)
    before = np.concatenate(([0], np.cumsum(ends - starts)))
    edges = np.linspace(0, survey.size, cells + 1)
    index = np.searchsorted(starts, edges, "right")
    # bytes in use before each edge: whole runs, less what of the last one lies behind it
    last_end = np.concatenate(([0], ends))[index]
    total = before[index] - np.maximum(0, last_end - edges)
    share: list[float] = (np.diff(total) / np.diff(edges)).clip(0, 1).tolist()
    return share


def volume_rows(survey: Survey) -> list[str]:
    """The volumes of a disk, one a line."""
    columns = [("", "left"), ("#", "right"), ("start", "right"), ("size", "right"), ("holds", "left"),
               ("label", "left"), ("used", "right"), ("", "left")]  # fmt: skip
    rows: list[list[Cell]] = [
        [
            ("█", _COLOURS[number % len(_COLOURS)]),
            str(volume.index) if volume.index else "-",
            format_size(volume.start),
            format_size(volume.size),
            volume.filesystem or "unknown",
            volume.label or "",
            "" if volume.used_bytes is None else format_size(volume.used_bytes),
            _remark(volume),
        ]
        for number, volume in enumerate(survey.volumes)
    ]
    return table(columns, rows)


def _remark(volume: Volume) -> str:
    if volume.clean is False:
        return "not clean"
    return "kept whole" if volume.note else ""
