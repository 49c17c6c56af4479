"""ntfsclone's special images: the clusters that an NTFS volume uses, in the order of the disk.

    | header, 50 or 56 bytes | atom | atom | ...
    an atom: 00 + s64   a gap of so many clusters that are not in the image
             01 + data  the next cluster; the last one may be shorter: the device ends in it

Layout: ntfsclone.c of ntfs-3g (struct image_hdr, clone_ntfs, restore_image).  Version 10.0 was the first that is
little-endian everywhere; 10.1 adds the sectors behind the last cluster, with the copy of the boot sector.  Older
images carry the version of the volume instead, have no data offset, and are read as little-endian.  There is no
index: one is made by walking over the atoms, forward, as far as the disk is asked for.
"""

from __future__ import annotations

from threading import Lock
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, Traits, read, read_exactly
from ferrotype.errors import FormatError, InvalidImage, UnsupportedError
from ferrotype.extents import ExtentMap
from ferrotype.formats import MAX_SIZE, Image
from ferrotype.formats.mapped import Kind, MappedSource, Mapping
from ferrotype.formats.related import Related
from ferrotype.records import Record, b16, record, s64, u8, u32
from ferrotype.units import MiB

__all__ = ["open", "probe"]

MAGIC: Final = b"\0ntfsclone-image"
MAX_CLUSTER: Final = 2 * MiB  # bytes; the largest of NTFS
VERSION: Final = 10  # the first with a header of its own; a later major one would be another format
_MAX_OFFSET: Final = 4096  # bytes of header that are believed
_GAP, _NEXT = 0, 1
_GAP_SIZE: Final = 9
_WINDOW: Final = 4 * MiB  # bytes of the file that are walked over together


@record(endian="<", size=46)
class Header(Record):
    """The header but for its last field.  ntfsclone.c, struct image_hdr."""

    magic: b16
    major: u8
    minor: u8
    cluster_size: u32
    device_size: s64
    clusters: s64
    in_use: s64


def probe(file: Source) -> bool:
    """Whether the file begins as an ntfsclone image."""
    return read(file, 0, len(MAGIC)) == MAGIC


def open(file: Source, related: Related) -> Image:  # noqa: ARG001
    """The partition that was imaged; its clusters are looked for when they are asked for."""
    header = Header.unpack(read_exactly(file, 0, Header.SIZE, "the header of the ntfsclone image"))
    start = _check(file, header)
    atoms = Atoms(file, start, header)
    source = MappedSource(atoms, atoms, header.device_size, name="ntfsclone image", placed=False)
    facts: dict[str, object] = {
        "subformat": f"{header.major}.{header.minor}" if header.major >= VERSION else "before 10.0",
        "unit": header.cluster_size,
        "file_system": "NTFS",
        "blocks": header.clusters,
        "used_blocks": header.in_use,
        # not in the image: they read as zeros, and were whatever was on the disk
        "unknown_bytes": max(header.clusters - header.in_use, 0) * header.cluster_size,
    }
    return Image("ntfsclone", source, facts=facts, close=file.close)


def stored_size(head: Source) -> tuple[int, bool]:
    """Bytes that an image beginning with ``head`` has at most, and False: it is not exact."""
    header = Header.unpack(read_exactly(head, 0, Header.SIZE, "the header of the ntfsclone image"))
    _check(head, header)
    clusters = header.in_use + 1
    return _MAX_OFFSET + clusters * (header.cluster_size + 1 + _GAP_SIZE) + _GAP_SIZE, False


def _check(file: Source, header: Header) -> int:
    """Where the atoms begin.  Raises InvalidImage where the header cannot be right."""
    if header.magic != MAGIC:
        raise InvalidImage("this is no ntfsclone image", offset=0, field="magic")
    size = header.cluster_size
    if not 256 <= size <= MAX_CLUSTER or size & (size - 1):
        raise InvalidImage(f"a cluster of {size} bytes", offset=18, field="cluster_size")
    if not 0 < header.device_size <= MAX_SIZE:
        raise InvalidImage(f"a device of {header.device_size} bytes", offset=22, field="device_size")
    if not 0 < header.clusters <= header.device_size // size:
        raise InvalidImage(f"{header.clusters} clusters of {size} bytes", offset=30, field="nr_clusters")
    if not 0 <= header.in_use <= header.clusters + 1:
        raise InvalidImage(f"{header.in_use} of {header.clusters} clusters in use", offset=38, field="inuse")
    if header.major < VERSION:
        return Header.SIZE
    if header.major > VERSION:
        raise UnsupportedError(f"version {header.major}.{header.minor} is not read", offset=16, field="major_ver")
    offset = int.from_bytes(read_exactly(file, Header.SIZE, 4, "the header of the ntfsclone image"), "little")
    if not Header.SIZE + 4 <= offset <= min(_MAX_OFFSET, file.size):
        raise InvalidImage(f"the data begins at {offset}", offset=Header.SIZE, field="offset_to_image_data")
    return offset


