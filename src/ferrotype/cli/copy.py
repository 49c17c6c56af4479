"""``ferrotype copy``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ferrotype.cli.frame import IMAGE, SIZE, Frame, options
from ferrotype.units import format_size

if TYPE_CHECKING:
    from ferrotype.engine.copy import CopyResult


@click.command("copy")
@click.argument("source", metavar="IMAGE[::SNAPSHOT]")
@click.argument("target", type=IMAGE, metavar="TARGET")
@click.option("--snapshot", "wanted", multiple=True, help="Copy this snapshot; may be given several times.")
@click.option("--split", type=SIZE, help="Split a new TARGET into files of this size.")
@click.option("--existing", is_flag=True, help="TARGET must be there: make no new one.")
@click.option("--target-password-file", type=IMAGE, help="The passphrase of TARGET is the first line of a file.")
@click.option("--target-key-file", type=IMAGE, help="The key of TARGET is a file's content.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be copied; write nothing.")
@options
def command(
    frame: Frame,
    source: str,
    target: Path,
    wanted: tuple[str, ...],
    split: int | None,
    existing: bool,
    target_password_file: Path | None,
    target_key_file: Path | None,
    dry_run: bool,
) -> None:
    """Copy all snapshots of IMAGE, or some, into TARGET, an image that is made with the same keys if it is not there.

    What TARGET has already is not copied again.  Everything is proven on the way.
    """
    with frame.run() as job, ExitStack() as stack:
        from ferrotype.engine.copy import chosen, copy
        from ferrotype.engine.images import new_image_facts, open_or_twin
        from ferrotype.engine.opening import image_files, open_image
        from ferrotype.engine.unreadable import tell_of_snapshots
        from ferrotype.errors import UsageError

        if target_password_file and target_key_file:
            raise UsageError("give a passphrase or a key file for the target, not both")
        path, named = chosen(source, wanted)
        theirs = Frame(password_file=target_password_file, key_file=target_key_file)
        secret = theirs.secret if target_password_file or target_key_file else frame.secret
        repository = stack.enter_context(open_image(path, frame.secret, opener=frame.opener, memory=frame.memory))
        new = not target.exists()
        into = stack.enter_context(
            open_or_twin(
                target,
                repository,
                image_files(path),
                secret,
                secret_given=frame.secret_given,
                split=split or 0,
                existing=existing,
                dry_run=dry_run,
                opener=frame.opener,
                memory=frame.memory,
                job=None if frame.json else job,
            )
        )
        snapshots = [repository.snapshot(name) for name in named] if named else repository.snapshots()
        for warning in (*repository.warnings, *into.warnings):
            job.warn(warning)
        result = copy(repository, snapshots, into, job, dry_run=dry_run)
        for snapshot in result.skipped:
            job.note(f"snapshot {snapshot.id[:8]} ({snapshot.name}) is in {target} already")
        if result.sealed_anew and result.copied:
            are, have = ("would be", "would have") if dry_run else ("is", "have")
            job.note(
                f"{target} has other keys than {path}: everything {are} sealed anew, and snapshots {have} other ids"
            )
            if repository.config.encrypted and not into.config.encrypted:
                job.warn(
                    f"{target} is not encrypted: what is copied into it {'could' if dry_run else 'can'} be read by "
                    "everyone"
                )
        tell_of_snapshots(result.copied, job)
        made = new_image_facts(target, into) if new else {"new_image": False}
        say = frame.answer if dry_run else frame.show
        say(_document(result, dry_run=dry_run) | made, _text(result, target, dry_run=dry_run))


def _document(result: CopyResult, *, dry_run: bool) -> dict[str, object]:
    from ferrotype.engine.unreadable import of_snapshots

    copied = [
        {"id": None if dry_run and result.sealed_anew else snapshot.id, "source": original, "name": snapshot.name}
        for snapshot, original in zip(result.copied, result.originals, strict=True)
    ]
    return {
        "copied": copied,
        "skipped": [snapshot.id for snapshot in result.skipped],
        "chunks": result.chunks,
        "stored_bytes": result.stored_bytes,
        "sealed_anew": result.sealed_anew,
        "dry_run": dry_run,
        "unreadable": of_snapshots(result.copied),
    }


def _text(result: CopyResult, target: Path, *, dry_run: bool) -> str:
    count = f"{len(result.copied)} snapshot{'' if len(result.copied) == 1 else 's'}"
    if dry_run:
        bound = "at most " if result.sealed_anew else ""
        return (
            f"would copy {count} into {target} and store {bound}{format_size(result.stored_bytes)} there; "
            "nothing was written"
        )
    return f"{count} copied into {target}: {result.chunks} chunks, {format_size(result.stored_bytes)} stored"
