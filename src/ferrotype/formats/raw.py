"""The raw disk: a file whose byte n is byte n of the disk.

disk.raw                            sparse where the disk is zeros
disk.raw.001  disk.raw.002  ...     the same, split: parts of one size, the last one shorter
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from ferrotype.block import Source, Traits
from ferrotype.block.file import FileSink, check_write
from ferrotype.block.outputs import Outputs
from ferrotype.block.views import Concat
from ferrotype.errors import UsageError
from ferrotype.formats import Image, Option, Options, Spec, one_of
from ferrotype.formats.related import Related
from ferrotype.units import MiB, parse_size

__all__ = ["OPTIONS", "create", "open", "probe"]

MAX_PARTS: Final = 10_000  # files of one disk, each of which is held open

_PART: Final = re.compile(r"(.*)\.(0*1|0+)$")  # of the first part: .001, .000, .1


OPTIONS: Final[Options] = {
    "preallocation": Option(
        "off: zeros take no space; full: all of the disk's space is taken now", one_of("off", "full")
    ),
    "split": Option("size of the parts NAME.001, NAME.002 ...", parse_size),
}


def probe(file: Source) -> bool:  # noqa: ARG001
    """Never: any bytes may be a raw disk, so only the user can say that they are."""
    return False


def open(file: Source, related: Related) -> Image:
    """The file as it is; where it is called like the first part of a split disk, with the parts that follow it."""
    with ExitStack() as stack:
        rest = list(_further_parts(related, stack))
        keep = stack.pop_all()
    if not rest:
        return Image("raw", file, close=keep.close, facts={"subformat": "flat"})
    whole = Concat([file, *rest])
    keep.callback(file.close)
    return Image("raw", whole, close=keep.close, facts={"subformat": "split", "parts": 1 + len(rest)})


def _further_parts(related: Related, stack: ExitStack) -> Iterator[Source]:
    """The parts behind the first, up to the first number that has no file."""
    match = _PART.fullmatch(related.path.name) if related.path is not None else None
    if match is None:
        return
    head, first = match.groups()
    for number in range(int(first) + 1, MAX_PARTS):
        part = related.sibling(f"{head}.{number:0{len(first)}}", "next part")
        if part is None:
            return
        stack.callback(part.close)
        yield part


def create(outputs: Outputs, spec: Spec) -> RawSink:
    """A raw disk in one file, or in parts."""
    split = spec.get("split", 0)
    if spec.compress or spec.backing:
        raise UsageError("a raw disk is neither compressed nor on a backing file")
    if not split:
        file = outputs.create(size=spec.size, sector_size=spec.sector_size)
        return RawSink([file], spec, spec.size)
    if split < MiB or split % spec.sector_size:
        raise UsageError(f"parts have at least {MiB} bytes and whole sectors")
    count = max(1, -(-spec.size // split))
    if count >= MAX_PARTS:
        raise UsageError(f"{count} parts are too many; a disk may have {MAX_PARTS - 1}")
    width = max(3, len(str(count)))
    files = [
        outputs.create(_part_name(outputs.path, number + 1, width), min(split, spec.size - number * split))
        for number in range(count)
    ]
    return RawSink(files, spec, split)


def _part_name(path: Path, number: int, width: int) -> Path:
    return path.with_name(f"{path.name}.{number:0{width}}")


class RawSink:
    """New files that hold the disk as it is."""

    def __init__(self, files: list[FileSink], spec: Spec, part_size: int) -> None:
        self._files, self._part = files, max(part_size, 1)
        self._size = spec.size
        self._full = spec.get("preallocation", "off") == "full"
        self.traits = Traits(sector_size=spec.sector_size, blank=True)

    @property
    def size(self) -> int:
        return self._size

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[FileSink, int, int, int]]:
        """The files under a range: file, offset in it, start and end of the piece in the range."""
        at = offset
        while at < offset + length:
            number, inside = divmod(at, self._part)
            count = min(self._part - inside, offset + length - at)
            yield self._files[number], inside, at - offset, at - offset + count
            at += count

    def write(self, offset: int, data: memoryview, /) -> None:
        check_write("raw disk", self._size, offset, len(data))
        for file, at, start, end in self._pieces(offset, len(data)):
            file.write(at, data[start:end])

    def write_zeros(self, offset: int, length: int, /) -> None:
        check_write("raw disk", self._size, offset, length)
        for file, at, start, end in self._pieces(offset, length):
            file.write_zeros(at, end - start)

    def finish(self) -> None:
        for file in self._files if self._full else ():
            file.preallocate()

    def flush(self) -> None:
        for file in self._files:
            file.flush()

    def close(self) -> None:
        """Nothing: the outputs own the files."""
