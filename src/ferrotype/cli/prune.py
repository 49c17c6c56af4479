"""``ferrotype prune``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ferrotype.cli.frame import IMAGE, Frame, options
from ferrotype.units import format_size

if TYPE_CHECKING:
    from ferrotype.engine.prune import PruneResult


@click.command("prune")
@click.argument("image", type=IMAGE)
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be given back; change nothing.")
@options
def command(frame: Frame, image: Path, dry_run: bool) -> None:
    """Give back the space of what no snapshot of IMAGE needs, in place where the file system can."""
    with frame.run() as job:
        from ferrotype.engine.prune import prune

        with frame.open_image(image, job, writable=not dry_run) as repository:
            result = prune(repository, job, dry_run=dry_run)
        say = frame.answer if dry_run else frame.show
        say(as_json(result) | {"dry_run": dry_run}, as_text(result, image, dry_run=dry_run))


def as_json(result: PruneResult) -> dict[str, object]:
    return asdict(result)


def as_text(result: PruneResult, image: Path, *, dry_run: bool) -> str:
    packs = f"{result.deleted_packs} packs deleted, {result.rewritten_packs} rewritten"
    if dry_run:
        return f"{format_size(result.dead_bytes)} of {image} would be given back; nothing was changed"
    text = f"{format_size(result.freed_bytes)} given back ({packs}); {format_size(result.live_bytes)} are needed"
    if result.remaining_bytes:
        text += f"; {format_size(result.remaining_bytes)} more come back with `ferrotype compact {image}`"
    if result.readers:
        text += "; the image is being read, so its space comes back with a later `ferrotype prune`"
    return text
