"""``ferrotype salvage``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ferrotype.cli.frame import IMAGE, SIZE, Frame, options

if TYPE_CHECKING:
    from ferrotype.engine.salvage import Salvaged, SalvageResult

_NAMED: Final = 20  # files shown of each range; the JSON document has them all


@click.command("salvage")
@click.argument("image", type=IMAGE)
@click.argument("out", type=IMAGE, required=False)
@click.option("--split", type=SIZE, help="Split OUT into files of this size.")
@options
def command(frame: Frame, image: Path, out: Path | None, split: int | None) -> None:
    """Find all that is left of a damaged IMAGE, say exactly what is lost, and make a new image OUT of the rest.

    IMAGE is only read.  Any of its volumes may be named, and any may be missing.
    """
    with frame.run() as job:
        from ferrotype.engine.salvage import salvage
        from ferrotype.errors import UsageError

        if split and out is None:
            raise UsageError("--split says how to write OUT; name it")
        place = frame.memory.before(image) if frame.memory else None
        result = salvage(
            image,
            frame.secret,
            job,
            secret_given=frame.secret_given,
            out=out,
            split=split or 0,
            opener=frame.opener,
        )
        for problem in result.problems:
            (job.warn if problem in result.doubts else job.note)(problem)
        for snapshot_id in result.lost_snapshots:
            job.warn(f"snapshot {snapshot_id[:8]} is lost: its own record cannot be read")
        if place is not None:
            found = {*result.lost_snapshots, *(one.snapshot.id for one in result.snapshots)}
            if missing := place.lacks(result.image, result.container, found):
                job.warn(missing)
        for one in result.snapshots:
            for sentence in _losses(one):
                job.warn(sentence)
        say = frame.answer if out is None else frame.show
        say(_document(result), _text(result, image, out))


def _losses(one: Salvaged) -> list[str]:
    sentences = []
    for lost in one.lost:
        sentence = (
            f"snapshot {one.snapshot.id[:8]} ({one.snapshot.name}), disk {lost.disk}: "
            f"{lost.length} bytes at {lost.start} are lost"
        )
        if lost.files:
            more = len(lost.files) - _NAMED
            sentence += f"; in {', '.join(lost.files[:_NAMED])}" + (f" and {more} more" if more > 0 else "")
        sentences.append(sentence)
    return sentences


def _document(result: SalvageResult) -> dict[str, object]:
    return {
        "snapshots": [
            {
                "id": one.snapshot.id,
                "name": one.snapshot.name,
                "created": one.snapshot.created.isoformat().replace("+00:00", "Z"),
                "complete": one.complete,
                "lost": [
                    {"disk": d.disk, "start": d.start, "length": d.length, "files": list(d.files)} for d in one.lost
                ],
            }
            for one in result.snapshots
        ],
        "lost_snapshots": result.lost_snapshots,
        "chunks": {
            "intact": result.intact,
            "damaged": result.damaged,
            "missing": result.missing,
            "unused": result.unused,
        },
        "problems": result.problems,
        "kept": [snapshot.id for snapshot in result.kept],
    }


def _text(result: SalvageResult, image: Path, out: Path | None) -> str:
    complete = sum(one.complete for one in result.snapshots)
    parts = [f"{complete} complete", f"{len(result.snapshots) - complete} with losses"]
    if result.lost_snapshots:
        parts.append(f"{len(result.lost_snapshots)} lost")
    text = (
        f"{image}: snapshots: {', '.join(parts)}; chunks: {result.intact} intact, {result.damaged} damaged, "
        f"{result.missing} missing"
    )
    if result.unused:
        text += f", {result.unused} that no snapshot found needs"
    return text + (f"; kept in {out}: {len(result.kept)}" if out is not None else "")
