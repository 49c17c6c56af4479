"""``ferrotype compact``."""

from __future__ import annotations

from pathlib import Path

import click

from ferrotype.cli.frame import IMAGE, Frame, options
from ferrotype.units import format_size


@click.command("compact")
@click.argument("image", type=IMAGE)
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be given back; change nothing.")
@options
def command(frame: Frame, image: Path, dry_run: bool) -> None:
    """Move what is needed of IMAGE together and cut the file; needs at most 256 MiB of extra space."""
    with frame.run() as job:
        from ferrotype.engine.compact import compact
        from ferrotype.engine.opening import open_container
        from ferrotype.engine.space import check_compact

        container = open_container(image, writable=not dry_run, opener=frame.opener)
        try:
            for warning in container.warnings:
                job.warn(warning)
            before = container.file_size
            gap = before - container.live_size
            if dry_run:
                frame.answer(
                    {"dry_run": True, "file_bytes": before, "dead_bytes": gap},
                    (
                        f"{format_size(gap)} of the {format_size(before)} of {image} would be given back; "
                        "nothing was changed"
                    ),
                )
                return
            check_compact(container)
            job.begin("compacting", gap)
            freed = compact(container, job)
            after = container.file_size
        finally:
            container.close()
        frame.show(
            {"freed_bytes": freed, "file_bytes": after},
            f"{image} has {format_size(after)} now, {format_size(freed)} less than before",
        )