class Runs:
    """Clusters in use that follow each other on the disk, and so in the file.  Grows as the walk goes on."""

    def __init__(self) -> None:
        self._table = np.zeros((3, 1024), np.int64)
        self._count = 0
        self.clusters = 0  # in all runs

    def add(self, found: list[tuple[int, int, int]]) -> None:
        """Runs, each as its first cluster, how many they are, and where the first atom begins."""
        room = self._table.shape[1]
        if self._count + len(found) > room:
            self._table = np.concatenate((self._table, np.zeros((3, max(room, len(found))), np.int64)), axis=1)
        for first, count, place in found:
            self._table[:, self._count] = first, self.clusters, place
            self._count, self.clusters = self._count + 1, self.clusters + count

    def columns(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """First cluster of each run, clusters in the runs before it (and in all at the end), place of its first atom.

        They stay as they are while the walk goes on.
        """
        first, before, place = self._table[:, : self._count]
        return first, np.append(before, self.clusters), place


class Atoms:
    """The layout, and the clusters in use as a Source: what its STORED places are offsets in."""

    def __init__(self, file: Source, start: int, header: Header) -> None:
        self._file, self._cluster_size, self._step = file, header.cluster_size, header.cluster_size + 1
        self._clusters, self._device = header.clusters, header.device_size
        self._tail = min(header.cluster_size, header.device_size - header.clusters * header.cluster_size)
        self._lock = Lock()
        self._at, self._cluster = start, 0  # how far the walk has come in the file and on the disk
        self._after_gap = self._ended = False
        self._broken: FormatError | None = None  # what the walk met; what it found before is right nevertheless
        self._runs = Runs()
        self.size = MAX_SIZE  # the runs say what is there
        self.traits = Traits(parallel=file.traits.parallel)

    # ------------------------------------------------------------------ the walk

    def _walk(self) -> None:
        """Go on over a window of the file, up to what is no atom or to where the file ends too early."""
        window = np.frombuffer(read(self._file, self._at, min(_WINDOW, self._file.size - self._at)), np.uint8)
        found: list[tuple[int, int, int]] = []
        start = self._at
        try:
            while self._at - start < len(window) and not self._ended:
                if not self._atom(window, self._at - start, found):
                    break
            if self._at >= self._file.size and not self._ended:
                self._end()
        except FormatError as error:
            self._broken = error
        self._runs.add(found)

    def _end(self) -> None:
        if self._cluster < self._clusters:
            raise InvalidImage(f"the file ends before cluster {self._cluster} of {self._clusters}", offset=self._at)
        self._ended = True

    def _atom(self, window: NDArray[np.uint8], inside: int, found: list[tuple[int, int, int]]) -> bool:
        """One gap, or all clusters up to the next one; False where the window ends too early for it."""
        command = int(window[inside])
        if command == _NEXT:
            count = self._following(window[inside :: self._step])
            last = self._cluster + count == self._clusters + 1
            length = count * self._step - (self._cluster_size - self._tail if last else 0)
            if self._at + length > self._file.size:
                whole = (self._file.size - self._at) // self._step
                if whole:
                    found.append((self._cluster, whole, self._at))
                    self._cluster, self._at = self._cluster + whole, self._at + whole * self._step
                raise InvalidImage(f"the file ends within cluster {self._cluster}", offset=self._at)
            found.append((self._cluster, count, self._at))
            self._after_gap = False
        elif command == _GAP:
            if self._at + _GAP_SIZE > self._file.size:
                raise InvalidImage("the file ends within a gap", offset=self._at)
            if inside + _GAP_SIZE > len(window):
                return False
            count = int.from_bytes(window[inside + 1 : inside + _GAP_SIZE].tobytes(), "little", signed=True)
            if count < 0:
                raise UnsupportedError("the image holds metadata only, which is no volume", offset=self._at)
            if not count or self._after_gap or self._cluster + count > self._clusters:
                raise InvalidImage(f"a gap of {count} clusters at cluster {self._cluster}", offset=self._at)
            length, self._after_gap = _GAP_SIZE, True
        else:
            raise InvalidImage(f"command {command} is unknown", offset=self._at)
        self._at, self._cluster = self._at + length, self._cluster + count
        self._ended = self._cluster > self._clusters
        return True

    def _following(self, commands: NDArray[np.uint8]) -> int:
        """How many clusters follow each other from here on, as far as the window goes."""
        commands = commands[: self._clusters + 1 - self._cluster]
        look = 16  # runs are short or long: most of a window is looked at once
        while True:
            other = np.flatnonzero(commands[:look] != _NEXT)
            if len(other) or look >= len(commands):
                return int(other[0]) if len(other) else len(commands)
            look *= 4

    # ------------------------------------------------------------------ the layout

    def mapping(self, offset: int, length: int, /) -> Mapping:
        size = self._cluster_size
        end = -(-(offset + length) // size)
        with self._lock:
            while self._cluster < end and not self._ended:
                if self._broken is not None:
                    raise self._broken
                self._walk()
            firsts, before, _ = self._runs.columns()
        low = max(int(np.searchsorted(firsts, offset // size, "right")) - 1, 0)
        high = int(np.searchsorted(firsts, end, "left"))
        firsts, before = firsts[low:high], before[low : high + 1]
        bounds = np.empty(2 * len(firsts) + 2, np.int64)
        bounds[0], bounds[-1] = 0, -(-self._device // size)
        bounds[1:-1:2], bounds[2:-1:2] = firsts, firsts + np.diff(before)
        places = np.zeros(len(bounds) - 1, np.int64)
        places[1::2] = before[:-1] * size
        kinds = np.full(len(places), Kind.ZERO, np.uint8)
        kinds[1::2] = Kind.STORED
        keep = bounds[1:] > bounds[:-1]
        bounds = np.append(bounds[:-1][keep], bounds[-1]) * size
        return Mapping(bounds, kinds[keep], places[keep], np.zeros(len(kinds[keep]), np.int64)).clip(offset, length)

    def unpack(self, place: int, /) -> bytes:
        raise InvalidImage(f"nothing in an ntfsclone image is compressed ({place})")

    # ------------------------------------------------------------------ the clusters, without what stands between

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        with self._lock:
            _, before, places = self._runs.columns()
        at, end = offset, offset + len(buf)
        run = int(np.searchsorted(before, offset // self._cluster_size, "right")) - 1
        while at < end:
            cluster, inside = divmod(at - int(before[run]) * self._cluster_size, self._cluster_size)
            stop = min(end, int(before[run + 1]) * self._cluster_size)
            start = int(places[run]) + cluster * self._step + 1
            self._read_run(start, inside, buf[at - offset : stop - offset])
            at, run = stop, run + 1

    def _read_run(self, start: int, inside: int, buf: memoryview) -> None:
        """Fill ``buf`` from byte ``inside`` of the cluster that stands at ``start``, and from those behind it."""
        size, step = self._cluster_size, self._step
        done = 0
        while done < len(buf):
            count = min((len(buf) - done) // size, _WINDOW // step + 1) if not inside else 0
            if count < 2:
                part = min(size - inside, len(buf) - done)
                self._file.read_into(start + inside, buf[done : done + part])
                done, inside, start = done + part, 0, start + step
                continue
            raw = np.empty(count * step - 1, np.uint8)
            self._file.read_into(start, raw.data)
            rows = np.lib.stride_tricks.as_strided(raw, (count, size), (step, 1))
            np.frombuffer(buf[done : done + count * size], np.uint8).reshape(count, size)[:] = rows
            done, start = done + count * size, start + count * step

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return ExtentMap.uniform(offset, length)

    def close(self) -> None:
        """Nothing: the image owns the file."""
