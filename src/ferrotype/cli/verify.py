"""``ferrotype verify``."""

from __future__ import annotations

from pathlib import Path

import click

from ferrotype.cli import exits
from ferrotype.cli.frame import IMAGE, SHARE, Frame, options
from ferrotype.units import format_size


@click.command("verify")
@click.argument("image", type=IMAGE)
@click.option("--deep", is_flag=True, help="Decode everything and prove the plaintext.")
@click.option("--sample", type=SHARE, default="100%", show_default=True, help="Check a random share of the packs.")
@options
def command(frame: Frame, image: Path, deep: bool, sample: float) -> None:
    """Prove that every stored byte of IMAGE is what was written; exit code 1 if not, and what is hit."""
    with frame.run() as job:
        from ferrotype.engine.verify import VerifyOptions, verify

        with frame.open_image(image) as repository:
            result = verify(repository, VerifyOptions(deep, sample), job)
            names = {snapshot.id: snapshot.name for snapshot in repository.snapshots()}
        damaged = [
            {"snapshot": d.snapshot, "disk": d.disk, "start": d.start, "length": d.length, "files": list(d.files)}
            for d in result.damaged
        ]
        document: dict[str, object] = {
            "ok": result.ok,
            "checked_bytes": result.checked_bytes,
            "objects": result.objects,
            "damaged": damaged,
            "problems": result.problems,
        }
        lines = list(result.problems)
        lines += [
            f"snapshot {d.snapshot[:8]} ({names.get(d.snapshot, '?')}), disk {d.disk}: "
            f"{d.length} bytes at {d.start} cannot be given back"
            for d in result.damaged
        ]
        what = "decoded and proven" if deep else "proven"
        lines.append(
            f"{image}: {format_size(result.checked_bytes)} in {result.objects} objects {what}: "
            + ("no damage" if result.ok else "DAMAGED")
        )
        if not result.ok:
            frame.code = exits.NO
        frame.show(document, "\n".join(lines))
