"""Opening the image a backup goes into, and making it where there is none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ferrotype.block.inventory import same_storage
from ferrotype.block.sysfs import mount_of
from ferrotype.engine.opening import SecretSource, image_files, open_image
from ferrotype.engine.remembered import Memory
from ferrotype.engine.targets import refuse_no_device
from ferrotype.errors import DeviceError, KeyRefused, Refused, UsageError
from ferrotype.job import Job
from ferrotype.objects.container import Container
from ferrotype.objects.memory import MemoryStore
from ferrotype.objects.volumes import Opener, PosixFile
from ferrotype.repository.config import DEFAULT_LEVEL, DEFAULT_PACK, default_chunk
from ferrotype.repository.keys import Secret
from ferrotype.repository.store import Repository

_NEITHER: Final = "a passphrase was given, and neither image is encrypted: they may not be the ones you mean"


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """How to write; all but the level count only for a new image."""

    level: int = DEFAULT_LEVEL
    split: int = 0  # bytes a volume may grow to; 0: one file
    chunk_size: int | None = None
    pack_size: int | None = None
    encrypt: bool = False
    disk_bytes: int = 0  # of what is to be backed up first, for choosing the chunk size
    existing: bool = False  # no new image may be made


@contextmanager
def open_or_create(
    path: Path,
    options: ImageOptions,
    secret: SecretSource,
    new_secret: Callable[[Path], Secret],
    *,
    secret_given: bool = False,
    dry_run: bool = False,
    opener: Opener = PosixFile,
    memory: Memory | None = None,
    job: Job | None = None,
) -> Iterator[Repository]:
    """The image at ``path``, open for writing; made new where there is none, and ``job`` is told that.

    A dry run opens an existing image for reading, and has a new one in memory only.  Raises Refused where a new one
    would stand among devices, or is not wanted.
    """
    refuse_no_device(path)
    if path.exists():
        with open_image(
            path,
            secret,
            writable=not dry_run,
            level=options.level,
            secret_given=secret_given,
            opener=opener,
            memory=memory,
        ) as repository:
            _check_same(path, repository, options)
            yield repository
        return
    _check_new(path, existing=options.existing)
    locked = new_secret(path) if options.encrypt else None
    store = MemoryStore() if dry_run else Container.create(path, split=options.split, opener=opener)
    try:
        _tell_new(path, job, encrypted=options.encrypt, dry_run=dry_run)
        repository = Repository.create(
            store,
            locked,
            chunk_size=options.chunk_size or default_chunk(options.disk_bytes),
            pack_size=options.pack_size or DEFAULT_PACK,
            level=options.level,
        )
        with _remembered(path, repository, None if dry_run else memory):
            yield repository
    finally:
        store.close()


@contextmanager
def open_or_twin(
    path: Path,
    source: Repository,
    source_files: Sequence[Path],
    secret: SecretSource,
    *,
    secret_given: bool = False,
    split: int = 0,
    existing: bool = False,
    dry_run: bool = False,
    opener: Opener = PosixFile,
    memory: Memory | None = None,
    job: Job | None = None,
) -> Iterator[Repository]:
    """The image at ``path``, open for what ``source`` is copied into; where there is none, one with the same keys.

    ``job`` is told of a new one, which ``existing`` does not allow.  Raises Refused for that, where it would stand
    among devices, and where it is stored in one of ``source_files``; KeyRefused where a secret was given and neither
    of the two needs one.
    """
    refuse_no_device(path)
    if not path.exists():
        if secret_given and not source.config.encrypted:
            raise KeyRefused(_NEITHER)
        _check_new(path, existing=existing)
        with (
            source.twin(MemoryStore() if dry_run else Container.create(path, split=split, opener=opener)) as fresh,
            _remembered(path, fresh, None if dry_run else memory),
        ):
            _tell_new(path, job, encrypted=source.config.encrypted, dry_run=dry_run)
            yield fresh
        return
    for mine in image_files(path):
        if any(same_storage(mine, other) for other in source_files):
            raise Refused(f"{path} is what is being copied from; nothing was written")
    with open_image(path, secret, writable=not dry_run, opener=opener, memory=memory) as repository:
        if secret_given and not (source.config.encrypted or repository.config.encrypted):
            raise KeyRefused(_NEITHER)
        _check_same(path, repository, ImageOptions(split=split))
        yield repository


@contextmanager
def _remembered(path: Path, made: Repository, memory: Memory | None) -> Iterator[None]:
    """A new image is remembered at the end of the block; where another one stood there before, that is said."""
    place = memory.before(path) if memory else None
    if place is not None:
        place.made()
    yield
    if place is not None:
        place.left(made, written=True)


# ---------------------------------------------------------------------- a new image


def new_image_facts(path: Path, repository: Repository) -> dict[str, object]:
    """What a JSON document says of a new image, made or to be made: where it lies, and whether it is encrypted."""
    mount = mount_of(_folder(path))
    on = None if mount is None else {"source": mount.source, "type": mount.kind, "mounted_at": mount.where}
    return {"new_image": True, "encrypted": repository.config.encrypted, "image_on": on}


def _folder(path: Path) -> Path:
    return Path(os.path.realpath(path)).parent


def _place(path: Path) -> str:
    """Where a file at ``path`` lies, in words."""
    mount = mount_of(_folder(path))
    return "a file system that is not known" if mount is None else f"{mount.source} ({mount.kind}, {mount.where})"


def _check_new(path: Path, *, existing: bool) -> None:
    """Raise Refused where no image may be made, DeviceError where none can be."""
    folder = path.parent
    if existing:
        where = f"its folder lies on {_place(path)}" if folder.is_dir() else f"its folder {folder} does not exist"
        raise Refused(f"{path} does not exist, and only an existing image is wanted; {where}: is its disk mounted?")
    if not folder.is_dir():
        raise DeviceError(f"the folder {folder} does not exist")


def _tell_new(path: Path, job: Job | None, *, encrypted: bool, dry_run: bool) -> None:
    if job is not None:
        is_ = "would be" if dry_run else "is"
        job.note(f"{path} {is_} a new image, {'' if encrypted else 'not '}encrypted, on {_place(path)}")


def _check_same(path: Path, repository: Repository, options: ImageOptions) -> None:
    """The same command line must work every day: what was said at the creation may be said again, nothing else."""
    config, store = repository.config, repository.store
    split = store.split if isinstance(store, Container) else 0
    for what, asked, is_so in (
        ("chunk size", options.chunk_size, config.chunk_size),
        ("pack size", options.pack_size, config.pack_size),
        ("split size", options.split, split),
    ):
        if asked and asked != is_so:
            raise UsageError(f"{path} exists with a {what} of {is_so} bytes, and that stays")
    if options.encrypt and not config.encrypted:
        raise UsageError(
            f"{path} exists and is not encrypted, which is chosen when an image is made: name a new image, or leave "
            "out --encrypt"
        )
