"""``ferrotype backup``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ferrotype.cli.access import Opening, access_options
from ferrotype.cli.frame import IMAGE, SIZE, Frame, options
from ferrotype.units import format_size

if TYPE_CHECKING:
    from ferrotype.engine.estimate import Estimate
    from ferrotype.repository.snapshots import Snapshot


@click.command("backup")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.argument("image", type=IMAGE)
@click.option("--all-sectors", is_flag=True, help="Keep every sector, free ones too.")
@click.option("--exclude-swap-files", is_flag=True, help="Leave out the contents of Windows' paging files.")
@click.option("--name", help="Call the snapshot this.")
@click.option("--tag", "tags", multiple=True, help="Tag the snapshot; may be given several times.")
@click.option("--level", type=click.IntRange(-7, 22), default=1, show_default=True, help="zstd level.")
@click.option("--encrypt", is_flag=True, help="Encrypt a new image; also implied by naming a passphrase or key file.")
@click.option("--split", type=SIZE, help="Split a new image into files of this size.")
@click.option("--chunk-size", type=SIZE, help="Unit of deduplication of a new image.")
@click.option("--pack-size", type=SIZE, help="Size of the stored packs of a new image.")
@click.option("--existing", is_flag=True, help="IMAGE must be there: make no new one.")
@click.option("--verify-after", is_flag=True, help="Read back and prove what was stored before it is committed.")
@click.option("--prove-free", is_flag=True, help="First prove, by another way, that no file is in what is left out.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be read and stored; write nothing.")
@access_options
@options
def command(
    frame: Frame,
    sources: tuple[str, ...],
    image: Path,
    all_sectors: bool,
    exclude_swap_files: bool,
    name: str | None,
    tags: tuple[str, ...],
    level: int,
    encrypt: bool,
    split: int | None,
    chunk_size: int | None,
    pack_size: int | None,
    existing: bool,
    verify_after: bool,
    prove_free: bool,
    dry_run: bool,
    opening: Opening,
) -> None:
    """Image disks or partitions into IMAGE, which is made if it is not there.

    All data is kept, without the free space.  A later backup of the same disk reads what is allocated and stores what
    changed; every snapshot is a full view.
    """
    with frame.run() as job, ExitStack() as stack:
        from ferrotype.engine.backup import BackupOptions, backup, summary
        from ferrotype.engine.estimate import estimate
        from ferrotype.engine.images import ImageOptions, new_image_facts, open_or_create
        from ferrotype.engine.prepare import prepare
        from ferrotype.engine.room import free_for
        from ferrotype.engine.sources import as_text, named_source
        from ferrotype.engine.space import warn_of_estimate

        access = replace(opening.access(frame), secret_given=False, holes=not all_sectors)  # the secret is for IMAGE
        named = [named_source(text, image, access, stack, job) for text in sources]
        wanted = ImageOptions(
            level,
            split or 0,
            chunk_size,
            pack_size,
            encrypt or (not image.exists() and frame.secret_given),
            sum(one.source.size for one in named),
            existing,
        )
        new = not image.exists()
        repository = stack.enter_context(
            open_or_create(
                image,
                wanted,
                frame.secret,
                frame.new_secret,
                secret_given=frame.secret_given,
                dry_run=dry_run,
                opener=frame.opener,
                memory=frame.memory,
                job=None if frame.json else job,
            )
        )
        made = new_image_facts(image, repository) if new else {"new_image": False}
        for warning in repository.warnings:
            job.warn(warning)
        chosen = BackupOptions(
            all_sectors,
            exclude_swap_files,
            as_text(name) if name else None,
            tuple(as_text(tag) for tag in tags),
            verify_after=verify_after,
            prove_free=prove_free,
        )
        if dry_run:
            disks = prepare(
                repository,
                named,
                job,
                all_sectors=all_sectors,
                exclude_swap_files=exclude_swap_files,
                prove_free=prove_free,
            )
            judged = estimate(repository, disks, job)
            warn_of_estimate(image, judged.stored_bytes, job, dry_run=True)
            frame.answer(
                _planned(judged) | {"free_on_target_bytes": free_for(image)} | made, _planned_text(judged, image)
            )
            return
        snapshot = backup(repository, named, chosen, job)
        document = _done(snapshot) | {"free_on_target_bytes": free_for(image)} | made
        frame.show(document, f"snapshot {snapshot.id[:8]} of {snapshot.name}: {summary(snapshot)}")


def _done(snapshot: Snapshot) -> dict[str, object]:
    from ferrotype.engine.unreadable import as_json

    s = snapshot.statistics
    return {
        "snapshot": snapshot.id,
        "parent": snapshot.parent,
        "disk_bytes": s.disk_bytes,
        "read_bytes": s.read_bytes,
        "stored_bytes": s.stored_bytes,
        "free_bytes": s.free_bytes,
        "zero_bytes": s.zero_bytes,
        "deduplicated_bytes": s.deduplicated_bytes,
        "new_bytes": s.new_bytes,
        "chunks": s.chunks,
        "new_chunks": s.new_chunks,
        "seconds": s.seconds,
        "unreadable": [row for disk in snapshot.disks for row in as_json(disk.unreadable, disk.name)],
        "proven": [
            {"disk": disk.name, "index": volume["index"], **volume["proven"]}
            for disk in snapshot.disks
            for volume in disk.volumes
            if "proven" in volume
        ],
    }


def _planned(judged: Estimate) -> dict[str, object]:
    return {
        "dry_run": True,
        "disk_bytes": judged.disk_bytes,
        "read_bytes": judged.read_bytes,
        "free_bytes": judged.free_bytes,
        "zero_bytes": judged.zero_bytes,
        "estimated_stored_bytes": judged.stored_bytes,
    }


def _free(image: Path) -> str:
    from ferrotype.engine.room import free_for

    free = free_for(image)
    return "" if free is None else f", where {format_size(free)} are free"


def _planned_text(judged: Estimate, image: Path) -> str:
    return (
        f"would read {format_size(judged.read_bytes)} of {format_size(judged.disk_bytes)} "
        f"({format_size(judged.free_bytes)} is free space, {format_size(judged.zero_bytes)} is known to be zero) "
        f"and store about {format_size(judged.stored_bytes)} in {image}{_free(image)}; nothing was written"
    )
