"""Disk images made and judged by other programs: qemu-img and qemu-io.

Images are written in pieces of odd sizes, in shuffled order, with zeros and discards between: readers that are right
on images written from front to back are wrong on these.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ferrotype.block import read
from ferrotype.block.file import FileSource
from ferrotype.block.outputs import Outputs
from ferrotype.block.views import Slice
from ferrotype.engine.convert import copy
from ferrotype.engine.writing import parse_options
from ferrotype.extents import State
from ferrotype.formats import Backing, Image, Packer, Spec
from ferrotype.formats.registry import open_file, writer
from ferrotype.formats.related import Related
from ferrotype.job import NullJob
from ferrotype.testing.sources import check_source
from tests.machine import run

KiB, MiB = 1024, 1 << 20


def opened(path: Path, format: str | None = None, *, allowed: Sequence[Path] = ()) -> Image:
    """An image as ferrotype opens it, in the format its content shows."""
    file = FileSource(path)
    try:
        return open_file(file, Related(path, allowed), format)
    except BaseException:
        file.close()
        raise


def damages_of(path: Path) -> list[str]:
    """What an image's own checksums say of it."""
    image = opened(path)
    assert image.check is not None
    found = image.check(NullJob())
    image.close()
    return found


# ---------------------------------------------------------------------- made by qemu


def scattered(
    path: Path,
    format: str,
    size: int,
    options: str = "",
    *,
    seed: int = 0,
    writes: int = 60,
    backing: tuple[Path, str] | None = None,
    zeros: bool = True,
    compressed: bool = False,
) -> Path:
    """A new image with data strewn over it; ``zeros``: with zero clusters and discards as well.

    ``compressed`` writes whole compressed clusters (qcow2).  The same seed writes the same.
    """
    chosen = ["-o", options] if options else []
    below: list[str | Path] = ["-b", backing[0], "-F", backing[1]] if backing else []
    run("qemu-img", "create", "-q", "-f", format, *chosen, *below, path, str(size))
    scatter(path, format, size, seed=seed, writes=writes, zeros=zeros, compressed=compressed)
    return path


def scatter(
    path: Path,
    format: str,
    size: int,
    *,
    seed: int = 0,
    writes: int = 60,
    zeros: bool = True,
    compressed: bool = False,
    cluster: int = 64 * KiB,
) -> None:
    """Write into an image that exists, in pieces of odd sizes, in shuffled order."""
    rng = random.Random(seed)
    commands = []
    for _ in range(writes):
        length = rng.choice([512, 1536, 4096, 20 * KiB + 512, 64 * KiB, 200 * KiB, 1 * MiB + 512])
        offset = rng.randrange(0, size) // 512 * 512
        length = min(length, size - offset) // 512 * 512
        kind = rng.random()
        if not length:
            continue
        if compressed and kind < 0.4:
            whole = offset // cluster * cluster
            commands.append(f"write -c -P {rng.randrange(1, 256)} {whole} {min(cluster, size - whole)}")
        elif zeros and kind < 0.55:
            commands.append(f"write -z {'-u ' if rng.random() < 0.5 else ''}{offset} {length}")
        elif zeros and kind < 0.65:
            commands.append(f"discard {offset} {length}")
        else:
            commands.append(f"write -P {rng.randrange(1, 256)} {offset} {length}")
    refused = (0, 1) if compressed else (0,)  # a compressed cluster cannot replace another
    run("qemu-io", "-t", "unsafe", "-f", format, path, text_in="\n".join([*commands, "quit", ""]), ok=refused)


def content_of(path: Path, format: str, tmp: Path) -> bytes:
    """What qemu-img reads in an image."""
    raw = tmp / f"{path.name}.judged.raw"
    run("qemu-img", "convert", "-f", format, "-O", "raw", path, raw)
    content = raw.read_bytes()
    raw.unlink()
    return content


