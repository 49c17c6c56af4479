"""Changes that hostile input is made of: fields set to numbers that hurt, blocks moved, lists that grow.

All of it is drawn from one random generator, so an input follows from its seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

import msgspec

from tests.fuzz.sparse import BLOCK, Run, Sparse

Mend = Callable[[Sparse], None]

_WIDTHS: Final = (1, 2, 2, 4, 4, 8)
_MOST_RUNS: Final = 1024  # of a disk: an input stays a few hundred KiB
MOST_SIZE: Final = 1 << 36  # bytes a mutated disk may claim; time to read a file system's maps follows its size


def number(rng: random.Random, width: int, old: int = 0, near: tuple[int, ...] = ()) -> int:
    """A number that is likely to be on the edge of something."""
    top = 1 << 8 * width
    kind = rng.randrange(8)
    if kind == 0:
        value = rng.choice((0, 1, 2, 3, 7, 8, 16, 255, 256))
    elif kind == 1:
        value = top - rng.choice((1, 1, 2, 8, 16, 256))
    elif kind == 2:
        value = (1 << rng.randrange(8 * width)) + rng.choice((-1, 0, 1))
    elif kind == 3:
        value = old + rng.choice((-16, -8, -4, -2, -1, 1, 2, 4, 8, 16))
    elif kind == 4:
        value = old ^ 1 << rng.randrange(8 * width)
    elif kind == 5 and near:
        value = rng.choice(near) + rng.choice((-1, 0, 0, 1))
    elif kind == 6:
        value = old * 2 if rng.random() < 0.5 else old // 2
    else:
        value = rng.randrange(top)
    return value % top


def text(rng: random.Random, data: bytes) -> bytes:
    """Bytes without structure: cut, doubled, overwritten."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind, at = rng.randrange(6), rng.randrange(len(out) + 1)
        if kind == 0 and out:
            out[at : at + rng.choice((1, 1, 4, 32))] = b""
        elif kind == 1 and out:
            start = rng.randrange(len(out))
            out[at:at] = out[start : start + rng.choice((1, 8, 64, 512))]
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.choice((1, 1, 2, 8)))
        elif kind == 3 and at + 4 <= len(out):
            width = rng.choice((1, 2, 4))
            old = int.from_bytes(out[at : at + width], "little")
            out[at : at + width] = number(rng, width, old).to_bytes(width, "little")
        elif kind == 4 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 5 and (digits := [i for i, octet in enumerate(out) if octet in b"0123456789"]):
            at = rng.choice(digits)
            out[at : at + 1] = str(number(rng, rng.choice((1, 4, 8)))).encode()
    return bytes(out)


# ---------------------------------------------------------------------- disks


def disk(rng: random.Random, data: bytes, mend: Mend | None = None, most: int = MOST_SIZE) -> bytes:
    """Another disk like this one; ``mend`` makes its checksums right again, nearly always."""
    made = Sparse.decode(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5, 8))):
        rng.choice(_CHANGES)(rng, made)
    made.size = min(made.size, most)
    del made.runs[_MOST_RUNS:]
    if mend is not None and rng.random() < 0.95:
        mend(made)
    return made.encode()


def _place(rng: random.Random, made: Sparse, width: int) -> tuple[bytearray, int] | None:
    """An aligned place in some block, mostly where something stands."""
    if not made.runs:
        return None
    run = rng.choice(made.runs)
    if run.repeats > 1 and rng.random() < 0.7:
        found = made.block(run.number + rng.randrange(run.repeats))
        data = found if found is not None else run.data
    else:
        data = run.data
    at = rng.randrange(0, BLOCK, width)
    for _ in range(4):
        if any(data[at : at + width]) or rng.random() < 0.2:
            break
        at = rng.randrange(0, BLOCK, width)
    return data, at


