"""What every format of disk images must do, as two functions a test calls.

    check_format(module, path, content)       a file that another program made, and the disk it holds
    check_writable(module, path, content)     the format's own writer, read by its own reader

A failed check raises AssertionError.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ferrotype.block import Source, read
from ferrotype.block.file import FileSource
from ferrotype.block.memory import MemoryDisk
from ferrotype.block.outputs import Outputs
from ferrotype.block.views import Slice
from ferrotype.errors import FerrotypeError, FormatError
from ferrotype.formats import Format, Image, Packer, Spec, Writable
from ferrotype.formats.related import Related
from ferrotype.testing.claims import must_raise, require
from ferrotype.testing.sources import check_source

__all__ = ["check_format", "check_writable"]


def check_format(module: Format, path: Path, content: bytes, *, rounds: int = 100, seed: int = 0) -> None:
    """Hold a reader against an image whose content is known, and against damaged copies of it.

    The file should be small (a few MiB): it is read many times.
    """
    rng = random.Random(seed)  # noqa: S311  repeatable
    with FileSource(path) as file:
        require(module.probe(file), "probe does not know the file")
        data = read(file, 0, file.size)
    for strange in (b"", b"\0" * 4096, rng.randbytes(70_000)):
        require(not _probed(module, MemoryDisk(strange)), f"probe takes {len(strange)} other bytes for an image")
    image = module.open(FileSource(path), Related(path))
    try:
        require(image.missing is None, f"the disk cannot be read: {image.missing}")
        check_source(lambda: Slice(image.source, 0, image.source.size), content, rounds=rounds, seed=seed)
    finally:
        image.close()
    for _ in range(rounds):
        _check_damaged(module, _damaged(rng, data), path)


def _probed(module: Format, file: Source) -> bool:
    try:
        return module.probe(file)
    except FormatError:
        return False


def _damaged(rng: random.Random, data: bytes) -> bytes:
    """A copy that is cut short, or that differs in a few bytes near its head or its end."""
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    copy = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        near = rng.randrange(min(len(copy), 2048))
        copy[near if rng.random() < 0.7 else len(copy) - 1 - near] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
    return bytes(copy)


def _check_damaged(module: Format, data: bytes, path: Path) -> None:
    """It opens or is refused, and is read or is refused: no other exception, and no byte outside the disk."""
    file = MemoryDisk(data)
    try:
        image = module.open(file, Related(path))
    except FerrotypeError:
        return
    try:
        size = image.source.size
        for offset in {0, size // 2, max(0, size - 70_000)}:
            length = min(70_000, size - offset)
            image.source.extents(offset, length)
            image.source.read_into(offset, memoryview(bytearray(length)))
    except FerrotypeError:
        pass
    finally:
        image.close()


def check_writable(
    module: Writable,
    path: Path,
    content: bytes,
    *,
    compress: bool = False,
    chosen: Mapping[str, object] | None = None,
    seed: int = 0,
) -> None:
    """Hold a writer against its reader: whole units in shuffled order from many threads, zeros told or left out.

    Leaves the finished image at ``path``, for another program to judge.
    """
    rng = random.Random(seed)  # noqa: S311  repeatable
    spec = Spec(len(content), compress=compress, chosen=chosen or {})
    with Outputs(path) as outputs:
        module.create(outputs, spec).close()
    require(not path.exists(), "an image that was not committed has its name")
    require(list(path.parent.glob(f".{path.name}*")) == [], "an image that was given up leaves files")
    with Outputs(path) as outputs:
        sink = module.create(outputs, spec)
        require(sink.size == len(content), f"the sink has {sink.size} bytes, not {len(content)}")
        unit = max(sink.traits.unit, 4096)
        ranges = _ranges(rng, len(content), unit)
        if not sink.traits.ordered and not isinstance(sink, Packer):
            rng.shuffle(ranges)

        def put(place: tuple[int, int]) -> None:
            offset, length = place
            piece = content[offset : offset + length]
            if piece.count(0) != length:
                sink.write(offset, memoryview(piece))
            elif offset % (2 * unit):
                sink.write_zeros(offset, length)

        with ThreadPoolExecutor(1 if sink.traits.ordered or isinstance(sink, Packer) else 4) as pool:
            list(pool.map(put, ranges))
        sink.finish()
        outputs.commit()
        sink.close()
    image = module.open(FileSource(path), Related(path))
    try:
        _check_same(image, content)
    finally:
        image.close()
    with Outputs(path) as outputs:
        must_raise(FerrotypeError, lambda: module.create(outputs, spec), "replacing an image that exists")


def _ranges(rng: random.Random, size: int, unit: int) -> list[tuple[int, int]]:
    ranges, at = [], 0
    while at < size:
        length = min(unit * rng.randint(1, 40), size - at)
        ranges.append((at, length))
        at += length
    return ranges


def _check_same(image: Image, content: bytes) -> None:
    require(image.source.size == len(content), f"the image has {image.source.size} bytes, not {len(content)}")
    got = read(image.source, 0, len(content))
    if got != content:
        first = next(i for i, (a, b) in enumerate(zip(got, content, strict=True)) if a != b)
        require(False, f"the image differs from what was written from byte {first} on")
