"""Options of verbs that open a disk by reference."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import click

from ferrotype.cli.frame import SIZE, F, Frame

if TYPE_CHECKING:
    from ferrotype.engine.references import Access


def access_options(function: F) -> F:
    """Add ``--format`` and ``--sector-size``."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    wrapped = click.option(
        "--sector-size", type=SIZE, help="Sector size of a raw disk image, if not found by itself."
    )(wrapped)
    return click.option("--format", type=click.Choice(["raw"]), help="Read a file as this, whatever it looks like.")(
        wrapped
    )  # type: ignore[return-value]


def make_access(frame: Frame, format: str | None, sector_size: int | None) -> Access:
    """How references are opened in this call."""
    from ferrotype.engine.references import Access
    from ferrotype.errors import UsageError

    if sector_size is not None and (sector_size & (sector_size - 1) or not 512 <= sector_size <= 65536):
        raise UsageError("a sector size is a power of two from 512 to 65536")
    return Access(frame.secret, format, sector_size, frame.secret_given, frame.opener, frame.patience)
