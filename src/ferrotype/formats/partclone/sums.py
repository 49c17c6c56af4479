"""Proving the blocks of a partclone image by the checksums between them.

    none      nothing can be proven
    crc32     CRC-32 without its last inversion, of each strip, or (not reseeded) of all strips up to its own
    xxh64     the same with XXH64, seed 0
    version 1 the sum of a block is the CRC-32, carried on from the block before, of the block's FIRST byte
              repeated as often as the block has bytes: a mistake of the program that became its format

The sums of version 1 are proven all at once, because a CRC is linear: with L for "shift through a block of zeros",

    sum[i] = L(sum[i - 1]) ^ sum of the byte b[i] from 0

and L of a 32-bit word is four table look-ups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import xxhash
from isal import isal_zlib
from numpy.typing import NDArray

from ferrotype.block import read
from ferrotype.errors import ReadError
from ferrotype.formats.partclone.blocks import Bitmap, Strips
from ferrotype.job import Job
from ferrotype.units import MiB

__all__ = ["Sums", "damages"]

_MASK: Final = 0xFFFFFFFF
_WINDOW: Final = 8 * MiB  # bytes read together
MAX_SENTENCES: Final = 1000


@dataclass(frozen=True, slots=True)
class Sums:
    """The checksums of an image: what they are of, and bytes and used blocks of each; 0 where there are none."""

    name: str
    size: int
    blocks: int
    reseed: bool


def damages(strips: Strips, bitmap: Bitmap, sums: Sums, job: Job) -> list[str]:
    """A sentence for each run of strips whose checksum does not match, and for what the file lacks."""
    used = bitmap.total()
    present = min(used, strips.size // strips.block_size)
    job.begin("checking the checksums", present * strips.block_size)
    if not sums.size:
        return _cut_short(used, present)
    if sums.blocks == 1 and not sums.reseed and sums.name not in ("crc32", "xxh64"):
        bad = _bad_first_bytes(strips, present, job)
    else:
        bad = _bad_strips(strips, sums, used, present, job)
    sentences = []
    for first, last in _joined(bad):
        end = min(last * sums.blocks + sums.blocks, used) - 1
        low = bitmap.block(first * sums.blocks) * strips.block_size
        high = (bitmap.block(end) + 1) * strips.block_size
        sentences.append(
            f"the used blocks between the bytes {low} and {high} of the disk do not match their checksum"
        )
        if len(sentences) == MAX_SENTENCES:
            sentences.append("there is more damage, which is not listed")
            break
    return sentences + _cut_short(used, present)


def _cut_short(used: int, present: int) -> list[str]:
    return [f"the file ends early: {used - present} of its {used} blocks are missing"] if present < used else []


def _joined(numbers: Iterator[int]) -> Iterator[tuple[int, int]]:
    """Runs of ascending numbers: first and last."""
    run: tuple[int, int] | None = None
    for number in numbers:
        if run is not None and number == run[1] + 1:
            run = (run[0], number)
            continue
        if run is not None:
            yield run
        run = (number, number)
    if run is not None:
        yield run


def _bad_strips(strips: Strips, sums: Sums, used: int, present: int, job: Job) -> Iterator[int]:
    """Numbers of the strips whose checksum does not match; a loop over checksums, which the library works off."""
    size, width = strips.strip, sums.size
    crc, state = 0, xxhash.xxh64(seed=0)
    for number in range(-(-used // sums.blocks)):
        length = min(size, used * strips.block_size - number * size)
        start = strips.at + number * (size + width)
        if start + length + width > strips.file.size:
            if present * strips.block_size >= number * size + length:
                yield number  # the blocks are there and their checksum is not
            return
        if sums.reseed:
            crc = 0
            state.reset()
        at = 0
        try:
            while at < length:
                piece = read(strips.file, start + at, min(_WINDOW, length - at))
                if sums.name == "crc32":
                    crc = isal_zlib.crc32(piece, crc)
                else:
                    state.update(piece)
                at += len(piece)
                job.advance(len(piece))
            stored = int.from_bytes(read(strips.file, start + length, width), "little")
        except ReadError:
            yield number
            if not sums.reseed:
                return  # what follows cannot be proven without it
            continue
        found = ~crc & _MASK if sums.name == "crc32" else state.intdigest()
        if found != stored:
            yield number


def _bad_first_bytes(strips: Strips, present: int, job: Job) -> Iterator[int]:
    """The same for version 1, thousands of blocks at a time."""
    size = strips.block_size
    step = size + strips.sum_size
    of_byte, shift = _tables(size)
    before = np.uint32(_MASK)
    batch = max(_WINDOW // step, 1)
    for first in range(0, present, batch):
        count = min(batch, present - first)
        try:
            raw = read(
                strips.file, strips.at + first * step, min(count * step, strips.file.size - strips.at - first * step)
            )
        except ReadError:
            yield from range(first, first + count)
            continue
        rows = np.zeros(count * step, np.uint8)
        rows[: len(raw)] = np.frombuffer(raw, np.uint8)
        table = rows.reshape(count, step)
        stored = np.ascontiguousarray(table[:, size : size + 4]).view("<u4")[:, 0]
        carried = np.concatenate(([before], stored[:-1])).astype(np.uint32)
        wanted = of_byte[table[:, 0]]
        for lane in range(4):
            wanted = wanted ^ shift[lane][carried >> np.uint32(8 * lane) & np.uint32(0xFF)]
        before = stored[-1]
        job.advance(count * size)
        yield from (first + np.flatnonzero(wanted != stored)).tolist()


def _tables(size: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """For blocks of ``size`` bytes: the sum of each byte repeated from 0 on, and L of each byte in each lane."""

    def plain(data: bytes, start: int) -> int:
        return isal_zlib.crc32(data, start ^ _MASK) ^ _MASK  # without the inversions at both ends

    zeros = bytes(size)
    basis = [plain(zeros, 1 << bit) for bit in range(32)]  # linear: what the single bits become says it all
    octets = [plain(bytes([1 << bit]) * size, 0) for bit in range(8)]
    return _spanned(octets), np.stack([_spanned(basis[lane * 8 : lane * 8 + 8]) for lane in range(4)])


def _spanned(basis: list[int]) -> NDArray[np.uint32]:
    """What every byte becomes, where its bits become ``basis``."""
    table = np.zeros(256, np.uint32)
    for bit, value in enumerate(basis):
        table[np.arange(256) >> bit & 1 == 1] ^= np.uint32(value)
    return table
