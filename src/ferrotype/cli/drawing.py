"""Disks drawn in the terminal: a bar of what is where, and tables people can read."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ferrotype.engine.survey import Survey, Volume
from ferrotype.extents import State
from ferrotype.units import format_size

_COLOURS: Final = ("cyan", "magenta", "yellow", "green", "blue", "red")
_SHADES: Final = " ░▒▓█"  # share of a cell that is in use


def width() -> int:
    return max(60, min(shutil.get_terminal_size((100, 24)).columns, 140))


def rendered(*parts: object) -> str:
    """What rich prints, as text: with colours on a terminal, plain elsewhere."""
    console = Console(width=width(), highlight=False, markup=False, emoji=False)  # a label may hold brackets
    if console.is_terminal:
        with console.capture() as capture:
            for part in parts:
                console.print(part)
        return capture.get().rstrip("\n")
    buffer = io.StringIO()
    plain = Console(
        file=buffer,
        width=width(),
        highlight=False,
        markup=False,
        emoji=False,
        color_system=None,
        force_terminal=False,
    )
    for part in parts:
        plain.print(part)
    return buffer.getvalue().rstrip("\n")


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> Table:
    """A table without lines; each column is (title, "left" or "right")."""
    out = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in columns:
        out.add_column(title, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        out.add_row(*row)
    return out


def disk_bar(survey: Survey) -> Text:
    """The disk from its first to its last byte: a colour a volume, darker where more is in use."""
    cells = width() - 2
    used = _used_share(survey, cells)
    bar = Text("▕")
    for number in range(cells):
        at = (number + 0.5) * survey.size / cells
        shade = _SHADES[min(len(_SHADES) - 1, int(np.ceil(used[number] * (len(_SHADES) - 1))))]
        bar.append(shade if shade != " " else "·", style=_colour(survey.volumes, at))
    return bar.append("▏")


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


def volume_rows(survey: Survey) -> Table:
    """The volumes of a disk, one a line."""
    columns = [("", "left"), ("#", "right"), ("start", "right"), ("size", "right"), ("holds", "left"),
               ("label", "left"), ("used", "right"), ("", "left")]  # fmt: skip
    out = table(columns, ())
    for number, volume in enumerate(survey.volumes):
        out.add_row(
            Text("█", style=_COLOURS[number % len(_COLOURS)]),
            str(volume.index) if volume.index else "-",
            format_size(volume.start),
            format_size(volume.size),
            volume.filesystem or "unknown",
            volume.label or "",
            "" if volume.used_bytes is None else format_size(volume.used_bytes),
            _remark(volume),
        )
    return out


def _remark(volume: Volume) -> str:
    if volume.clean is False:
        return "not clean"
    return "kept whole" if volume.note else ""
