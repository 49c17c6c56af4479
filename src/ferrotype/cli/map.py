"""``ferrotype map``."""

from __future__ import annotations

from collections.abc import Iterator

import click

from ferrotype.cli.access import Opening, access_options
from ferrotype.cli.frame import REFERENCE, Frame, options


@click.command("map")
@click.argument("ref", type=REFERENCE)
@access_options
@options
def command(frame: Frame, ref: str, opening: Opening) -> None:
    """The allocation map of REF: which bytes hold data, which are zero, which no file system uses."""
    with frame.run() as job:
        from ferrotype.block.lenient import known_unreadable
        from ferrotype.engine.info import disk_map
        from ferrotype.engine.references import open_disk
        from ferrotype.engine.unreadable import as_json

        with open_disk(ref, opening.access(frame), job) as disk:
            extents = disk_map(disk, job)
            lost = as_json(known_unreadable(disk.source))
        frame.answer({"extents": extents, "unreadable": lost}, lambda: _lines(extents))


def _lines(extents: list[dict[str, object]]) -> Iterator[str]:
    yield f"{'start':>16} {'length':>16}  what"
    for extent in extents:
        words = [word for word in ("data", "zero", "free", "compressed") if extent.get(word)] or ["hole"]
        if extent.get("offset") is not None:
            words.append(f"at {extent['offset']}")
        if extent.get("depth"):
            words.append(f"in layer {extent['depth']} below")
        yield f"{extent['start']:>16} {extent['length']:>16}  {' '.join(words)}"
