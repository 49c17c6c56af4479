"""Options of verbs that open a disk by reference."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ferrotype.cli.frame import IMAGE, SIZE, F, Frame

if TYPE_CHECKING:
    from ferrotype.engine.references import Access


@dataclass(frozen=True, slots=True)
class Opening:
    """What the user said about opening disks."""

    format: str | None
    sector_size: int | None
    related: tuple[Path, ...]

    def access(self, frame: Frame) -> Access:
        """How references are opened in this call.  Raises UsageError."""
        from ferrotype.engine.references import Access

        return Access(
            frame.secret,
            self.format,
            self.related,
            self.sector_size,
            frame.secret_given,
            frame.opener,
            frame.patience,
            frame.memory,
        )


def access_options(function: F) -> F:
    """Add ``--format``, ``--sector-size`` and ``--allow-related``, and hand them over as an ``Opening``."""

    @functools.wraps(function)
    def wrapped(
        *args: Any, format: str | None, sector_size: int | None, allow_related: tuple[Path, ...], **kwargs: Any
    ) -> Any:
        return function(*args, opening=Opening(format, sector_size, allow_related), **kwargs)

    for option in (
        click.option("--sector-size", type=SIZE, help="Sector size of the disk, where it is not found by itself."),
        click.option(
            "--allow-related",
            type=IMAGE,
            multiple=True,
            metavar="PATH",
            help="Files that a disk image names (parents, extents) may also lie here; may be given several times.",
        ),
        click.option("--format", metavar="FORMAT", help="Read a file as this (raw, qcow2 ...), whatever it shows."),
    ):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]
