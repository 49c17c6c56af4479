"""``ferrotype convert``."""

from __future__ import annotations

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
    opening: Opening,
) -> None:
    """Write the disk REF, whatever it is kept in, to OUT as a disk image of another kind.

    The format is that of OUT's suffix (.raw .qcow2 .vhd .vhdx .vmdk .vdi .E01 .ferro) or of -O.  OUT has its name
    only when it is complete.
    """
    with frame.run() as job:
        from ferrotype.engine.references import open_disk
        from ferrotype.engine.writing import NewImage, chosen_format, options_help, parse_options, write_image

        format = chosen_format(out, output_format)
        if "help" in texts:
            click.echo(options_help(format))
            return
        wanted = NewImage(
            out, format, compress, parse_options(format, texts), backing, backing_format, force, frame.patience
        )
        with open_disk(ref, opening.access(frame), job) as disk:
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
