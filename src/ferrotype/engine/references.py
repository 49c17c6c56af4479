"""Disk references: one word list for devices, disk images and backups.

PATH                          a block device or a disk image, in any format
nbd://HOST[:PORT]/EXPORT      a disk that an NBD server has; nbd+unix:///EXPORT?socket=PATH on this machine
PATH::NAME                    a further disk inside a disk image, such as an internal snapshot of a qcow2
IMAGE::SNAPSHOT/DISK          a disk of a snapshot; without ``::`` the latest, without /DISK the only one
REF#PARTITION                 a partition of any of them, by number, label or UUID
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ferrotype.block import Source, read
from ferrotype.block.device import open_source
from ferrotype.block.file import FileSource
from ferrotype.block.views import Slice
from ferrotype.block.watched import Watched, watch
from ferrotype.engine.live import tell_of_changes
from ferrotype.errors import FormatError, InvalidImage, UnsupportedError, UsageError
from ferrotype.formats import Image
from ferrotype.formats.mapped import shortfalls
from ferrotype.formats.names import no_raw_disk
from ferrotype.formats.registry import FORMATS, RAW_SUFFIXES, is_packed, open_file, open_folder, recognise
from ferrotype.formats.related import Related
from ferrotype.formats.split import joined, name_of_whole
from ferrotype.fresh import permissions_of
from ferrotype.job import Job
from ferrotype.objects.volumes import Opener, PosixFile
from ferrotype.stall import Patience

if TYPE_CHECKING:  # a disk image of another program needs nothing of these
    from ferrotype.engine.opening import SecretSource
    from ferrotype.engine.remembered import Memory
    from ferrotype.engine.restore import Part
    from ferrotype.engine.survey import Survey, Volume
    from ferrotype.repository.keys import Secret
    from ferrotype.repository.snapshots import DiskRecord, Snapshot
    from ferrotype.repository.store import Repository

IMAGE_SUFFIX: Final = ".ferro"
_ADDRESS: Final = re.compile(r"nbds?(\+[a-z]+)?://")


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference taken apart; nothing is opened yet."""

    path: Path
    snapshot: str | None
    disk: str | None
    partition: str | None
    address: str | None = None  # of a disk that is served elsewhere; then ``path`` is nothing but a name for it

    @property
    def text(self) -> str:
        if self.address is not None:
            return self.address + (f"#{self.partition}" if self.partition else "")
        inner = f"::{self.snapshot}" if self.snapshot else ""
        inner += f"/{self.disk}" if self.disk else ""
        return f"{self.path}{inner}" + (f"#{self.partition}" if self.partition else "")


def parse(text: str) -> Reference:
    """Take a reference apart.  A file that exists under the whole text is meant, whatever signs are in it."""
    if not text:
        raise UsageError("an empty reference names nothing")
    if _ADDRESS.match(text):
        return _served(text)
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


def _served(text: str) -> Reference:
    """The reference of a disk that is served elsewhere, which is named after its export."""
    from ferrotype.block.nbd import Address

    address, hash_, partition = text.partition("#")
    if hash_ and not partition:
        raise UsageError(f"{text}: no partition is named behind the #")
    export = Address.parse(address).export
    return Reference(Path(export.replace("/", "_") or "nbd"), None, None, partition or None, address)


@dataclass(frozen=True, slots=True)
class Access:
    """How to open what references name."""

    secret: SecretSource = lambda _: None
    format: str | None = None  # of a disk image, whatever the content looks like
    related: tuple[Path, ...] = ()  # files and folders that disk images may name, besides those beside them
    sector_size: int | None = None
    secret_given: bool = False  # the user named one, so an image that is not encrypted is not the one meant
    opener: Opener = PosixFile  # how the files of an image are opened
    patience: Patience | None = None  # how long storage may take
    memory: Memory | None = None  # what is remembered of images, and who is told of what does not fit
    holes: bool = True  # what a file system calls a hole of a file counts as zeros, and is not read
    headers_only: bool = False  # a disk image whose disk cannot be read is wanted for what its headers say

    def __post_init__(self) -> None:
        """Raises UsageError."""
        size = self.sector_size
        if size is not None and (size & (size - 1) or not 512 <= size <= 65536):
            raise UsageError("a sector size is a power of two from 512 to 65536")


