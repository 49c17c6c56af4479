"""``ferrotype info``."""

from __future__ import annotations

import click

from ferrotype.cli.access import Opening, access_options
from ferrotype.cli.frame import REFERENCE, Frame, options
from ferrotype.units import format_size


@click.command("info")
@click.argument("ref", type=REFERENCE)
@access_options
@options
def command(frame: Frame, ref: str, opening: Opening) -> None:
    """Format, size, partition table, volumes, used and free, and a drawn map of REF."""
    with frame.run() as job:
        from ferrotype.cli.drawing import disk_bar, volume_rows
        from ferrotype.engine.info import disk_info
        from ferrotype.engine.references import open_disk
        from ferrotype.extents import State

        with open_disk(ref, opening.access(frame), job) as disk:
            info = disk_info(disk, job)
        survey = info.survey
        document = info.as_json()
        if disk.snapshot is not None:
            document["snapshot"] = disk.snapshot.id
        table = {"gpt": "GPT", "mbr": "MBR", "apm": "Apple partition map"}.get(
            survey.table.kind if survey.table else "", "no partition table"
        )
        head = f"{ref}: {info.format}, {format_size(survey.size)} ({survey.size} bytes), "
        head += f"{survey.sector_size}-byte sectors, {table}"
        free, zero = survey.extents.total(State.FREE), survey.extents.total(State.ZERO)
        kept = survey.size - survey.extents.total(State.FREE | State.ZERO)
        tail = (
            f"{format_size(kept)} to keep, {format_size(free)} free in file systems, {format_size(zero)} known zeros"
        )
        frame.show(document, "\n".join((head, disk_bar(survey), volume_rows(survey), tail)))
