"""A disk as a new backup image that holds it and nothing else: what ``convert`` to ``.ferro`` makes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ferrotype.block.file import put_in_place
from ferrotype.engine.backup import BackupOptions, backup
from ferrotype.engine.convert import Converted
from ferrotype.engine.images import ImageOptions, open_or_create
from ferrotype.engine.opening import image_files
from ferrotype.engine.references import OpenDisk
from ferrotype.engine.sources import known_by
from ferrotype.errors import FerrotypeError, KeyRefused, Refused
from ferrotype.formats import Option, Options
from ferrotype.fresh import Fresh, hidden_path, true_name
from ferrotype.job import Job
from ferrotype.objects.container import Container
from ferrotype.objects.volumes import PatientOpener
from ferrotype.repository.keys import Secret
from ferrotype.stall import Patience
from ferrotype.units import parse_size

if TYPE_CHECKING:
    from ferrotype.engine.writing import NewImage, Written

__all__ = ["OPTIONS", "write_backup"]


def _level(text: str) -> int:
    if not text.removeprefix("-").isdecimal() or not -7 <= int(text) <= 22:
        raise ValueError("a number from -7 to 22")
    return int(text)


OPTIONS: Final[Options] = {
    "level": Option("zstd level, -7 to 22, default 1", _level),
    "chunk_size": Option(
        "the unit of deduplication: a power of two from 4KiB to 16MiB, default 128KiB, more for disks over 16TiB",
        parse_size,
    ),
    "pack_size": Option("bytes of chunks stored as one object, 1MiB to 1GiB, default 16MiB", parse_size),
}


def write_backup(disk: OpenDisk, wanted: NewImage, job: Job) -> Written:
    """A new image with one snapshot, which holds every sector of the disk: it is converted, not judged.

    It has its name when the snapshot is durable, and not before.
    """
    from ferrotype.engine.writing import Written

    chosen = wanted.options or {}
    options = ImageOptions(
        _number(chosen.get("level"), 1),
        chunk_size=_number(chosen.get("chunk_size"), 0) or None,
        pack_size=_number(chosen.get("pack_size"), 0) or None,
        encrypt=wanted.secret is not None,
        disk_bytes=disk.source.size,
    )
    chosen_options = BackupOptions(all_sectors=True, verify_after=wanted.verify_after, becomes=wanted.path)
    opener = PatientOpener(wanted.patience or Patience())
    with (
        _told_as(wanted.path, hidden := hidden_path(_target(wanted))),
        open_or_create(
            hidden, options, _no_secret, lambda path: wanted.secret or _no_secret(path), opener=opener
        ) as made,
    ):
        try:
            snapshot = backup(made, [known_by(disk)], chosen_options, job)
            stored = hidden.stat().st_blocks * 512
            _put_in_place(hidden, true_name(wanted.path), replace=wanted.replace)  # while it is locked
        except BaseException:
            if isinstance(made.store, Container):
                made.store.discard()
            raise
    done, lost = snapshot.statistics, snapshot.disks[0].unreadable
    copied = Converted(done.disk_bytes, done.read_bytes, done.new_bytes, done.seconds, lost)
    return Written("ferro", copied, stored, verified=wanted.verify_after)


def _number(value: object, default: int) -> int:
    return value if isinstance(value, int) else default


def _no_secret(path: Path) -> Secret:
    raise KeyRefused(f"{path} is not encrypted")


def _target(wanted: NewImage) -> Path:
    """The file that the image is to be; a symbolic link stays one."""
    final = true_name(wanted.path)
    if wanted.replace and len(image_files(final)) > 1:
        raise Refused(f"{wanted.path} is split into several files; remove them, or choose another name")
    return final


def _put_in_place(hidden: Path, final: Path, *, replace: bool) -> None:
    fresh = Fresh.found(hidden, final)
    try:
        put_in_place(fresh, replace=replace)
    finally:
        os.close(fresh.fd)


@contextmanager
def _told_as(path: Path, hidden: Path) -> Iterator[None]:
    """Errors tell of ``path``: nobody knows the hidden name."""
    try:
        yield
    except FerrotypeError as error:
        error.args = (str(error).replace(str(hidden), str(path)),)
        raise
