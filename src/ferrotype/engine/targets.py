"""Where a restore may write: opening targets, and refusing those that would harm something."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ferrotype.block import Sink, Source
from ferrotype.block.device import DeviceSink, open_source
from ferrotype.block.disks import disks
from ferrotype.block.file import FileSink
from ferrotype.block.inventory import lies_on, same_storage, uses
from ferrotype.errors import Refused, UsageError
from ferrotype.formats.names import other_format
from ferrotype.fresh import among_devices, true_name
from ferrotype.stall import Patience
from ferrotype.units import format_size


@dataclass(frozen=True, slots=True)
class Target:
    """An opened target; ``source`` reads it, where it held something before.

    ``reread`` makes what was written durable and opens it as the medium gives it back; the caller closes that.
    """

    sink: Sink
    source: Source | None
    reread: Callable[[], Source]


def check_takes(target: Source | Sink, size: int, sector_size: int) -> None:
    """Raise Refused where a target cannot take a disk of ``size`` bytes, whose sectors have ``sector_size``."""
    if target.size < size:
        raise Refused(
            f"the target has {format_size(target.size)} ({target.size} bytes), {format_size(size)} "
            f"({size} bytes) are needed; nothing was written"
        )
    if target.traits.sector_known and target.traits.sector_size != sector_size:
        raise Refused(
            f"the target has sectors of {target.traits.sector_size} bytes and the disk is one with sectors of "
            f"{sector_size}: its partition table and file systems would not work; nothing was written"
        )


def check_fits(target: Path, size: int, sector_size: int) -> None:
    """The same for an existing device or file; nothing is opened for writing."""
    source = open_source(target)
    try:
        check_takes(source, size, sector_size)
    finally:
        source.close()


def refuse_no_device(target: Path) -> None:
    """Raise Refused where ``target`` is a device that is not there, and a file would be made in memory.

    So, too, where a link leads there that somebody else made.
    """
    final = true_name(target)
    if not among_devices(final) or is_device(final):
        return
    there = ", ".join(f"{disk.path} ({format_size(disk.size)})" for disk in disks() if disk.size) or "none"
    what = "is no device" if final.exists() else "does not exist"
    raise Refused(
        f"{target} {what}, and a file there would be kept in memory and lost; the disks that are there: {there}; "
        "nothing was written"
    )


def refuse_misnamed(target: Path) -> None:
    """Raise UsageError where a raw disk would be written to a file that is named like something else."""
    if not is_device(target) and (what := other_format(target)) is not None:
        raise UsageError(
            f"{target} is named like {what}, and would be a raw disk: name it .img, or say -O raw if that is meant"
        )


def is_device(path: Path) -> bool:
    """Whether the path is a device, of whatever kind."""
    return path.is_block_device() or path.is_char_device()


def refuse_harm(target: Path, images: Sequence[Path], doing: str = "restored") -> None:
    """Raise Refused where writing to ``target`` would harm something; ``images`` are the files read meanwhile.

    No option allows what is refused here.
    """
    refuse_no_device(target)
    for image in images:
        if same_storage(target, image):
            raise Refused(f"{target} is what is being {doing} from; nothing was written")
    if target.is_block_device():
        for image in images:
            if lies_on(image, target):
                raise Refused(f"{target} holds {image}, which is being {doing} from; nothing was written")
    if target.exists() and (reasons := uses(target)):
        raise Refused(f"{target} is in use: {'; '.join(reasons)}; nothing was written")


@contextmanager
def open_target(
    path: Path,
    size: int,
    sector_size: int,
    *,
    in_place: bool,
    mode: int = 0o666,
    patience: Patience | None = None,
) -> Iterator[Target]:
    """A device or an existing file in place, or a new file that takes its name when the block ends well.

    ``mode``: permissions of a new file, less what the umask takes.

    A file is written behind (``FileSink.write``), so by one thread.
    """
    if path.is_block_device():
        device = DeviceSink(path, patience=patience)
        source = open_source(path)
        try:
            yield Target(device, source, device.reread)
            device.reread_partitions()
        finally:
            source.close()
            device.close()
        return
    if in_place and path.exists():
        with FileSink.open_existing(path, sector_size, patience=patience) as file:
            if file.size < size:
                raise Refused(
                    f"{path} has {format_size(file.size)}, {format_size(size)} are needed; nothing was written"
                )
            reader = open_source(path, sector_size=sector_size)
            file.behind = True
            try:
                yield Target(file, reader, file.reread)
            finally:
                reader.close()
        return
    with FileSink.create(path, size, sector_size, replace=path.exists(), mode=mode, patience=patience) as fresh:
        fresh.behind = True
        yield Target(fresh, None, fresh.reread)
        fresh.commit()
