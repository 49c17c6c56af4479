"""Making disk images: which format, with what options, over which backing file, and nothing left of a failed one.

A device is the one target that is written as it stands: ``writing_device``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ferrotype.block import Source
from ferrotype.block.file import FileSource
from ferrotype.block.memory import MemoryDisk
from ferrotype.block.outputs import Outputs
from ferrotype.block.views import Concat
from ferrotype.block.watched import Watched
from ferrotype.engine.beside import tell_of_beside
from ferrotype.engine.convert import Converted, copy
from ferrotype.engine.live import tell_of_changes, tell_of_use, tell_of_writers
from ferrotype.engine.reach import tell_of_reach
from ferrotype.engine.readback import Digests, check_digests, reopened
from ferrotype.engine.references import OpenDisk
from ferrotype.engine.room import check_room
from ferrotype.engine.sectors import sectors_in
from ferrotype.engine.targets import refuse_harm
from ferrotype.engine.unreadable import tell_of_disk
from ferrotype.errors import Refused, UsageError
from ferrotype.formats import Backing, Options, Spec, Writable
from ferrotype.formats.registry import (
    FORMATS,
    RAW_SUFFIXES,
    format_called,
    format_of_suffix,
    is_packed,
    open_file,
    recognise,
    writer,
)
from ferrotype.formats.related import Related, is_address
from ferrotype.job import Job
from ferrotype.stall import Patience

if TYPE_CHECKING:
    from ferrotype.repository.keys import Secret

__all__ = ["NewImage", "Written", "check_image", "chosen_format", "options_help", "parse_options", "write_image"]

SECTOR: Final = 512  # bytes; the least that every format keeps whole


@dataclass(frozen=True, slots=True)
class NewImage:
    """What image is to be made."""

    path: Path
    format: str
    compress: bool = False
    options: Mapping[str, object] | None = None  # parsed, by name
    backing: Path | None = None
    backing_format: str | None = None
    replace: bool = False
    patience: Patience | None = None
    secret: Secret | None = None  # of a new backup image, where it is to be encrypted
    verify_after: bool = False  # read back from the medium what was written, and prove it


@dataclass(frozen=True, slots=True)
class Written:
    """An image that was made."""

    format: str
    copied: Converted
    stored_bytes: int  # that its files take up; the size of the disk on a device
    zeroed_bytes: int = 0  # of a device
    table_moved: bool = False  # the backup GPT, to the end of a larger device
    verified: bool = False  # it was read back


def chosen_format(path: Path, format: str | None) -> str:
    """The format named, else the one the suffix stands for; raw for a device.  Raises UsageError."""
    if path.is_block_device():
        if format not in (None, "raw"):
            raise UsageError(f"{path} is a device, which holds no image of another format")
        return "raw"
    found = format_called(format) if format else format_of_suffix(path)
    if found is None:
        known = ", ".join(name for name, row in FORMATS.items() if row.writable)
        raise UsageError(f"{path}: the name does not say which format is meant; say it with -O ({known})")
    return found


def parse_options(format: str, texts: Sequence[str]) -> dict[str, object]:
    """``NAME=VALUE`` texts as the values that the format's module takes.  Raises UsageError."""
    options = _options(format)
    parsed: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in options or not equals:
            known = "; ".join(f"{key}: {option.help}" for key, option in options.items()) or "none"
            raise UsageError(f"{text!r} is no option of {format} images; there are: {known}")
        try:
            parsed[name] = options[name].parse(value)
        except ValueError as error:
            raise UsageError(f"{text!r}: {error}") from None
    return parsed


def options_help(format: str) -> str:
    """What may be chosen for images of a format, a line each."""
    return "\n".join(f"{name}  {option.help}" for name, option in _options(format).items()) or "no options"


def _options(format: str) -> Options:
    if format == "ferro":
        from ferrotype.engine.writing_backup import OPTIONS

        return OPTIONS
    return writer(format).OPTIONS


def write_image(disk: OpenDisk, wanted: NewImage, job: Job) -> Written:
    """Make an image of the disk; it has its name when it is complete and durable, and not before.

    A device is written in place.  Raises Refused where that would overwrite something it may not, WriteError where
    there cannot be room.
    """
    check_image(disk, wanted)
    tell_of_use(disk, job)
    tell_of_beside(disk, job)
    written = _write(disk, wanted, job)
    if wanted.format != "ferro":  # a backup tells it itself
        tell_of_disk(disk, written.copied.found, job, written.copied.reason)
        tell_of_reach(disk, job)
    return written


