"""``ferrotype compare``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import click

from ferrotype.cli import exits
from ferrotype.cli.access import Opening, access_options
from ferrotype.cli.frame import REFERENCE, Frame, options
from ferrotype.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ferrotype.engine.compare import Comparison

_SHOWN: Final = 20  # ranges; the JSON document has more


@click.command("compare")
@click.argument("ref", type=REFERENCE)
@click.argument("other", type=REFERENCE, metavar="REF")
@click.option("--strict", is_flag=True, help="Sizes, and what is stored and what is known to be zeros, count too.")
@click.option("--other-format", metavar="FORMAT", help="Like --format, for the second one; default: as --format.")
@access_options
@options
def command(frame: Frame, ref: str, other: str, strict: bool, other_format: str | None, opening: Opening) -> None:
    """Whether two disks hold the same bytes, whatever they are kept in; exit code 1 if not, and where."""
    with frame.run() as job:
        from ferrotype.engine.compare import compare_disks
        from ferrotype.engine.references import open_disk

        access = replace(opening.access(frame), secret_given=False)  # one of them may need it
        second = replace(access, format=other_format or access.format)
        with open_disk(ref, access, job) as one, open_disk(other, second, job) as two:
            result = compare_disks(one, two, job, strict=strict)
        if result.first_difference is not None:
            frame.code = exits.NO
        frame.show(result.as_json(), lambda: _lines(result))


def _lines(result: Comparison) -> Iterator[str]:
    if result.identical:
        yield f"identical: {format_size(max(result.sizes))}"
        return
    if result.first_difference is None:
        yield "nothing differs in what can be read, and not all can be: nobody knows whether they are identical"
        return
    yield f"they differ, first at byte {result.first_difference}"
    for what, ranges in (("differ", result.differences), ("are stored in one only", result.allocation)):
        for start, length in ranges[:_SHOWN]:
            yield f"{length:>16} bytes at {start} {what}"
        if len(ranges) > _SHOWN:
            yield f"{'':>16} and {len(ranges) - _SHOWN} more ranges; --json lists them"
