"""``ferrotype list``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ferrotype.cli.frame import IMAGE, Frame, options
from ferrotype.units import format_size

if TYPE_CHECKING:
    from ferrotype.cli.tables import Cell
    from ferrotype.engine.same_disks import Together
    from ferrotype.repository.snapshots import Snapshot


@click.command("list")
@click.argument("image", type=IMAGE)
@options
def command(frame: Frame, image: Path) -> None:
    """The snapshots of IMAGE, oldest first: when, what, how large, how much of it was new."""
    with frame.run() as job:
        from ferrotype.engine.same_disks import number_of, together
        from ferrotype.engine.unreadable import as_json, tell_of_snapshots
        from ferrotype.repository.store import NOTHING_FOUND

        with frame.open_image(image, job) as repository:
            known = repository.snapshots()
            damaged = bool(repository.warnings)
        groups = together(known)
        numbers = number_of(groups)
        tell_of_snapshots(known, job)
        documents: list[dict[str, object]] = [
            {
                "id": snapshot.id,
                "created": snapshot.created.isoformat().replace("+00:00", "Z"),
                "name": snapshot.name,
                "host": snapshot.host,
                "tags": list(snapshot.tags),
                "parent": snapshot.parent,
                "order": snapshot.order,
                "group": numbers[snapshot.id],
                "disks": [
                    {
                        "name": disk.name,
                        "size": disk.size,
                        "sector_size": disk.sector_size,
                        "unreadable": as_json(disk.unreadable),
                    }
                    for disk in snapshot.disks
                ],
                "read_bytes": snapshot.statistics.read_bytes,
                "stored_bytes": snapshot.statistics.stored_bytes,
            }
            for snapshot in known
        ]
        document: dict[str, object] = {"snapshots": documents, "groups": [group.as_json() for group in groups]}
        nothing = f"{image}: {NOTHING_FOUND}" if damaged else f"{image} holds no snapshot yet"
        frame.answer(document, lambda: _drawn(known, groups) if known else nothing)


def _drawn(known: Sequence[Snapshot], groups: Sequence[Together]) -> list[str]:
    """The snapshots; and, where there are several disks, which of them are of the same one."""
    from ferrotype.cli.tables import table
    from ferrotype.engine.same_disks import number_of

    columns = [("snapshot", "left"), ("taken", "left"), ("what", "left"),
               ("disk", "right"), ("data", "right"), ("new", "right")]  # fmt: skip
    rows: list[list[Cell]] = [
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
    if len(groups) < 2:
        return table(columns, rows)
    numbers = number_of(groups)
    for row, snapshot in zip(rows, known, strict=True):
        row.append(str(numbers[snapshot.id]))
    lines = [f"group {group.number}: {group.title}" for group in groups]
    return [*table([*columns, ("group", "right")], rows), "", *lines]