@dataclass(frozen=True, slots=True)
class OpenDisk:
    """A disk behind a reference, open for reading."""

    source: Source  # of the partition, where one was named
    format: str  # "device", "nbd", "ferro", or a name of the formats' registry
    reference: Reference
    sector_size: int | None  # what the user said, if anything
    snapshot: Snapshot | None = None
    record: DiskRecord | None = None
    repository: Repository | None = None
    start: int = 0  # of the partition on its disk, bytes
    image: Image | None = None  # the container, of a disk image
    own: Watched | None = None  # the file that was named, of a disk image
    opened: Mapping[Path, Watched] = field(default_factory=dict)  # further files of it, as far as they were opened
    secret_given: bool = False  # its container asked for a passphrase, and was told it

    @property
    def files(self) -> list[Path]:
        """The files or the device that the disk stands in: volumes of a backup, layers of a chain, extents, parts."""
        if self.reference.address is not None:
            return []
        own = [self.reference.path]
        if self.format == "ferro":
            from ferrotype.engine.opening import image_files

            own = image_files(self.reference.path)
        return list(dict.fromkeys([*own, *self.opened]))

    @property
    def watched(self) -> list[Watched]:
        """The regular files of a disk image, each once.  Those of a backup need none: it proves what it reads."""
        files = ([self.own] if self.own is not None else []) + list(self.opened.values())
        return list({file.identity: file for file in reversed(files)}.values())[::-1]

    @property
    def permissions(self) -> int:
        """Of a file that is made of the disk: nobody reads it who could not read the disk.

        What is encrypted, the user alone can read.
        """
        encrypted = self.repository is not None and self.repository.config.encrypted
        return 0o600 if encrypted or self.secret_given else permissions_of(*self.files)

    @property
    def part(self) -> Part:
        """What to restore, of a disk in a backup.  Raises UsageError for anything else."""
        from ferrotype.engine.restore import Part

        if self.record is None or self.repository is None:
            raise UsageError(
                f"{self.reference.text} is not in a backup, which is what restore takes; convert writes other disks"
            )
        return Part(self.repository, self.record, self.start, self.source.size)


@contextmanager
def open_disk(text: str, access: Access, job: Job) -> Iterator[OpenDisk]:
    """The disk, or partition, that a reference names.

    Raises InvalidImage where it has no bytes at all, such as a card reader without a card or a file that was never
    written.  Warns afterwards where a file of it was changed meanwhile.

    Where a disk image lacks what its disk takes, such as a parent or a key, that is raised at once; with
    ``headers_only`` the image says it in ``missing``, and nothing can be read of the disk, nor any partition found.
    """
    with _open_disk(text, access, job) as disk:
        missing = disk.image is not None and disk.image.missing is not None
        if not disk.source.size and disk.format != "ferro" and not missing:
            what = "there is no medium in it, or it is not ready" if disk.format == "device" else "look at its origin"
            raise InvalidImage(f"{disk.reference.text} is a disk of 0 bytes, which is none: {what}")
        yield disk
        tell_of_changes(disk.watched, job)


@contextmanager
def _open_disk(text: str, access: Access, job: Job) -> Iterator[OpenDisk]:
    reference = parse(text)
    if is_image(reference, access):
        from ferrotype.engine.opening import open_image
        from ferrotype.repository.source import SnapshotSource

        repository = open_image(
            reference.path,
            access.secret,
            secret_given=access.secret_given,
            opener=access.opener,
            memory=access.memory,
        )
        with repository:
            try:
                snapshot = repository.snapshot(reference.snapshot or "latest")
                reference = _with_own_hash(reference, snapshot)
                record = snapshot.disk(reference.disk)
            except (FormatError, UsageError) as error:
                raise error.of(str(reference.path)) from None
            disk = OpenDisk(
                SnapshotSource(repository, record), "ferro", reference, None, snapshot, record, repository
            )
            yield _narrowed(disk)
            for warning in repository.warnings:
                job.warn(warning)
        return
    if reference.address is not None:
        from ferrotype.block.nbd import Address, NbdSource

        if access.format not in (None, "raw"):
            raise UsageError(f"{reference.text} is a raw disk; --format is for files")
        address = Address.parse(reference.address)
        served = NbdSource(address, sector_size=access.sector_size, patience=access.patience)
        try:
            yield _narrowed(OpenDisk(served, "nbd", reference, access.sector_size))
        finally:
            served.close()
        return
    if reference.path.is_block_device():
        if reference.snapshot is not None:
            raise UsageError(f"{reference.path} is a device and holds no disk called {reference.snapshot!r}")
        source = open_source(reference.path, sector_size=access.sector_size, patience=access.patience)
        try:
            yield _narrowed(OpenDisk(source, "device", reference, access.sector_size))
        finally:
            source.close()
        return
    asked: list[Path] = []
    try:
        image, related, own = _open_image(reference, access, job, asked)
    except FormatError as error:
        raise error.of(str(reference.path)) from None
    try:
        for warning in image.warnings:
            job.warn(f"{reference.path}: {warning}")
        reference = _with_inner_hash(reference, image)
        source = image.disk(_inner(reference, image))
        disk = OpenDisk(
            source,
            image.format,
            reference,
            access.sector_size,
            image=image,
            own=own,
            opened=related.opened,
            secret_given=bool(asked),
        )
        yield _narrowed(disk)
        for warning in dict.fromkeys(shortfalls(source)):
            job.warn(f"{reference.path}: {warning}")
    finally:
        image.close()


