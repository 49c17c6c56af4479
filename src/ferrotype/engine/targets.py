"""Where a restore may write: opening targets, and refusing those that would harm something."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ferrotype.block import Sink, Source
from ferrotype.block.device import DeviceSink, open_source
from ferrotype.block.file import FileSink
from ferrotype.block.inventory import lies_on, same_storage, uses
from ferrotype.errors import Refused
from ferrotype.stall import Patience
from ferrotype.units import format_size

if TYPE_CHECKING:
    from ferrotype.engine.restore import Part


@dataclass(frozen=True, slots=True)
class Target:
    """An opened target; ``source`` reads it back, where it held something before."""

    sink: Sink
    source: Source | None


def check_fits(part: Part, target: Path) -> None:
    """Raises Refused where an existing device or file cannot take the part; nothing is opened for writing."""
    from ferrotype.engine.restore import check_target

    source = open_source(target)
    try:
        check_target(part, source)
    finally:
        source.close()


def refuse_harm(target: Path, images: Sequence[Path], doing: str = "restored") -> None:
    """Raise Refused where writing to ``target`` would harm something; ``images`` are the files read meanwhile.

    No option allows what is refused here.
    """
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
    path: Path, size: int, sector_size: int, *, in_place: bool, patience: Patience | None = None
) -> Iterator[Target]:
    """A device or an existing file in place, or a new file that takes its name when the block ends well."""
    if path.is_block_device():
        device = DeviceSink(path, patience=patience)
        source = open_source(path)
        try:
            yield Target(device, source)
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
            try:
                yield Target(file, reader)
            finally:
                reader.close()
        return
    with FileSink.create(path, size, sector_size, replace=path.exists(), patience=patience) as fresh:
        yield Target(fresh, None)
        fresh.commit()
