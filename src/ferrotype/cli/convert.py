"""``ferrotype convert``."""

from __future__ import annotations

from dataclasses import replace
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
    from ferrotype.engine.writing import NewImage, Written


@click.command("convert")
@click.argument("ref", type=REFERENCE)
@click.argument("out", type=IMAGE)
@click.option("-O", "--output-format", metavar="FORMAT", help="Format of OUT, where its suffix does not say it.")
@click.option("-c", "--compress", is_flag=True, help="The compressed kind of the format.")
@click.option(
    "-o", "--option", "texts", multiple=True, metavar="NAME=VALUE", help="An option of the format; help: lists them."
)
@click.option("-B", "--backing", type=IMAGE, help="Make OUT over this file: only what differs from it is stored.")
@click.option("--backing-format", metavar="FORMAT", help="Format of the backing file.")
@click.option("--force", is_flag=True, help="Replace OUT where it exists; overwrite a device without asking.")
@click.option("--verify-after", is_flag=True, help="Read back all that was written, and prove it.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be read and written; write nothing.")
@access_options
@options
def command(
    frame: Frame,
    ref: str,
    out: Path,
    output_format: str | None,
    compress: bool,
    texts: tuple[str, ...],
    backing: Path | None,
    backing_format: str | None,
    force: bool,
    verify_after: bool,
    dry_run: bool,
    opening: Opening,
) -> None:
    """Write the disk REF, whatever it is kept in, to OUT: a disk image of another kind, or a device.

    The format is that of OUT's suffix (.raw .qcow2 .vhd .vhdx .vmdk .vdi .E01 .ferro) or of -O.  OUT has its name
    only when it is complete.

    A device is overwritten in place, after the name of it was typed, or with --force.  One that is mounted, in use,
    too small, of another sector size, or that holds what is read is refused.
    """
    with frame.run() as job:
        from ferrotype.engine.references import open_disk
        from ferrotype.engine.room import need_of
        from ferrotype.engine.writing import (
            NewImage,
            check_image,
            chosen_format,
            options_help,
            parse_options,
            write_image,
        )

        device = out.is_block_device()
        format = chosen_format(out, output_format)
        if "help" in texts:
            known = options_help(format).splitlines()
            frame.answer({"format": format, "options": known}, known)
            return
        access = opening.access(frame)
        secret = None
        if format == "ferro" and frame.secret_given:  # it is for OUT as well
            access, secret = replace(access, secret_given=False), frame.new_secret(out)
        chosen = parse_options(format, texts)
        wanted = NewImage(
            out,
            format,
            compress,
            chosen,
            backing,
            backing_format,
            force or device,
            frame.patience,
            secret,
            verify_after,
        )
        with open_disk(ref, access, job) as disk:
            if device or dry_run:
                check_image(disk, wanted)
            if dry_run:
                need = None if device else need_of(disk.source, wanted)
                if need is not None:
                    need.check(out)
                frame.answer(*_planned(disk, wanted, need))
                return
            if device and not force:
                confirm(frame, out, disk.reference.text)
            done = write_image(disk, wanted, job)
        frame.show(*_done(out, done, device=device))


def _planned(disk: OpenDisk, wanted: NewImage, need: Need | None) -> tuple[dict[str, object], str]:
    """What a dry run says; ``need``: of a file."""
    from ferrotype.extents import State

    size = disk.source.size
    read = size - disk.source.extents(0, size).total(State.ZERO)
    document: dict[str, object] = {
        "dry_run": True,
        "format": wanted.format,
        "disk_bytes": size,
        "read_bytes": read,
    }
    text = f"would read {format_size(read)} of {format_size(size)} and write "
    if need is None:
        return document, f"{text}{format_size(size)} to {wanted.path}; nothing was written"
    return document | need.as_json(), f"{text}{wanted.path} as {wanted.format}{need.text}; nothing was written"


def _done(out: Path, done: Written, *, device: bool) -> tuple[dict[str, object], str]:
    from ferrotype.engine.unreadable import as_json

    copied = done.copied
    document: dict[str, object] = {
        "format": done.format,
        "disk_bytes": copied.disk_bytes,
        "read_bytes": copied.read_bytes,
        "written_bytes": copied.written_bytes,
        "stored_bytes": done.stored_bytes,
        "verified": done.verified,
        "seconds": round(copied.seconds, 3),
        "unreadable": as_json(copied.unreadable),
    }
    if not device:
        text = f"{out}: {done.format}, {format_size(copied.disk_bytes)} of disk in {format_size(done.stored_bytes)}"
        text += f", {copied.seconds:.1f} s"
        return document, text + ("; read back and proven" if done.verified else "")
    document |= {"zeroed_bytes": done.zeroed_bytes, "table_moved": done.table_moved}
    text = f"wrote {format_size(copied.disk_bytes)} to {out} in {copied.seconds:.1f} s: "
    text += f"{format_size(copied.written_bytes)} written, {format_size(done.zeroed_bytes)} zeroed"
    text += "; the backup partition table was moved to the end of the larger disk" if done.table_moved else ""
    return document, text + ("; read back and proven" if done.verified else "")
