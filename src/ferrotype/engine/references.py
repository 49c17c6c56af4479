"""Disk references: one word list for devices, disk images and backups.

PATH                          a block device or a disk image
IMAGE::SNAPSHOT/DISK          a disk of a snapshot; without ``::`` the latest, without /DISK the only one
REF#PARTITION                 a partition of any of them, by number, label or UUID
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ferrotype.block import Source
from ferrotype.block.device import open_source
from ferrotype.block.views import Slice
from ferrotype.engine.opening import SecretSource, open_image
from ferrotype.engine.survey import Survey, Volume, survey
from ferrotype.errors import UnsupportedError, UsageError
from ferrotype.formats import RAW_SUFFIXES, recognise
from ferrotype.job import Job
from ferrotype.objects.layout import VOLUME_MAGIC
from ferrotype.objects.volumes import Opener, PosixFile
from ferrotype.repository.snapshots import DiskRecord, Snapshot
from ferrotype.repository.source import SnapshotSource
from ferrotype.repository.store import Repository
from ferrotype.stall import Patience

if TYPE_CHECKING:
    from ferrotype.engine.restore import Part

IMAGE_SUFFIX: Final = ".ferro"


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference taken apart; nothing is opened yet."""

    path: Path
    snapshot: str | None
    disk: str | None
    partition: str | None

    @property
    def text(self) -> str:
        inner = f"::{self.snapshot}" if self.snapshot else ""
        inner += f"/{self.disk}" if self.disk else ""
        return f"{self.path}{inner}" + (f"#{self.partition}" if self.partition else "")


def parse(text: str) -> Reference:
    """Take a reference apart.  A file that exists under the whole text is meant, whatever signs are in it."""
    if not text:
        raise UsageError("an empty reference names nothing")
    if os.path.exists(text):  # a text too long for a name is none
        return Reference(Path(text), None, None, None)
    rest, hash_, partition = text.rpartition("#")
    if not hash_ or "/" in partition or "::" in partition:  # the sign is part of the path
        rest, partition = text, ""
    elif not partition:
        raise UsageError(f"{text}: no partition is named behind the #")
    if os.path.exists(rest):
        return Reference(Path(rest), None, None, partition or None)
    path, colons, inner = rest.rpartition("::")
    if not colons:
        return Reference(Path(rest), None, None, partition or None)
    snapshot, _, disk = inner.partition("/")
    return Reference(Path(path), snapshot or "latest", disk or None, partition or None)


@dataclass(frozen=True, slots=True)
class Access:
    """How to open what references name."""

    secret: SecretSource = lambda _: None
    format: str | None = None  # "raw": whatever the content looks like
    sector_size: int | None = None
    secret_given: bool = False  # the user named one, so an image that is not encrypted is not the one meant
    opener: Opener = PosixFile  # how the files of an image are opened
    patience: Patience | None = None  # how long storage may take


@dataclass(frozen=True, slots=True)
class OpenDisk:
    """A disk behind a reference, open for reading."""

    source: Source  # of the partition, where one was named
    format: str  # "raw", "device" or "ferro"
    reference: Reference
    sector_size: int | None  # what the user said, if anything
    snapshot: Snapshot | None = None
    record: DiskRecord | None = None
    repository: Repository | None = None
    start: int = 0  # of the partition on its disk, bytes

    @property
    def part(self) -> Part:
        """What to restore, of a disk in a backup.  Raises UsageError for anything else."""
        from ferrotype.engine.restore import Part

        if self.record is None or self.repository is None:
            raise UsageError(f"{self.reference.text} is not in a backup; restore reads .ferro images")
        return Part(self.repository, self.record, self.start, self.source.size)


@contextmanager
def open_disk(text: str, access: Access, job: Job) -> Iterator[OpenDisk]:
    """The disk, or partition, that a reference names."""
    reference = parse(text)
    if is_image(reference, access):
        repository = open_image(
            reference.path,
            access.secret,
            secret_given=access.secret_given,
            opener=access.opener,
        )
        with repository:
            snapshot = repository.snapshot(reference.snapshot or "latest")
            reference = _with_own_hash(reference, snapshot)
            record = snapshot.disk(reference.disk)
            disk = OpenDisk(
                SnapshotSource(repository, record), "ferro", reference, None, snapshot, record, repository
            )
            yield _narrowed(disk)
            for warning in repository.warnings:
                job.warn(warning)
        return
    source = open_source(reference.path, sector_size=access.sector_size, patience=access.patience)
    try:
        kind = "device" if reference.path.is_block_device() else _raw(reference.path, source, access, job)
        yield _narrowed(OpenDisk(source, kind, reference, access.sector_size))
    finally:
        source.close()


def _with_own_hash(reference: Reference, snapshot: Snapshot) -> Reference:
    """A disk's own name may hold a ``#``: that of a partition which was backed up alone does."""
    whole = f"{reference.disk}#{reference.partition}"
    if any(disk.name == whole for disk in snapshot.disks):
        return replace(reference, disk=whole, partition=None)
    return reference


def is_image(reference: Reference, access: Access) -> bool:
    """Whether a reference leads into a ferrotype image."""
    if access.format == "raw":
        return False
    if reference.snapshot is not None:
        return True
    if not reference.path.is_file():
        return False
    if reference.path.suffix.lower() == IMAGE_SUFFIX:
        return True  # a damaged one must not pass for a raw disk
    with reference.path.open("rb") as file:
        return file.read(len(VOLUME_MAGIC)) == VOLUME_MAGIC


def _raw(path: Path, source: Source, access: Access, job: Job) -> str:
    """Make sure that a file may be read as a raw disk."""
    if access.format == "raw":
        return "raw"
    found = recognise(source)
    if found is not None and path.suffix.lower() in RAW_SUFFIXES:
        raise UsageError(
            f"{path} is named like a raw disk and its content looks like {found}; say --format raw if it is raw"
        )
    if found is not None:
        raise UnsupportedError(f"{path} is a {found} image, which this version does not read")
    if path.suffix.lower() not in RAW_SUFFIXES:
        job.note(f"{path} is read as a raw disk")
    return "raw"


def _narrowed(disk: OpenDisk) -> OpenDisk:
    if disk.reference.partition is None:
        return disk
    volume = find_volume(
        survey(disk.source, sector_size=disk.sector_size, allocation=False), disk.reference.partition
    )
    return OpenDisk(
        Slice(disk.source, volume.start, volume.size),
        disk.format,
        disk.reference,
        disk.sector_size,
        disk.snapshot,
        disk.record,
        disk.repository,
        volume.start,
    )


def find_volume(surveyed: Survey, wanted: str) -> Volume:
    """A volume by its number, label, partition label or UUID.  Raises UsageError."""
    matches = [v for v in surveyed.volumes if wanted == str(v.index)]
    matches = matches or [v for v in surveyed.volumes if wanted in (v.label, v.partition_label, v.uuid)]
    if len(matches) == 1:
        return matches[0]
    known = ", ".join(f"{v.index} ({v.label})" if v.label else str(v.index) for v in surveyed.volumes)
    problem = "several partitions are" if matches else "no partition is"
    raise UsageError(f"{problem} called {wanted!r}; there is: {known or 'none'}")
