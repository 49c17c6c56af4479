"""``ferrotype disks``."""

from __future__ import annotations

import click

from ferrotype.cli.frame import Frame, options
from ferrotype.units import format_size


@click.command("disks")
@options
def command(frame: Frame) -> None:
    """What can be imaged here: disks, their partitions, where they are mounted, what they hold."""
    with frame.run() as job:
        from ferrotype.block.device import open_source
        from ferrotype.block.disks import disks
        from ferrotype.cli.tables import table
        from ferrotype.engine.survey import survey
        from ferrotype.errors import FerrotypeError

        documents, rows = [], []
        for disk in disks():
            try:
                source = open_source(disk.path)
                try:
                    surveyed = survey(source, allocation=False)
                finally:
                    source.close()
            except FerrotypeError as error:
                job.warn(str(error))
                surveyed = None
            mounts = {p.start: list(p.mounts) for p in disk.partitions} | {-1: list(disk.mounts)}
            volumes = []
            for volume in surveyed.volumes if surveyed else ():
                where = mounts.get(volume.start, []) if volume.index else mounts[-1]
                volumes.append(volume.as_json() | {"mounts": where})
            documents.append(
                {
                    "path": str(disk.path),
                    "size": disk.size,
                    "sector_size": disk.sector_size,
                    "model": disk.model,
                    "serial": disk.serial,
                    "removable": disk.removable,
                    "rotational": disk.rotational,
                    "read_only": disk.read_only,
                    "table": surveyed.table.kind if surveyed and surveyed.table else None,
                    "mounts": list(disk.mounts),
                    "volumes": volumes,
                }
            )
            rows.append([str(disk.path), format_size(disk.size), disk.model or "", "", ", ".join(disk.mounts)])
            for entry in volumes:
                number = f"  #{entry['index']}" if entry["index"] else "  whole disk"
                size, held = format_size(int(str(entry["size"]))), str(entry["filesystem"] or "unknown")
                rows.append([number, size, str(entry["label"] or ""), held, ", ".join(entry["mounts"])])  # type: ignore[arg-type]
        columns = [
            ("disk", "left"),
            ("size", "right"),
            ("model or label", "left"),
            ("holds", "left"),
            ("mounted", "left"),
        ]
        frame.answer({"disks": documents}, table(columns, rows) if rows else "there is no disk to be seen here")
