"""``ferrotype list``."""

from __future__ import annotations

from pathlib import Path

import click

from ferrotype.cli.frame import IMAGE, Frame, options
from ferrotype.units import format_size


@click.command("list")
@click.argument("image", type=IMAGE)
@options
def command(frame: Frame, image: Path) -> None:
    """The snapshots of IMAGE, oldest first: when, what, how large, how much of it was new."""
    with frame.run() as job:
        from ferrotype.cli.drawing import rendered, table
        from ferrotype.engine.references import open_image

        with open_image(image, frame.secret) as repository:
            known = repository.snapshots()
            for warning in repository.warnings:
                job.warn(warning)
        documents: list[dict[str, object]] = [
            {
                "id": snapshot.id,
                "created": snapshot.created.isoformat().replace("+00:00", "Z"),
                "name": snapshot.name,
                "host": snapshot.host,
                "tags": list(snapshot.tags),
                "parent": snapshot.parent,
                "disks": [
                    {"name": disk.name, "size": disk.size, "sector_size": disk.sector_size} for disk in snapshot.disks
                ],
                "read_bytes": snapshot.statistics.read_bytes,
                "stored_bytes": snapshot.statistics.stored_bytes,
            }
            for snapshot in known
        ]
        rows = [
            [
                snapshot.id[:8],
                snapshot.created.astimezone().strftime("%Y-%m-%d %H:%M:%S"),
                snapshot.name + (f" [{', '.join(snapshot.tags)}]" if snapshot.tags else ""),
                format_size(sum(disk.size for disk in snapshot.disks)),
                format_size(snapshot.statistics.read_bytes),
                format_size(snapshot.statistics.stored_bytes),
            ]
            for snapshot in known
        ]
        columns = [("snapshot", "left"), ("taken", "left"), ("what", "left"),
                   ("disk", "right"), ("data", "right"), ("new", "right")]  # fmt: skip
        frame.show(
            {"snapshots": documents}, rendered(table(columns, rows)) if rows else f"{image} holds no snapshot yet"
        )
