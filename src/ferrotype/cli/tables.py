"""Tables people can read, and colours: as text, from which ``output.put`` takes the colours where no terminal is."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Final

import click

from ferrotype.cli.output import COLOUR, shown

Cell = str | tuple[str, str]  # a text, or a text and its colour

_GAP: Final = "  "  # between two columns


def width() -> int:
    """Columns of the terminal, as far as they are used."""
    return max(60, min(shutil.get_terminal_size((100, 24)).columns, 140))


def coloured(text: str, colour: str | None = None, *, bold: bool = False) -> str:
    """The text with what colours it on a terminal; as it is, where the user or the terminal wants none."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") in ("dumb", "unknown"):
        return text
    return click.style(text, fg=colour, bold=bold or None).replace("\x1b[", COLOUR)


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[Cell]]) -> list[str]:
    """The lines of a table; each column is (title, "left" or "right").  What is too wide goes on below."""
    body = [[_written(cell) for cell in row] for row in rows]
    wanted = [
        max([text_width(title), *(text_width(row[number][0]) for row in body)])
        for number, (title, _) in enumerate(columns)
    ]
    widths = _fitted(wanted, width() - len(_GAP) * (len(columns) - 1))
    lines = []
    titles = [(title, "") for title, _ in columns]
    for number, row in enumerate([titles, *body]):
        folded = [list(_folded(text, room)) for (text, _), room in zip(row, widths, strict=True)]
        for line in zip_longest(*folded, fillvalue=""):
            cells = [
                _painted(_padded(text, room, side), colour, bold=not number)
                for text, room, (_, side), (_, colour) in zip(line, widths, columns, row, strict=True)
            ]
            lines.append(_GAP.join(cells).rstrip())
    return lines


def text_width(text: str) -> int:
    """Columns of the terminal that a text takes up."""
    if text.isascii():
        return len(text)
    return sum(map(_char_width, text))


def _char_width(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):  # it stands with the character before it
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def _written(cell: Cell) -> tuple[str, str]:
    """What is shown of a cell, and its colour."""
    text, colour = (cell, "") if isinstance(cell, str) else cell
    return shown(text), colour


def _fitted(widths: Sequence[int], room: int) -> list[int]:
    """Widths that fit into the room together: the widest ones give way."""
    fitted = [max(1, min(wanted, room)) for wanted in widths]
    while sum(fitted) > room and max(fitted) > 1:
        fitted[fitted.index(max(fitted))] -= 1
    return fitted


def _folded(line: str, room: int) -> Iterator[str]:
    """A line, cut into pieces of at most ``room`` columns."""
    if text_width(line) <= room:
        yield line
        return
    start, used = 0, 0
    for at, char in enumerate(line):
        wide = _char_width(char)
        if used + wide > room and at > start:
            yield line[start:at]
            start, used = at, 0
        used += wide
    yield line[start:]


def _padded(text: str, room: int, side: str) -> str:
    spaces = " " * (room - text_width(text))
    return spaces + text if side == "right" else text + spaces


def _painted(text: str, colour: str, *, bold: bool) -> str:
    return coloured(text, colour or None, bold=bold) if bold or colour else text