def _write(disk: OpenDisk, wanted: NewImage, job: Job) -> Written:
    if wanted.path.is_block_device():
        from ferrotype.engine.writing_device import write_device

        return write_device(disk, wanted, job)
    check_room(disk.source, wanted, job)
    if wanted.format == "ferro":
        from ferrotype.engine.writing_backup import write_backup

        return write_backup(disk, wanted, job)
    module: Writable = writer(wanted.format)
    sector_size = sectors_in(wanted.format, disk, job)
    source = disk.source if wanted.format == "raw" else _whole_sectors(disk.source, job)
    with (
        _backing(wanted, job) as (backing, below),
        Outputs(
            wanted.path,
            replace=wanted.replace,
            spared=[*disk.files, *below],
            patience=wanted.patience,
            behind=True,
            mode=disk.permissions,
        ) as outputs,
    ):
        spec = Spec(source.size, sector_size, wanted.compress, wanted.options or {}, backing)
        sink = module.create(outputs, spec)
        try:
            digests = Digests() if wanted.verify_after else None
            done = copy(source, sink, job, backing=backing.source if backing else None, digests=digests)
            job.begin("flushing")
            if digests is not None and outputs.alone:  # what it replaces is there until it is proven
                _read_back(digests, source, outputs, wanted, job)
            outputs.commit()
            if digests is not None and not outputs.alone:  # they name each other
                _read_back(digests, source, outputs, wanted, job)
            return Written(wanted.format, done, outputs.stored_bytes(), verified=wanted.verify_after)
        finally:
            sink.close()


def _read_back(digests: Digests, source: Source, outputs: Outputs, wanted: NewImage, job: Job) -> None:
    with reopened(outputs.durable(), wanted) as back:
        check_digests(digests, source, back, wanted.path, job)


def _whole_sectors(source: Source, job: Job) -> Source:
    """The source, with zeros behind it where it ends within a sector: no disk of a virtual machine does."""
    missing = -source.size % SECTOR
    if not missing:
        return source
    job.note(f"the disk ends within a sector: {missing} bytes of zeros are put behind it")
    return Concat([source, MemoryDisk(missing)])


def check_image(disk: OpenDisk, wanted: NewImage, doing: str = "converted") -> None:
    """Raise what ``write_image`` would raise before it writes: Refused or UsageError."""
    refuse_harm(wanted.path, disk.files, doing)
    if wanted.path.exists() and not wanted.replace:
        raise Refused(f"{wanted.path} exists and would be overwritten; say --force if that is meant")
    if wanted.path.is_block_device():
        from ferrotype.engine.writing_device import check_device

        check_device(disk, wanted)
    elif wanted.format != "ferro":
        writer(wanted.format)
    elif wanted.backing is not None or wanted.compress:
        raise UsageError("a backup is always compressed, and on no backing file")


@contextmanager
def _backing(wanted: NewImage, job: Job) -> Iterator[tuple[Backing | None, list[Path]]]:
    """The lower layer of the new image, which the user named, opened for comparing with it; and all its files.

    Warns afterwards where one of these was changed meanwhile.
    """
    if wanted.backing is None:
        yield None, []
        return
    path = wanted.path.parent / wanted.backing  # as every reader of the new image will look for it
    if path.is_block_device() or not path.is_file():
        raise UsageError(
            f"the backing file {path} is not there; its name is taken relative to the new image's folder"
        )
    file = FileSource(path, patience=wanted.patience)
    try:
        format = wanted.backing_format or recognise(file) or ("raw" if path.suffix.lower() in RAW_SUFFIXES else None)
        if format is None:
            raise UsageError(f"say the format of the backing file {path} with --backing-format")
        if is_packed(format):
            raise UsageError(
                f"the backing file {path} is packed ({format}), which no reader of the new image looks into"
            )
        own = Watched(file)
        related = Related(path, patience=wanted.patience)
        image = open_file(file, related, format)
    except BaseException:
        file.close()
        raise
    try:
        tell_of_writers([path, *related.opened], job)
        name = str(wanted.backing)
        yield Backing(f"./{name}" if is_address(name) else name, format, image.source), [path, *related.opened]
        tell_of_changes([own, *related.opened.values()], job)
    finally:
        image.close()
