"""What this machine can do: the libraries that ferrotype uses, over the same bytes, with nothing around them.

    limits.py WORK IN [OUT] [--disks DIR --day DAY] [--threads N] [--part SHARE]

WORK is a list of these, done chunk by chunk, joined with "+":

    read      IN, a disk: its cells of 128 KiB that hold data in use, up to 8 neighbours in one call
    frames    IN, a file that "write" made of "zstd": the frames it holds, up to 8 in one call
    stored    IN, any file, 1 MiB in one call
    copy      memcpy                     blake3    keyed hash
    zstd      compress, level --level    aes       AES-256-GCM
    unzstd    decompress                 xxh3      XXH3-128
    write     to OUT, a new file: where the bytes came from, or one frame after the other

Prints {"wall": s, "cpu": s, "plain": bytes before packing}.  Loading libraries and finding cells is not in it.
Threads take pieces from one list, and all that they call releases the interpreter lock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from xxhash import xxh3_128

from disks import Manifest, in_use, load_free

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CHUNK: Final = 128 << 10
BATCH: Final = 8  # chunks in one call
KEY: Final = bytes(32)


@dataclass(frozen=True, slots=True)
class Piece:
    """Chunks, or frames of chunks, that are read in one call."""

    at: int  # byte offset
    ends: tuple[int, ...]  # of each of them, from there
    plain: tuple[int, ...]  # the place of each on the disk


# ---------------------------------------------------------------------- what there is to read


def cells(disk: Path, folder: Path, day: str) -> list[Piece]:
    """The chunks of a disk that hold data, and data that a file system uses."""
    size = disk.stat().st_size
    count = -(-size // CHUNK)
    wanted = _touched(in_use(load_free(folder, day), size), count) & _touched(_data(disk, size), count)
    numbers = np.flatnonzero(wanted)
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    pieces = []
    for run in runs:
        for first in range(0, len(run), BATCH):
            some = (run[first : first + BATCH] * CHUNK).tolist()
            ends = tuple(min(at + CHUNK, size) - some[0] for at in some)
            pieces.append(Piece(some[0], ends, tuple(some)))
    return pieces


def _touched(ranges: Iterator[tuple[int, int]], count: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    touched = np.zeros(count, bool)
    for start, length in ranges:
        touched[start // CHUNK : -(-(start + length) // CHUNK)] = True
    return touched


def _data(disk: Path, size: int) -> Iterator[tuple[int, int]]:
    """Where the file is not a hole."""
    at = 0
    with disk.open("rb") as file:
        while at < size:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole is left
                return
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, at - start


def frames(file: Path) -> list[Piece]:
    table = np.load(_table(file))
    groups = [table[n : n + BATCH] for n in range(0, len(table), BATCH)]
    return [
        Piece(int(g[0, 0]), tuple((g[:, 0] + g[:, 1] - g[0, 0]).tolist()), tuple(g[:, 2].tolist())) for g in groups
    ]


def stored(file: Path) -> list[Piece]:
    size, step = file.stat().st_size, CHUNK * BATCH
    return [Piece(at, (min(step, size - at),), (at,)) for at in range(0, size, step)]


def _table(file: Path) -> Path:
    """Beside a file of frames: their places, lengths, and places on the disk."""
    return file.with_suffix(".npy")


READERS: Final = {"read", "frames", "stored"}


# ---------------------------------------------------------------------- what is done with a chunk


class Worker:
    """One thread's buffers and contexts."""

    def __init__(self, work: list[str], level: int) -> None:
        self.buffer = memoryview(bytearray(2 * CHUNK * BATCH))
        self._target = np.empty(CHUNK * BATCH, np.uint8)
        self._compressor = zstd.ZstdCompressor(level=level)
        self._cipher = AESGCM(KEY)
        table: dict[str, Callable[[memoryview | bytes], memoryview | bytes]] = {
            "copy": self._copy,
            "blake3": self._blake3,
            "xxh3": self._xxh3,
            "zstd": lambda chunk: self._compressor.compress(chunk, zstd.ZstdCompressor.FLUSH_FRAME),
            "unzstd": lambda chunk: zstd.ZstdDecompressor().decompress(chunk),
            "aes": lambda chunk: self._cipher.encrypt(bytes(12), chunk, None),
        }
        self._steps = [table[step] for step in work]

    def do(self, chunk: memoryview | bytes) -> memoryview | bytes:
        for step in self._steps:
            chunk = step(chunk)
        return chunk

    def _copy(self, chunk: memoryview | bytes) -> memoryview | bytes:
        np.copyto(self._target[: len(chunk)], np.frombuffer(chunk, np.uint8))
        return chunk

    def _blake3(self, chunk: memoryview | bytes) -> memoryview | bytes:
        blake3(chunk, key=KEY).digest()
        return chunk

    def _xxh3(self, chunk: memoryview | bytes) -> memoryview | bytes:
        xxh3_128(chunk).digest()
        return chunk


