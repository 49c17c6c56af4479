"""``ferrotype restore``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ferrotype.cli.access import Opening, access_options
from ferrotype.cli.frame import IMAGE, REFERENCE, Frame, options
from ferrotype.cli.overwriting import confirm
from ferrotype.units import format_size

if TYPE_CHECKING:
    from ferrotype.engine.references import OpenDisk
    from ferrotype.engine.room import Need
    from ferrotype.engine.writing import Written


@click.command("restore")
@click.argument("ref", type=REFERENCE)
@click.argument("target", type=IMAGE)
@click.option("--force", is_flag=True, help="Overwrite TARGET without asking.")
@click.option("--delta", is_flag=True, help="Read TARGET first and write only what differs.")
@click.option("--no-blank", is_flag=True, help="TARGET is known to be all zeros: do not zero it.")
@click.option("--verify-after", is_flag=True, help="Read back all that was written, and prove it.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be written; write nothing.")
@click.option("-O", "--output-format", metavar="FORMAT", help="Make TARGET a disk image of this format.")
@click.option("-c", "--compress", is_flag=True, help="The compressed kind of the format.")
@click.option(
    "-o", "--option", "texts", multiple=True, metavar="NAME=VALUE", help="An option of the format; help: lists them."
)
@access_options
@options
def command(
    frame: Frame,
    ref: str,
    target: Path,
    force: bool,
    delta: bool,
    no_blank: bool,
    verify_after: bool,
    dry_run: bool,
    output_format: str | None,
    compress: bool,
    texts: tuple[str, ...],
    opening: Opening,
) -> None:
    """Write a disk of a backup, or one partition of it (REF#2), to TARGET: a disk, a partition or a file.

    REF leads into a backup; convert writes any other disk, onto devices too.
    A new file is a disk image of the format that its suffix (.qcow2 .vhdx .E01 ...) or -O says, else a raw disk.
    Everything on the target is overwritten.  A target that is mounted, in use, too small, of another sector size, or
    that holds the image is refused.
    """
    with frame.run() as job:
        from ferrotype.engine.larger import say_leftovers
        from ferrotype.engine.references import open_disk
        from ferrotype.engine.restore import RestoreOptions, check_target, restore
        from ferrotype.engine.room import Need, free_for, need_of
        from ferrotype.engine.space import check_restore, stored_bytes
        from ferrotype.engine.targets import check_fits, open_target, refuse_harm
        from ferrotype.engine.unreadable import as_json
        from ferrotype.engine.writing import NewImage, check_image, options_help, parse_options, write_image
        from ferrotype.errors import UsageError

        format = _format(target, output_format, whole=bool(compress or texts))
        if format is not None and (delta or no_blank):
            raise UsageError(f"--delta and --no-blank are for raw disks; {target} would be a new {format} image")
        if format is not None and "help" in texts:
            known = options_help(format).splitlines()
            frame.answer({"format": format, "options": known}, known)
            return
        chosen_options = parse_options(format, texts) if format is not None else {}
        with open_disk(ref, opening.access(frame), job) as disk:
            part = disk.part
            if format is not None:
                wanted = NewImage(
                    target,
                    format,
                    compress,
                    chosen_options,
                    replace=target.exists(),
                    patience=frame.patience,
                    verify_after=verify_after,
                )
                check_image(disk, wanted, "restored")
                if format == "ferro":
                    raise UsageError(f"{target}: a backup goes into another image with copy, a disk with convert")
                if dry_run:
                    need = need_of(disk.source, wanted)
                    need.check(target)
                    frame.answer(*_planned(part.length, disk, target, need))
                    return
                if not force and target.exists():
                    confirm(frame, target, disk.reference.text)
                written = write_image(disk, wanted, job)
                frame.show(*_written(target, written))
                return
            in_place = target.is_block_device() or (delta and target.exists())
            refuse_harm(target, disk.files)
            if in_place:
                check_fits(target, part.length, part.disk.sector_size)
            else:
                check_restore(part, target)
            if dry_run:
                stored = None if in_place else stored_bytes(part)
                if in_place:
                    say_leftovers(target, part.length, job)
                frame.answer(
                    *_planned(
                        part.length, disk, target, None if stored is None else Need(stored, stored, free_for(target))
                    )
                )
                return
            if not force and target.exists():
                confirm(frame, target, disk.reference.text)
            with open_target(
                target,
                part.length,
                part.disk.sector_size,
                in_place=in_place,
                mode=disk.permissions,
                patience=frame.patience,
            ) as opened:
                check_target(part, opened.sink)
                chosen = RestoreOptions(no_blank, delta and opened.source is not None, verify_after=verify_after)
                done = restore(
                    part, opened.sink, chosen, job, target=opened.source, reread=opened.reread, what=target
                )
        document: dict[str, object] = {
            "disk_bytes": done.disk_bytes,
            "written_bytes": done.written_bytes,
            "zeroed_bytes": done.zeroed_bytes,
            "kept_bytes": done.kept_bytes,
            "table_moved": done.table_moved,
            "removed": [mark._asdict() for mark in done.removed],
            "verified": done.verified,
            "seconds": round(done.seconds, 3),
            "unreadable": as_json(done.unreadable),
        }
        kind = "" if target.is_block_device() else " as raw"
        text = f"restored {format_size(done.disk_bytes)} to {target}{kind} in {done.seconds:.1f} s: "
        text += f"{format_size(done.written_bytes)} written, {format_size(done.zeroed_bytes)} zeroed"
        text += f", {format_size(done.kept_bytes)} was right already" if delta else ""
        text += "; the backup partition table was moved to the end of the larger disk" if done.table_moved else ""
        text += "; read back and proven" if done.verified else ""
        frame.show(document, text)


def _format(target: Path, named: str | None, *, whole: bool) -> str | None:
    """The format of the disk image that the target is to be; None: it is written as it is, raw or a device."""
    from ferrotype.engine.targets import refuse_misnamed
    from ferrotype.engine.writing import chosen_format
    from ferrotype.errors import UsageError
    from ferrotype.formats.registry import FORMATS, format_of_suffix

    if target.is_block_device():
        if named not in (None, "raw") or whole:
            raise UsageError(f"{target} is a device, which holds no image of another format")
        return None
    if named is None and not whole:
        found = format_of_suffix(target)
        if found != "raw" and found is not None and FORMATS[found].writable:
            return found
        refuse_misnamed(target)
        return None
    format = chosen_format(target, named)
    return None if format == "raw" and not whole else format


def _written(target: Path, done: Written) -> tuple[dict[str, object], str]:
    from ferrotype.engine.unreadable import as_json

    copied = done.copied
    document: dict[str, object] = {
        "format": done.format,
        "disk_bytes": copied.disk_bytes,
        "written_bytes": copied.written_bytes,
        "zeroed_bytes": 0,
        "kept_bytes": 0,
        "table_moved": False,
        "removed": [],
        "verified": done.verified,
        "stored_bytes": done.stored_bytes,
        "seconds": round(copied.seconds, 3),
        "unreadable": as_json(copied.unreadable),
    }
    text = f"restored {format_size(copied.disk_bytes)} to {target} as {done.format} in {copied.seconds:.1f} s: "
    text += f"{format_size(done.stored_bytes)} stored"
    return document, text + ("; read back and proven" if done.verified else "")


def _planned(size: int, disk: OpenDisk, target: Path, need: Need | None) -> tuple[dict[str, object], str]:
    """What a dry run says; ``need``: of a new file."""
    document: dict[str, object] = {"dry_run": True, "disk_bytes": size} | (need.as_json() if need else {})
    said = need.text if need else ""
    return (
        document,
        f"would write {format_size(size)} from {disk.reference.text} to {target}{said}; nothing was written",
    )
