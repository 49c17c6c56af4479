"""``ferrotype list``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ferrotype.cli.frame import IMAGE, Frame, options
from ferrotype.units import format_size

if TYPE_CHECKING:
    from ferrotype.repository.snapshots import Snapshot


@click.command("list")
@click.argument("image", type=IMAGE)
@options
def command(frame: Frame, image: Path) -> None:
    """The snapshots of IMAGE, oldest first: when, what, how large, how much of it was new."""
    with frame.run() as job:
        with frame.open_image(image, job) as repository:
            known = repository.snapshots()
        documents: list[dict[str, object]] = [
            {
                "id": snapshot.id,
                "created": snapshot.created.isoformat().replace("+00:00", "Z"),
                "name": snapshot.name,
                "host": snapshot.host,
                "tags": list(snapshot.tags),
                "parent": snapshot.parent,
                "order": snapshot.order,
                "disks": [
                    {"name": disk.name, "size": disk.size, "sector_size": disk.sector_size} for disk in snapshot.disks
                ],
                "read_bytes": snapshot.statistics.read_bytes,
                "stored_bytes": snapshot.statistics.stored_bytes,
            }
            for snapshot in known
        ]
        frame.show({"snapshots": documents}, lambda: _drawn(known) if known else f"{image} holds no snapshot yet")


def _drawn(known: Sequence[Snapshot]) -> str:
    from ferrotype.cli.tables import table

    columns = [("snapshot", "left"), ("taken", "left"), ("what", "left"),
               ("disk", "right"), ("data", "right"), ("new", "right")]  # fmt: skip
    rows = [
        [
            snapshot.id[:8],
            snapshot.local_time.strftime("%Y-%m-%d %H:%M:%S"),
            snapshot.name + (f" [{', '.join(snapshot.tags)}]" if snapshot.tags else ""),
            format_size(sum(disk.size for disk in snapshot.disks)),
            format_size(snapshot.statistics.read_bytes),
            format_size(snapshot.statistics.stored_bytes),
        ]
        for snapshot in known
    ]
    return table(columns, rows)