def _inner(reference: Reference, image: Image) -> str | None:
    """The name of a further disk inside a disk image; it may hold a slash, and be called ``latest``."""
    name = "/".join(part for part in (reference.snapshot, reference.disk) if part)
    return None if name in ("", "latest") and name not in image.disks else name


def _with_inner_hash(reference: Reference, image: Image) -> Reference:
    """A further disk's own name may hold a ``#``: that of an internal snapshot is any text."""
    whole = f"{_inner(reference, image)}#{reference.partition}"
    if reference.snapshot is not None and whole in image.disks:
        return replace(reference, snapshot=whole, disk=None, partition=None)
    return reference


def _with_own_hash(reference: Reference, snapshot: Snapshot) -> Reference:
    """A disk's own name may hold a ``#``: that of a partition which was backed up alone does."""
    whole = f"{reference.disk}#{reference.partition}"
    if any(disk.name == whole for disk in snapshot.disks):
        return replace(reference, disk=whole, partition=None)
    return reference


def is_image(reference: Reference, access: Access) -> bool:
    """Whether a reference leads into a ferrotype image."""
    if access.format not in (None, "ferro") or reference.address is not None:
        return False
    if not reference.path.is_file():
        return False
    if reference.path.suffix.lower() == IMAGE_SUFFIX:
        return True  # a damaged one must not pass for a raw disk
    with FileSource(reference.path, patience=access.patience) as file:
        magic = FORMATS["ferro"].magics[0][1]
        if read(file, 0, min(file.size, len(magic))) == magic:
            return True
        return reference.snapshot is not None and recognise(file) is None


def _open_image(
    reference: Reference, access: Access, job: Job, asked: list[Path]
) -> tuple[Image, Related, Watched | None]:
    """The container a file, or folder, is, and what else it opens; raw where its content shows no other.

    The third is the file itself.  Where it is encrypted its path is put into ``asked``.
    """
    path = reference.path

    def secret(path: Path) -> Secret | None:
        asked.append(path)
        return access.secret(path)

    headers_only = access.headers_only and reference.partition is None
    related = Related(
        path,
        access.related,
        patience=access.patience,
        passphrase=lambda: _passphrase(secret(path)),
        job=job,
        holes=access.holes,
    )
    if path.is_dir():
        return open_folder(path, related, access.format, headers_only=headers_only), related, None
    file = open_source(path, sector_size=access.sector_size, patience=access.patience, holes=access.holes)
    try:
        own = watch(file)
        file = joined(file, related)
        format = _format_of(path, file, access, job)
        return open_file(file, related, format, headers_only=headers_only), related, own
    except BaseException:
        file.close()
        raise


def _passphrase(secret: Secret | None) -> bytes | None:
    return None if secret is None else secret.value


def _format_of(path: Path, file: Source, access: Access, job: Job) -> str:
    """Found from the content; whoever controls a raw disk controls its first sector, so a raw suffix must agree.

    Raises FormatError where a file that shows no format is named like one, or is an archive of any name.
    """
    if access.format is not None:
        return access.format
    found = recognise(file)
    if found is not None and name_of_whole(path).suffix.lower() in RAW_SUFFIXES:
        raise (UnsupportedError if is_packed(found) else UsageError)(
            f"{path} is named like a raw disk and its content looks like {found}: say --format raw, or {found}"
        )
    refused = no_raw_disk(path, file) if found is None else None
    if refused is not None:
        raise refused
    if found is None and path.suffix.lower() not in RAW_SUFFIXES:
        job.note(f"{path} is read as a raw disk")
    return found or "raw"


def _narrowed(disk: OpenDisk) -> OpenDisk:
    if disk.reference.partition is None:
        return disk
    from ferrotype.engine.survey import survey

    volume = find_volume(
        survey(disk.source, sector_size=disk.sector_size, allocation=False), disk.reference.partition
    )
    return replace(disk, source=Slice(disk.source, volume.start, volume.size), start=volume.start)


def find_volume(surveyed: Survey, wanted: str) -> Volume:
    """A volume by its number, label, partition label or UUID.  Raises UsageError."""
    matches = [v for v in surveyed.volumes if wanted == str(v.index)]
    matches = matches or [v for v in surveyed.volumes if wanted in (v.label, v.partition_label, v.uuid)]
    if len(matches) == 1:
        return matches[0]
    known = ", ".join(f"{v.index} ({v.label})" if v.label else str(v.index) for v in surveyed.volumes)
    problem = "several partitions are" if matches else "no partition is"
    raise UsageError(f"{problem} called {wanted!r}; there is: {known or 'none'}")
