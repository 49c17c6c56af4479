"""``ferrotype restore``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ferrotype.cli.access import Opening, access_options
from ferrotype.cli.frame import IMAGE, REFERENCE, Frame, options
from ferrotype.cli.progress import asking
from ferrotype.units import format_size

if TYPE_CHECKING:
    from ferrotype.engine.references import OpenDisk


@click.command("restore")
@click.argument("ref", type=REFERENCE)
@click.argument("target", type=IMAGE)
@click.option("--force", is_flag=True, help="Overwrite TARGET without asking.")
@click.option("--delta", is_flag=True, help="Read TARGET first and write only what differs.")
@click.option("--no-blank", is_flag=True, help="TARGET is known to be all zeros: do not zero it.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be written; write nothing.")
@access_options
@options
def command(
    frame: Frame,
    ref: str,
    target: Path,
    force: bool,
    delta: bool,
    no_blank: bool,
    dry_run: bool,
    opening: Opening,
) -> None:
    """Write a disk of a backup, or one partition of it (REF#2), to TARGET: a disk, a partition or a file.

    Everything on the target is overwritten.  A target that is mounted, in use, too small, of another sector size, or
    that holds the image is refused.
    """
    with frame.run() as job:
        from ferrotype.engine.references import open_disk
        from ferrotype.engine.restore import RestoreOptions, check_target, restore
        from ferrotype.engine.space import check_restore
        from ferrotype.engine.targets import check_fits, image_files, open_target, refuse_harm

        with open_disk(ref, opening.access(frame), job) as disk:
            part = disk.part
            in_place = target.is_block_device() or (delta and target.exists())
            refuse_harm(target, image_files(disk.reference.path))
            if in_place:
                check_fits(part, target)
            else:
                check_restore(part, target)
            if not force and not dry_run and target.exists():
                _ask(frame, target, disk)
            if dry_run:
                frame.show(
                    {"dry_run": True, "disk_bytes": part.length},
                    f"would write {format_size(part.length)} from {disk.reference.text} to {target}; "
                    "nothing was written",
                )
                return
            with open_target(
                target, part.length, part.disk.sector_size, in_place=in_place, patience=frame.patience
            ) as opened:
                check_target(part, opened.sink)
                chosen = RestoreOptions(no_blank, delta and opened.source is not None)
                done = restore(part, opened.sink, chosen, job, target=opened.source)
        document: dict[str, object] = {
            "disk_bytes": done.disk_bytes,
            "written_bytes": done.written_bytes,
            "zeroed_bytes": done.zeroed_bytes,
            "kept_bytes": done.kept_bytes,
            "table_moved": done.table_moved,
            "seconds": round(done.seconds, 3),
        }
        text = f"restored {format_size(done.disk_bytes)} to {target} in {done.seconds:.1f} s: "
        text += f"{format_size(done.written_bytes)} written, {format_size(done.zeroed_bytes)} zeroed"
        text += f", {format_size(done.kept_bytes)} was right already" if delta else ""
        text += "; the backup partition table was moved to the end of the larger disk" if done.table_moved else ""
        frame.show(document, text)


def _ask(frame: Frame, target: Path, disk: OpenDisk) -> None:
    """At a terminal the user types the target's name; anywhere else ``--force`` is needed."""
    from ferrotype.errors import Refused

    if not frame.interactive:
        raise Refused(f"{target} exists and would be overwritten; say --force if that is meant")
    click.echo(f"Everything on {target} will be overwritten with {disk.reference.text}.", err=True)
    with asking():
        typed = click.prompt(f"Type {target.name} to go on", err=True, default="", show_default=False)
    if typed != target.name:
        raise Refused("the name was not typed; nothing was written")
