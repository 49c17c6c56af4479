"""``ferrotype map``."""

from __future__ import annotations

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
        from ferrotype.engine.info import disk_info, extents_json
        from ferrotype.engine.references import open_disk

        with open_disk(ref, opening.access(frame), job) as disk:
            survey = disk_info(disk, job).survey
        extents = extents_json(survey)
        lines = [f"{'start':>16} {'length':>16}  what"]
        for extent in extents:
            words = [word for word in ("data", "zero", "free") if extent[word]] or ["hole"]
            lines.append(f"{extent['start']:>16} {extent['length']:>16}  {' '.join(words)}")
        frame.show({"extents": extents}, "\n".join(lines))
