"""``ferrotype verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ferrotype.cli import exits
from ferrotype.cli.access import Opening, access_options
from ferrotype.cli.frame import IMAGE, SHARE, Frame, options, state_folder
from ferrotype.errors import UsageError
from ferrotype.units import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ferrotype.engine.damage import Damage
    from ferrotype.engine.turns import Progress
    from ferrotype.engine.verify import VerifyResult
    from ferrotype.job import Job

_NAMED: Final = 20  # files shown of each range; the JSON document has them all


@click.command("verify")
@click.argument("image", type=IMAGE)
@click.option("--deep", is_flag=True, help="Decode everything and prove the plaintext.")
@click.option("--sample", type=SHARE, default="100%", show_default=True, help="Check a share of the packs.")
@click.option("--since-last", is_flag=True, help="Go on where the last such run ended, instead of at random.")
@access_options
@options
def command(frame: Frame, image: Path, deep: bool, sample: float, since_last: bool, opening: Opening) -> None:
    """Prove that every stored byte of IMAGE is what was written; exit code 1 if not, and what is hit.

    Disk images of other software are held against the checksums that they carry themselves (E01, DMG ...).
    """
    with frame.run() as job:
        if _is_foreign(image, opening):
            if deep or sample < 1 or since_last:
                raise UsageError(f"{image} is no backup, and is always checked as a whole")
            _check(frame, image, opening, job)
            return
        from ferrotype.engine.turns import state_file
        from ferrotype.engine.unreadable import of_snapshots
        from ferrotype.engine.verify import VerifyOptions, verify

        with frame.open_image(image) as repository:
            turns = None
            if since_last:
                if (folder := state_folder()) is None:
                    raise UsageError("--since-last needs a folder that lasts: set XDG_STATE_HOME or HOME")
                turns = state_file(folder, repository.config.id, image, deep=deep)
            result = verify(repository, VerifyOptions(deep, sample, turns=turns), job)
            known = repository.snapshots()
        names = {snapshot.id: snapshot.name for snapshot in known}
        if not result.ok:
            frame.code = exits.NO
        document = _document(result) | {"unreadable": of_snapshots(known)}
        frame.show(document, _lines(image, result, names, deep=deep))


def _is_foreign(image: Path, opening: Opening) -> bool:
    from ferrotype.engine.check import is_foreign

    return opening.format not in (None, "ferro") or (opening.format is None and is_foreign(image))


def _check(frame: Frame, image: Path, opening: Opening, job: Job) -> None:
    from ferrotype.engine.check import check

    result = check(str(image), opening.access(frame), job)
    if not result.ok:
        frame.code = exits.NO
    end = f"{image}: {format_size(result.checked_bytes)} checked: " + ("no damage" if result.ok else "DAMAGED")
    frame.show(result.as_json(), [*result.damaged, end])


def _document(result: VerifyResult) -> dict[str, object]:
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
    if result.progress is not None:
        document["round"] = _round(result.progress)
    return document


def _round(progress: Progress) -> dict[str, object]:
    return {
        "since": _time(progress),
        "share": round(progress.share, 6),
        "bytes": progress.bytes,
        "proven_bytes": progress.proven_bytes,
        "packs": progress.packs,
        "proven_packs": progress.proven_packs,
        "complete": progress.complete,
    }


def _time(progress: Progress) -> str:
    return progress.since.strftime("%Y-%m-%dT%H:%M:%SZ")


def _lines(image: Path, result: VerifyResult, names: Mapping[str, str], *, deep: bool) -> list[str]:
    lines = list(result.problems)
    for damage in result.damaged:
        lines += _damage_lines(damage, names.get(damage.snapshot, "?"))
    what = "decoded and proven" if deep else "proven"
    lines.append(
        f"{image}: {format_size(result.checked_bytes)} in {result.objects} objects {what}: "
        + ("no damage" if result.ok else "DAMAGED")
    )
    if (progress := result.progress) is not None:
        lines.append(
            f"in turns: {progress.share:.1%} of the stored packs ({format_size(progress.proven_bytes)} of "
            f"{format_size(progress.bytes)}) proven since {_time(progress)}"
            + ("; the next run begins a new round" if progress.complete else "")
        )
    return lines


def _damage_lines(damage: Damage, name: str) -> list[str]:
    where = f"snapshot {damage.snapshot[:8]} ({name}), disk {damage.disk}"
    lines = [f"{where}: {damage.length} bytes at {damage.start} cannot be given back"]
    lines += [f"    {file}" for file in damage.files[:_NAMED]]
    if len(damage.files) > _NAMED:
        lines.append(f"    and {len(damage.files) - _NAMED} more; --json lists them")
    return lines
