"""The checksums of a UDIF image, all CRC-32.

data fork     its bytes as they are stored; of each segment its own
block table   the disk's bytes in its runs, but for the ignored ones
master        the tables' checksums, as they are stated, one behind the other
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from ferrotype.block import Source, read
from ferrotype.errors import DeviceError, InvalidImage
from ferrotype.formats.dmg.blocks import SECTOR, Table
from ferrotype.formats.dmg.runs import DmgLayout
from ferrotype.job import Job
from ferrotype.pipeline import map_ordered
from ferrotype.units import MiB

__all__ = ["checker", "crc_of_zeros"]

_POLYNOMIAL: Final = 0xEDB88320  # of CRC-32, low bits first


def crc_of_zeros(crc: int, count: int) -> int:
    """The CRC-32 of what has ``crc`` with ``count`` zeros behind it, in the time that the number's bits take."""
    # what one zero bit does to each bit of the register, squared for two of them, four, ...
    step = [_POLYNOMIAL, *(1 << bit for bit in range(31))]
    register, bits = crc ^ 0xFFFFFFFF, 8 * count
    while bits:
        if bits & 1:
            register = _times(step, register)
        step = [_times(step, column) for column in step]
        bits >>= 1
    return register ^ 0xFFFFFFFF


def _times(matrix: list[int], vector: int) -> int:
    total = 0
    for bit, column in enumerate(matrix):
        if vector >> bit & 1:
            total ^= column
    return total


def checker(
    layout: DmgLayout, tables: list[Table], stated: tuple[int | None, int | None], data: Source, length: int
) -> Callable[[Job], list[str]] | None:
    """What proves the checksums that an image states: ``stated`` are the data fork's and the master one.

    ``length`` is that of the first segment's data fork, the only one that its checksum is of.
    """
    crcs = [table.checksum.crc32() for table in tables]
    fork, master = stated
    if fork is None and master is None and not any(crcs):
        return None

    def check(job: Job) -> list[str]:
        damages: list[str] = []
        job.begin("checking the disk", int(layout.ends[-1]) if len(layout.ends) else 0)
        for table, crc in zip(tables, crcs, strict=True):
            found = _table_crc(layout, table, data, job, damages)
            if crc and found is not None and found != crc:
                damages.append(f"the checksum of the partition {table.name!r} is {found:08x}, not {crc:08x}")
        if master is not None and None not in crcs:
            found = zlib.crc32(b"".join(crc.to_bytes(4, "big") for crc in crcs if crc is not None))
            if found != master:
                damages.append(f"the master checksum is {found:08x}, not {master:08x}")
        if fork is not None:
            job.begin("checking the file", length)
            found = _crc_of(data, length, job)
            if found != fork:
                damages.append(f"the checksum of the data fork is {found:08x}, not {fork:08x}")
        return damages

    return check


def _crc_of(data: Source, length: int, job: Job) -> int:
    crc = 0
    for at in range(0, length, MiB):
        piece = read(data, at, min(MiB, length - at))
        crc = zlib.crc32(piece, crc)
        job.advance(len(piece))
    return crc


def _table_crc(layout: DmgLayout, table: Table, data: Source, job: Job, damages: list[str]) -> int | None:
    """The CRC-32 of a table's runs; None, and a damage more, where one cannot be read."""
    first, last = np.searchsorted(layout.starts, np.array([table.first, table.first + table.count]) * SECTOR).tolist()
    crc, sound = 0, True

    def pieces() -> Iterator[tuple[int, int, int]]:
        """(run, offset in it, length): parts of stored runs, others whole."""
        for run in np.flatnonzero(layout.counted[first:last]).tolist():
            number = first + run
            length = int(layout.ends[number] - layout.starts[number])
            step = MiB if layout.stored[number] else length
            for at in range(0, length, step):
                yield number, at, min(step, length - at)

    def content(piece: tuple[int, int, int]) -> tuple[bytes | None, int, str]:
        number, at, length = piece
        try:
            if layout.packed[number]:
                return layout.unpack(number), length, ""
            if layout.stored[number]:
                return read(data, int(layout.offsets[number]) + at, length), length, ""
            return None, length, ""
        except (InvalidImage, DeviceError) as error:
            return None, length, f"sectors from {int(layout.starts[number]) // SECTOR} on: {error}"

    workers = len(os.sched_getaffinity(0))
    for plain, length, damage in map_ordered(content, pieces(), workers=workers, depth=workers + 1):
        if damage:
            damages.append(damage)
            sound = False
        crc = crc_of_zeros(crc, length) if plain is None else zlib.crc32(plain, crc)
        job.advance(length)
    return crc if sound else None
