"""The raw disk: a file whose byte n is byte n of the disk.

disk.raw                            sparse where the disk is zeros
disk.raw.001  disk.raw.002  ...     the same, split: parts of one size, the last one shorter; ``split`` finds them
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from ferrotype.block import Source, Traits
from ferrotype.block.file import FileSink, check_write
from ferrotype.block.lenient import MarkedSource
from ferrotype.block.outputs import Outputs, in_a_row
from ferrotype.errors import UsageError
from ferrotype.formats import Image, Option, Options, Room, Spec, WritableSink, one_of
from ferrotype.formats.mapfile import map_beside
from ferrotype.formats.related import Related
from ferrotype.formats.split import MAX_PARTS, SplitFile
from ferrotype.units import MiB, parse_size

__all__ = ["OPTIONS", "create", "open", "probe", "room"]

_AT_ONCE: Final = 400  # parts written at the same time, each held open; many systems allow 1024 files

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
    """The file as it is, or all parts of it.  What a map of ddrescue beside it calls unread is unreadable."""
    facts: dict[str, object] = {"subformat": "flat"}
    if isinstance(file, SplitFile) and file.count > 1:
        facts = {"subformat": "split", "parts": file.count}
    found = map_beside(related, file.size)
    if found is None:
        return Image("raw", file, facts=facts)
    source = MarkedSource(file, found.unread) if found.unread else file
    return Image("raw", source, facts=facts, warnings=found.warnings)


def room(spec: Spec) -> Room:
    """What is not zeros, or all."""
    return Room(least=spec.size if spec.get("preallocation", "off") == "full" else 0, unit=1)


def create(outputs: Outputs, spec: Spec) -> WritableSink:
    """A raw disk in one file, or in parts."""
    split = spec.get("split", 0)
    if spec.compress or spec.backing:
        raise UsageError("a raw disk is neither compressed nor on a backing file")
    if not split:
        file = outputs.create(size=spec.size, sector_size=spec.sector_size)
        head = _PART.fullmatch(outputs.path.name)
        if head is not None:  # called like the first of several
            name, first = head.groups()
            outputs.supersede(
                lambda: in_a_row(lambda n: outputs.path.with_name(f"{name}.{n:0{len(first)}}"), int(first) + 1)
            )
        return RawSink([file], spec, spec.size)
    if split < MiB or split % spec.sector_size:
        raise UsageError(f"parts have at least {MiB} bytes and whole sectors")
    count = max(1, -(-spec.size // split))
    if count >= MAX_PARTS:
        raise UsageError(f"{count} parts are too many; a disk may have {MAX_PARTS - 1}")
    width = max(3, len(str(count)))

    def named(number: int) -> Path:
        return outputs.path.with_name(f"{outputs.path.name}.{number:0{width}}")

    def older() -> Iterator[Path]:
        yield from filter(os.path.lexists, map(named, range(1, count + 1)))
        yield from in_a_row(named, count + 1)

    outputs.supersede(older)
    sizes = [min(split, spec.size - start) for start in range(0, count * split, split)]
    makers = [partial(outputs.create, named(number), size) for number, size in enumerate(sizes, 1)]
    if count > _AT_ONCE:
        return _PartsInTurn(outputs, makers, spec, split)
    return RawSink([make() for make in makers], spec, split)


def _pieces(part: int, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """The parts of one size under a range: number, offset in the part, start and end of the piece in the range."""
    at = offset
    while at < offset + length:
        number, inside = divmod(at, part)
        count = min(part - inside, offset + length - at)
        yield number, inside, at - offset, at - offset + count
        at += count


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

    def write(self, offset: int, data: memoryview, /) -> None:
        check_write("raw disk", self._size, offset, len(data))
        for number, at, start, end in _pieces(self._part, offset, len(data)):
            self._files[number].write(at, data[start:end])

    def write_zeros(self, offset: int, length: int, /) -> None:
        check_write("raw disk", self._size, offset, length)
        for number, at, start, end in _pieces(self._part, offset, length):
            self._files[number].write_zeros(at, end - start)

    def finish(self) -> None:
        for file in self._files if self._full else ():
            file.preallocate()

    def flush(self) -> None:
        for file in self._files:
            file.flush()

    def close(self) -> None:
        """Nothing: the outputs own the files."""


class _PartsInTurn:
    """New files that hold the disk as it is, too many to be open at once: one is made when the last is complete."""

    def __init__(
        self, outputs: Outputs, makers: Sequence[Callable[[], FileSink]], spec: Spec, part_size: int
    ) -> None:
        self._outputs, self._part, self._size = outputs, part_size, spec.size
        self._full = spec.get("preallocation", "off") == "full"
        self._makers = makers
        self._file = makers[0]()
        self._number = 0
        self.traits = Traits(sector_size=spec.sector_size, blank=True, ordered=True)

    @property
    def size(self) -> int:
        return self._size

    def write(self, offset: int, data: memoryview, /) -> None:
        check_write("raw disk", self._size, offset, len(data))
        for number, at, start, end in _pieces(self._part, offset, len(data)):
            self._go_to(number)
            self._file.write(at, data[start:end])

    def write_zeros(self, offset: int, length: int, /) -> None:
        """Nothing to do: the new files are zeros."""
        check_write("raw disk", self._size, offset, length)

    def _go_to(self, number: int) -> None:
        """Complete all parts before the one with the number."""
        if number < self._number:
            raise ValueError(f"part {number} is written when {self._number} are complete")
        while self._number < number:
            self._end()
            self._number += 1
            self._file = self._makers[self._number]()

    def _end(self) -> None:
        if self._full:
            self._file.preallocate()
        self._outputs.done(self._file)

    def finish(self) -> None:
        self._go_to(len(self._makers) - 1)
        self._end()

    def flush(self) -> None:
        """Nothing: the outputs flush their files."""

    def close(self) -> None:
        """Nothing: the outputs own the files."""
