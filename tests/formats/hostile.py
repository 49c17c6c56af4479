"""Images with one thing wrong: each field of a structure set to what it must not be, and files cut short."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_type_hints

from ferrotype.block import read
from ferrotype.errors import FormatError
from ferrotype.records import Record
from tests.formats.judges import MiB, opened

_READ = 4 * MiB  # at the start, in the middle and at the end of what can be opened


class Field(NamedTuple):
    """A field of an on-disk structure."""

    name: str
    offset: int
    size: int
    endian: str


def fields_of(structure: type[Record]) -> Iterator[Field]:
    """The fields of a structure and where they stand in it."""
    layout = structure._layout.format
    hints = get_type_hints(structure, include_extras=True)
    at = 0
    for name in structure._names:
        size = struct.calcsize("<" + get_args(hints[name])[1])
        yield Field(name, at, size, layout[0])
        at += size


def bad_values(field: Field, stored: bytes, seed: int = 0) -> list[bytes]:
    """Values for a field that differ from the one it has."""
    if field.size > 8:
        rng = random.Random(f"{seed} {field.name}")
        made = [bytes(field.size), b"\xff" * field.size, rng.randbytes(field.size), b"/etc/passwd".ljust(field.size)]
        return [value[: field.size] for value in made]
    order: Literal["little", "big"] = "little" if field.endian == "<" else "big"
    bits = 8 * field.size
    now = int.from_bytes(stored, order)
    numbers = {0, 1, 2, 3, 7, 255, 511, 513, 4096, now + 1, now - 1, now * 2, now * 512, now ^ 1 << (bits - 1)}
    numbers |= {(1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1, 1 << (bits // 2), (1 << bits) - 512}
    return [
        number.to_bytes(field.size, order) for number in sorted(n % (1 << bits) for n in numbers) if number != now
    ]


def survives(path: Path, format: str, *, allowed: Sequence[Path] = ()) -> bool:
    """Whether the image can be opened; it, and reading it, raises nothing but errors of the format."""
    try:
        image = opened(path, format, allowed=allowed)
    except FormatError:
        return False
    try:
        size = image.source.size
        for start in {0, max(0, size // 2 - _READ // 2), max(0, size - _READ)}:
            try:
                length = min(_READ, size - start)
                image.source.extents(start, length)
                read(image.source, start, length)
            except FormatError:
                continue
        with contextlib.suppress(FormatError):
            image.source.extents(0, min(size, 1 << 36))
    finally:
        image.close()
    return True


def with_bytes(content: bytes, offset: int, data: bytes) -> bytes:
    """The content with some bytes replaced."""
    return content[:offset] + data + content[offset + len(data) :]
