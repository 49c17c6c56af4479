"""The Python interface: the command line's verbs in a few lines.

    import ferrotype

    snapshot = ferrotype.backup("/dev/sda", "laptop.ferro", password="correct horse")
    for snapshot in ferrotype.list_snapshots("laptop.ferro", password="correct horse"):
        print(snapshot.id, snapshot.created, snapshot.name)
    with ferrotype.open_disk("laptop.ferro::latest#2", password="correct horse") as source:
        source.read_into(0, memoryview(buffer))
    ferrotype.restore("laptop.ferro", "/dev/sdb", password="correct horse", overwrite=True)
    ferrotype.convert("vm.vmdk", "vm.qcow2", compress=True)
    assert ferrotype.compare("vm.vmdk", "vm.qcow2").identical

A reference is what the command line takes: a device, a disk image in any format, an address nbd://..., a disk of a
backup.  ``format`` names the format of a file whatever it shows; ``related`` names files and folders that a disk
image may open (parents, extents) besides those beside it; ``sector_size`` (bytes) is that of a disk that does not
show its own.

Errors are those of ``ferrotype.errors``.  ``job`` takes progress, warnings and cancellation; see ``ferrotype.job``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from ferrotype.block import Source
from ferrotype.engine import backup as _backup
from ferrotype.engine import checksum as _checksum
from ferrotype.engine import compare as _compare
from ferrotype.engine import copy as _copy
from ferrotype.engine import info as _info
from ferrotype.engine import opening, references
from ferrotype.engine import restore as _restore
from ferrotype.engine import salvage as _salvage
from ferrotype.engine import turns as _turns
from ferrotype.engine import verify as _verify
from ferrotype.engine import writing as _writing
from ferrotype.engine.images import ImageOptions, open_or_create, open_or_twin
from ferrotype.engine.remembered import Memory
from ferrotype.engine.sources import as_text, named_source
from ferrotype.engine.space import check_restore
from ferrotype.engine.targets import check_fits, open_target, refuse_harm, refuse_misnamed
from ferrotype.errors import KeyRefused, Refused, UsageError
from ferrotype.job import Job, NullJob
from ferrotype.repository.keys import Secret
from ferrotype.repository.snapshots import Snapshot
from ferrotype.repository.store import Repository

PathLike = str | os.PathLike[str]


def backup(
    source: PathLike | Sequence[PathLike],
    image: PathLike,
    *,
    password: str | None = None,
    level: int = 1,
    all_sectors: bool = False,
    exclude_swap_files: bool = False,
    name: str | None = None,
    tags: str | Sequence[str] = (),
    split: int = 0,
    existing: bool = False,
    verify_after: bool = False,
    prove_free: bool = False,
    format: str | None = None,
    related: PathLike | Sequence[PathLike] = (),
    sector_size: int | None = None,
    state: PathLike | None = None,
    job: Job | None = None,
) -> Snapshot:
    """Back up one or several disks into an image, which is made (encrypted, with a ``password``) if it is not there.

    With ``existing`` no image is made: Refused where it is not there.

    Returns the committed snapshot; ``snapshot.statistics`` counts bytes.  With ``verify_after`` all that was stored
    is read back from the medium and proven before it is committed; WriteError where that fails.  With ``prove_free``
    what is left out is proven by another way than the map of free space; InvalidImage where it cannot be, before
    anything is stored.
    With ``state``, a folder that lasts, images are remembered there, and one that was replaced or went back in time
    is a warning; so it is for ``restore``, ``verify`` and ``list_snapshots``.
    """
    job = job or NullJob()
    sources = _several(source)
    if not sources:
        raise UsageError("no disk to back up is named")
    path = Path(image)
    exists = path.exists()
    with ExitStack() as stack:
        access = _access(password, format, related, sector_size)
        access = replace(access, secret_given=False, holes=not all_sectors)  # the secret is for the image
        named = [named_source(os.fspath(one), path, access, stack, job) for one in sources]
        options = ImageOptions(
            level,
            split=0 if exists else split,
            encrypt=password is not None and not exists,
            disk_bytes=sum(one.source.size for one in named),
            existing=existing,
        )
        repository = stack.enter_context(
            open_or_create(
                path,
                options,
                access.secret,
                lambda _: _secret(password, path),
                secret_given=password is not None,
                memory=_memory(state, job),
                job=job,
            )
        )
        called = None if name is None else as_text(name)
        chosen = _backup.BackupOptions(
            all_sectors,
            exclude_swap_files,
            called,
            tuple(as_text(os.fspath(tag)) for tag in _several(tags)),
            verify_after=verify_after,
            prove_free=prove_free,
        )
        return _backup.backup(repository, named, chosen, job)


def restore(
    reference: PathLike,
    target: PathLike,
    *,
    password: str | None = None,
    overwrite: bool = False,
    delta: bool = False,
    no_blank: bool = False,
    verify_after: bool = False,
    state: PathLike | None = None,
    job: Job | None = None,
) -> _restore.RestoreResult:
    """Write a disk or partition of a backup to a device, or to a file as a raw disk; ``convert`` makes other images.

    With ``verify_after`` what was written is read back from the medium and compared; WriteError where it differs.
    Raises UsageError where the file is named like another format, Refused where the target exists and ``overwrite``
    is not set, is in use, too small, or holds the image.
    """
    job = job or NullJob()
    path = Path(target)
    access = replace(_access(password), memory=_memory(state, job))
    with references.open_disk(os.fspath(reference), access, job) as disk:
        part = disk.part
        refuse_harm(path, disk.files)
        refuse_misnamed(path)
        if path.exists() and not overwrite:
            raise Refused(f"{path} exists and would be overwritten")
        in_place = path.is_block_device() or (delta and path.exists())
        if in_place:
            check_fits(path, part.length, part.disk.sector_size)
        else:
            check_restore(part, path)
        with open_target(
            path, part.length, part.disk.sector_size, in_place=in_place, mode=disk.permissions
        ) as opened:
            options = _restore.RestoreOptions(
                no_blank, delta and opened.source is not None, verify_after=verify_after
            )
            return _restore.restore(
                part, opened.sink, options, job, target=opened.source, reread=opened.reread, what=path
            )


def convert(
    reference: PathLike,
    out: PathLike,
    *,
    output_format: str | None = None,
    compress: bool = False,
    options: Mapping[str, str] | None = None,
    backing: PathLike | None = None,
    backing_format: str | None = None,
    overwrite: bool = False,
    verify_after: bool = False,
    password: str | None = None,
    format: str | None = None,
    related: PathLike | Sequence[PathLike] = (),
    sector_size: int | None = None,
    job: Job | None = None,
) -> _writing.Written:
    """Write a disk as a disk image in the format of ``out``'s suffix, or in ``output_format``, or onto a device.

    ``options`` are those of ``convert -o``.  With ``backing``, a name relative to ``out``'s folder, only what differs
    from that file is stored.  A ``password`` encrypts a new backup image.  With ``verify_after`` all of it is
    read back from the medium and proven; WriteError where that fails.  Raises Refused where ``out`` exists and
    ``overwrite`` is not set, or is what is read.
    """
    path = Path(out)
    chosen = _writing.chosen_format(path, output_format)
    access = _access(password, format, related, sector_size)
    secret = None
    if chosen == "ferro" and password is not None:
        access, secret = replace(access, secret_given=False), _secret(password, path)
    wanted = _writing.NewImage(
        path,
        chosen,
        compress,
        _writing.parse_options(chosen, [f"{name}={value}" for name, value in (options or {}).items()]),
        None if backing is None else Path(backing),
        backing_format,
        overwrite,
        secret=secret,
        verify_after=verify_after,
    )
    job = job or NullJob()
    with references.open_disk(os.fspath(reference), access, job) as disk:
        return _writing.write_image(disk, wanted, job)


def compare(
    reference: PathLike,
    other: PathLike,
    *,
    strict: bool = False,
    password: str | None = None,
    format: str | None = None,
    other_format: str | None = None,
    related: PathLike | Sequence[PathLike] = (),
    job: Job | None = None,
) -> _compare.Comparison:
    """Whether two disks hold the same bytes, and where not.

    What one of them has more must be zeros.  If ``strict``, sizes and what is known to be zeros count, too.
    """
    job = job or NullJob()
    one = replace(_access(password, format, related), secret_given=False)  # one of them may need it
    two = replace(one, format=other_format or format)
    with (
        references.open_disk(os.fspath(reference), one, job) as first,
        references.open_disk(os.fspath(other), two, job) as second,
    ):
        return _compare.compare_disks(first, second, job, strict=strict)


@contextmanager
def open_disk(
    reference: PathLike,
    *,
    password: str | None = None,
    format: str | None = None,
    related: PathLike | Sequence[PathLike] = (),
    sector_size: int | None = None,
    job: Job | None = None,
) -> Iterator[Source]:
    """A device, a disk image, a disk or a partition of a backup, as a Source: random access by offset."""
    access = _access(password, format, related, sector_size)
    with references.open_disk(os.fspath(reference), access, job or NullJob()) as disk:
        yield disk.source


def list_snapshots(
    image: PathLike, *, password: str | None = None, state: PathLike | None = None, job: Job | None = None
) -> list[Snapshot]:
    """The snapshots of an image, oldest first."""
    with _image(image, password, _memory(state, job or NullJob())) as repository:
        return repository.snapshots()


def verify(
    image: PathLike,
    *,
    password: str | None = None,
    deep: bool = False,
    sample: float = 1.0,
    state: PathLike | None = None,
    job: Job | None = None,
) -> _verify.VerifyResult:
    """Prove the stored bytes; ``result.ok`` and ``result.damaged`` say what was found.

    With ``state``, a folder that lasts, a ``sample`` goes on where the last one ended instead of at random, until the
    whole image was walked; ``result.progress`` says how far that has come.
    """
    job = job or NullJob()
    with _image(image, password, _memory(state, job)) as repository:
        turns = None
        if state is not None:
            turns = _turns.state_file(Path(state), repository.config.id, Path(image), deep=deep)
        return _verify.verify(repository, _verify.VerifyOptions(deep, sample, turns=turns), job)


def copy(
    source: PathLike,
    target: PathLike,
    *,
    snapshots: str | Sequence[str] = (),
    password: str | None = None,
    target_password: str | None = None,
    split: int = 0,
    existing: bool = False,
    job: Job | None = None,
) -> _copy.CopyResult:
    """Copy snapshots of one image (all, those named, or that of ``image::snapshot``) into another.

    The target is made with the same keys if it is not there.  ``target_password`` is for one that has its own.  With
    ``existing`` no image is made: Refused where it is not there.
    """
    path, named = _copy.chosen(os.fspath(source), [os.fspath(name) for name in _several(snapshots)])
    theirs = _access(password if target_password is None else target_password)
    with (
        opening.open_image(path, _access(password).secret) as repository,
        open_or_twin(
            Path(target),
            repository,
            opening.image_files(path),
            theirs.secret,
            secret_given=password is not None,
            split=split,
            existing=existing,
            job=job,
        ) as into,
    ):
        wanted = [repository.snapshot(name) for name in named] if named else repository.snapshots()
        return _copy.copy(repository, wanted, into, job or NullJob())


def salvage(
    image: PathLike,
    out: PathLike | None = None,
    *,
    password: str | None = None,
    split: int = 0,
    job: Job | None = None,
) -> _salvage.SalvageResult:
    """Find what is left of a damaged image, which is only read; with ``out``, make a new image of it.

    ``result.snapshots`` says of each what is lost.
    """
    return _salvage.salvage(
        Path(image),
        _access(password).secret,
        job or NullJob(),
        secret_given=password is not None,
        out=None if out is None else Path(out),
        split=split,
    )


def checksum(
    reference: PathLike,
    *,
    password: str | None = None,
    format: str | None = None,
    related: PathLike | Sequence[PathLike] = (),
    job: Job | None = None,
) -> str:
    """The content hash of a disk, 64 hex digits: the same for the same bytes wherever they are kept.

    What cannot be read counts as zeros where a ``job`` is there to be warned; without one it is a ReadError.
    """
    with references.open_disk(os.fspath(reference), _access(password, format, related), job or NullJob()) as disk:
        return _checksum.checksum(disk.source, NullJob()) if job is None else _checksum.checksum_of(disk, job).digest


def info(
    reference: PathLike,
    *,
    password: str | None = None,
    format: str | None = None,
    related: PathLike | Sequence[PathLike] = (),
    sector_size: int | None = None,
    job: Job | None = None,
) -> _info.DiskInfo:
    """Partition table, volumes and allocation map of a disk, and what its container says of it."""
    job = job or NullJob()
    with references.open_disk(os.fspath(reference), _access(password, format, related, sector_size), job) as disk:
        return _info.disk_info(disk, job)


def _several(given: PathLike | Sequence[PathLike]) -> list[PathLike]:
    """One or several, as callers may say either: a text is one, and not its letters."""
    return [given] if isinstance(given, str | os.PathLike) else list(given)


def _access(
    password: str | None,
    format: str | None = None,
    related: PathLike | Sequence[PathLike] = (),
    sector_size: int | None = None,
) -> references.Access:
    return references.Access(
        lambda path: _secret(password, path),
        format,
        tuple(Path(one) for one in _several(related)),
        sector_size,
        secret_given=password is not None,
    )


def _image(image: PathLike, password: str | None, memory: Memory | None) -> Repository:
    access = _access(password)
    return opening.open_image(Path(image), access.secret, secret_given=access.secret_given, memory=memory)


def _memory(state: PathLike | None, job: Job) -> Memory | None:
    return None if state is None else Memory(Path(state), job.warn)


def _secret(password: str | None, image: Path) -> Secret:
    if password is None:
        raise KeyRefused(f"{image} is encrypted; give its password")
    return Secret(password.encode())
