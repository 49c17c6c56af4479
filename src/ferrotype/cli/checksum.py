"""``ferrotype checksum``."""

from __future__ import annotations

import click

from ferrotype.cli.access import Opening, access_options
from ferrotype.cli.frame import REFERENCE, Frame, options


@click.command("checksum")
@click.argument("ref", type=REFERENCE)
@access_options
@options
def command(frame: Frame, ref: str, opening: Opening) -> None:
    """One content hash of REF: the same for the same bytes on a device, in a file, and in a backup."""
    with frame.run() as job:
        from ferrotype.engine.checksum import ALGORITHM, checksum_of
        from ferrotype.engine.references import open_disk
        from ferrotype.engine.unreadable import as_json

        with open_disk(ref, opening.access(frame), job) as disk:
            done = checksum_of(disk, job)
        document = {"algorithm": ALGORITHM, "digest": done.digest, "size": done.size}
        frame.answer(document | {"unreadable": as_json(done.unreadable)}, f"{done.digest}  {ref}")
