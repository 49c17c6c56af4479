"""``ferrotype convert``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from ferrotype.cli.access import Opening, access_options
from ferrotype.cli.frame import IMAGE, REFERENCE, Frame, options
from ferrotype.units import format_size


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
@click.option("--force", is_flag=True, help="Replace OUT where it exists.")
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
    dry_run: bool,
    opening: Opening,
) -> None:
    """Write the disk REF, whatever it is kept in, to OUT as a disk image of another kind.

    The format is that of OUT's suffix (.raw .qcow2 .vhd .vhdx .vmdk .vdi .E01 .ferro) or of -O.  OUT has its name
    only when it is complete.
    """
    with frame.run() as job:
        from ferrotype.engine.references import open_disk
        from ferrotype.engine.writing import (
            NewImage,
            check_image,
            chosen_format,
            options_help,
            parse_options,
            write_image,
        )
        from ferrotype.extents import State

        format = chosen_format(out, output_format)
        if "help" in texts:
            frame.show({"format": format, "options": options_help(format).splitlines()}, options_help(format))
            return
        access = opening.access(frame)
        secret = None
        if format == "ferro" and frame.secret_given:  # it is for OUT as well
            access, secret = replace(access, secret_given=False), frame.new_secret(out)
        chosen = parse_options(format, texts)
        wanted = NewImage(out, format, compress, chosen, backing, backing_format, force, frame.patience, secret)
        with open_disk(ref, access, job) as disk:
            if dry_run:
                check_image(disk, wanted)
                size = disk.source.size
                read = size - disk.source.extents(0, size).total(State.ZERO)
                frame.show(
                    {"dry_run": True, "format": format, "disk_bytes": size, "read_bytes": read},
                    f"would read {format_size(read)} of {format_size(size)} and write {out} as {format}; "
                    "nothing was written",
                )
                return
            done = write_image(disk, wanted, job)
        document: dict[str, object] = {
            "format": format,
            "disk_bytes": done.copied.disk_bytes,
            "read_bytes": done.copied.read_bytes,
            "written_bytes": done.copied.written_bytes,
            "stored_bytes": done.stored_bytes,
            "seconds": round(done.copied.seconds, 3),
        }
        text = f"{out}: {format}, {format_size(done.copied.disk_bytes)} of disk in {format_size(done.stored_bytes)}"
        frame.show(document, f"{text}, {done.copied.seconds:.1f} s")