def _set(rng: random.Random, made: Sparse) -> None:
    width = rng.choice(_WIDTHS)
    place = _place(rng, made, width)
    if place is None:
        return
    data, at = place
    order: Any = rng.choice(("little", "little", "little", "big"))
    old = int.from_bytes(data[at : at + width], order)
    near = (made.size, made.size // 512, made.size // 1024, made.size // 4096, rng.choice(made.runs).number)
    data[at : at + width] = number(rng, width, old, near).to_bytes(width, order)


def _flip(rng: random.Random, made: Sparse) -> None:
    if (place := _place(rng, made, 1)) is not None:
        place[0][place[1]] ^= 1 << rng.randrange(8)


def _splice(rng: random.Random, made: Sparse) -> None:
    """A piece of one block over another place."""
    source, target = _place(rng, made, 4), _place(rng, made, 4)
    if source is None or target is None:
        return
    length = min(rng.choice((4, 8, 16, 32, 64, 128)), BLOCK - max(source[1], target[1]))
    target[0][target[1] : target[1] + length] = source[0][source[1] : source[1] + length]


def _fill(rng: random.Random, made: Sparse) -> None:
    if (place := _place(rng, made, 4)) is not None:
        length = min(rng.choice((4, 16, 64, 256, 512)), BLOCK - place[1])
        place[0][place[1] : place[1] + length] = bytes([rng.choice((0, 0xFF, 0xFF, rng.randrange(256)))]) * length


def _move(rng: random.Random, made: Sparse) -> None:
    """Blocks copied, moved, swapped or dropped."""
    if not made.runs:
        return
    kind, run = rng.randrange(4), rng.choice(made.runs)
    if kind == 0:
        made.runs.append(Run(rng.choice(made.runs).number + rng.choice((0, 0, 1, 2, 8)), 1, bytearray(run.data)))
    elif kind == 1:
        run.number = max(0, run.number + rng.choice((-8, -2, -1, 1, 2, 8)))
    elif kind == 2:
        other = rng.choice(made.runs)
        run.data, other.data = other.data, run.data
    else:
        made.runs.remove(run)


def _repeat(rng: random.Random, made: Sparse) -> None:
    if made.runs:
        rng.choice(made.runs).repeats = rng.choice((1, 2, 8, 64, 1024, 1 << 15))


def _resize(rng: random.Random, made: Sparse) -> None:
    last = max((run.number + 1 for run in made.runs), default=0) * BLOCK
    sizes = (made.size // 2, made.size * 2, made.size - 512, made.size + 512, last, last - 100, 1 << 36, 1 << 32)
    made.size = max(0, rng.choice(sizes))


_CHANGES: Final[tuple[Callable[[random.Random, Sparse], None], ...]] = (
    *([_set] * 8), *([_flip] * 2), *([_splice] * 3), _fill, _move, _move, _repeat, _resize,
)  # fmt: skip


# ---------------------------------------------------------------------- trees of MessagePack


def tree(rng: random.Random, data: bytes) -> bytes:
    """Another value like this one: numbers on edges, bytes havocked, items doubled, swapped and dropped."""
    try:
        value = msgspec.msgpack.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return text(rng, data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _changed(rng, value, 0)
    return msgspec.msgpack.encode(value)


def _changed(rng: random.Random, value: Any, depth: int) -> Any:
    if isinstance(value, list):
        if not value:
            return [number(rng, 4)] if rng.random() < 0.2 else value
        index = rng.randrange(len(value))
        kind = rng.randrange(10)
        if depth and kind == 0 and len(value) < 4096:
            times = rng.choice((1, 1, 2, 16))
            return value[:index] + [value[index]] * times + value[index:]
        if depth and kind == 1:
            return value[:index] + value[index + 1 :]
        if depth and kind == 2:
            other = rng.randrange(len(value))
            value[index], value[other] = value[other], value[index]
            return value
        value[index] = _changed(rng, value[index], depth + 1)
        return value
    if isinstance(value, bytes):
        return text(rng, value)[: 1 << 16]
    if isinstance(value, str):
        return text(rng, value.encode("utf-8", "surrogatepass"))[: 1 << 16].decode("utf-8", "replace")
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return number(rng, rng.choice((1, 4, 8)), value % (1 << 63))
    return value