def check_reader(path: Path, content: bytes, format: str | None = None, *, rounds: int = 120, seed: int = 0) -> None:
    """Hold our reading of an image against its content: at any cut, from many threads, extents that are true."""
    image = opened(path, format)
    try:
        check_source(lambda: Slice(image.source, 0, image.source.size), content, rounds=rounds, seed=seed)
    finally:
        image.close()


# ---------------------------------------------------------------------- written by us


def random_disk(size: int, seed: int = 0) -> bytes:
    """Content with runs of data, of text that compresses well, and of zeros, at odd places."""
    rng = random.Random(seed)
    disk = bytearray(size)
    at = 0
    while at < size:
        length = min(rng.choice([512, 4096, 60_000, 300_000]), size - at)
        kind = rng.random()
        if kind < 0.35:
            disk[at : at + length] = rng.randbytes(length)
        elif kind < 0.6:
            disk[at : at + length] = (b"the same text again and again, " * (length // 31 + 1))[:length]
        at += length
    return bytes(disk)


def make_image(
    path: Path,
    format: str,
    content: bytes,
    *texts: str,
    compress: bool = False,
    sector_size: int = 512,
    backing: Backing | None = None,
    tmp: Path | None = None,
) -> Path:
    """An image of the content, made by the engine as ``convert`` makes it."""
    raw = (tmp or path.parent) / f"{path.name}.content.raw"
    raw.write_bytes(content)
    with FileSource(raw, sector_size) as source, Outputs(path) as outputs:
        spec = Spec(len(content), sector_size, compress, parse_options(format, texts), backing)
        sink = writer(format).create(outputs, spec)
        copy(source, sink, NullJob(), backing=backing.source if backing else None, workers=3)
        outputs.commit()
        sink.close()
    raw.unlink()
    return path


def make_image_piecemeal(path: Path, format: str, content: bytes, *texts: str, seed: int = 0) -> Path:
    """The same through the sink itself: whole units in shuffled order from many threads, where it allows that."""
    rng = random.Random(seed)
    with Outputs(path) as outputs:
        sink = writer(format).create(outputs, Spec(len(content), chosen=parse_options(format, texts)))
        unit = max(sink.traits.unit, 4096)
        ranges, at = [], 0
        while at < len(content):
            length = min(unit * rng.randint(1, 40), len(content) - at)
            ranges.append((at, length))
            at += length

        def put(place: tuple[int, int]) -> None:
            offset, length = place
            piece = content[offset : offset + length]
            if piece.count(0) == length:
                sink.write_zeros(offset, length)
            else:
                sink.write(offset, memoryview(piece))

        if sink.traits.ordered or isinstance(sink, Packer):
            for place in ranges:
                put(place)
        else:
            rng.shuffle(ranges)
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(put, ranges))
        sink.finish()
        outputs.commit()
        sink.close()
    return path


def check_written(path: Path, format: str, content: bytes, tmp: Path, *, consistent: bool = True) -> None:
    """qemu-img finds no error in an image, and the content; so do we."""
    if consistent:
        run("qemu-img", "check", "-q", "-f", format, path)
    told = json.loads(run("qemu-img", "info", "--output=json", "-f", format, path))
    assert told["virtual-size"] == -(-len(content) // 512) * 512  # compare takes zeros at the end for no difference
    raw = tmp / f"{path.name}.expected.raw"
    raw.write_bytes(content)
    run("qemu-img", "compare", "-f", format, "-F", "raw", path, raw)
    raw.unlink()
    image = opened(path)
    try:
        assert image.source.size == len(content)
        assert read(image.source, 0, len(content)) == content
    finally:
        image.close()


def zero_bytes(image: Image) -> int:
    """Bytes that are known to be zeros without reading."""
    return image.source.extents(0, image.source.size).total(State.ZERO)


def facts_of(path: Path) -> Mapping[str, object]:
    """The facts of an image."""
    image = opened(path)
    image.close()
    return image.facts