@dataclass(slots=True)
class Output:
    """A new file: plain chunks go to their places on the disk, neighbours in one call; frames follow each other."""

    file: int
    packed: bool
    end: int
    lock: threading.Lock
    rows: list[tuple[int, int, int]]

    def write(self, piece: Piece, chunks: list[memoryview | bytes]) -> None:
        if self.packed:
            lengths = [len(chunk) for chunk in chunks]
            with self.lock:
                at, self.end = self.end, self.end + sum(lengths)
                starts = itertools.accumulate([at, *lengths[:-1]])
                self.rows += zip(starts, lengths, piece.plain, strict=True)
            os.pwritev(self.file, chunks, at)
            return
        first = 0
        for number in range(1, len(chunks) + 1):
            if number == len(chunks) or piece.plain[number] != piece.plain[number - 1] + CHUNK:
                os.pwritev(self.file, chunks[first:number], piece.plain[first])
                first = number


def run(work: list[str], pieces: list[Piece], source: Path, target: Path | None, threads: int, level: int) -> None:
    """Do the work on all pieces, in so many threads."""
    todo = iter(pieces)
    writes = work[-1] == "write"
    steps = [step for step in work if step not in {*READERS, "write"}]
    file = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC) if target and writes else -1
    output = Output(file, "zstd" in steps, 0, threading.Lock(), [])
    given = os.open(source, os.O_RDONLY)
    failures: list[BaseException] = []

    def loop() -> None:
        try:
            worker = Worker(steps, level)
            for piece in todo:  # a list's iterator hands each item to one thread only
                view = worker.buffer[: piece.ends[-1]]
                if os.preadv(given, [view], piece.at) != len(view):
                    raise EOFError(f"{source} is too short")
                starts = (0, *piece.ends[:-1])
                done = [worker.do(view[low:high]) for low, high in zip(starts, piece.ends, strict=True)]
                if writes:
                    output.write(piece, done)
        except BaseException as error:  # noqa: BLE001  told by the main thread
            failures.append(error)

    others = [threading.Thread(target=loop) for _ in range(threads)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    os.close(given)
    if failures:
        raise failures[0]
    if file >= 0:
        os.close(file)
    if output.rows and target:
        np.save(_table(target), np.array(output.rows, np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?")
    parser.add_argument("--disks", type=Path)
    parser.add_argument("--day", default="day1")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--level", type=int, default=1)
    parser.add_argument("--part", type=float, default=1, help="do only this share of the pieces, spread evenly")
    options = parser.parse_args()
    work = options.work.split("+")
    if work[0] == "read":
        Manifest.load(options.disks)  # says whether these are disks
        pieces = cells(options.source, options.disks, options.day)
    else:
        pieces = frames(options.source) if work[0] == "frames" else stored(options.source)
    pieces = pieces[:: round(1 / options.part)]
    plain = sum(len(piece.plain) * CHUNK if work[0] == "frames" else piece.ends[-1] for piece in pieces)
    wall, cpu = time.perf_counter(), time.process_time()
    run(work, pieces, options.source, options.target, options.threads, options.level)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps({"wall": wall, "cpu": cpu, "plain": plain}))


if __name__ == "__main__":
    main()
