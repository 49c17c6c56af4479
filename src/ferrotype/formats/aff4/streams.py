"""The streams that an AFF4 image is made of.

    Map            | 0 .. 1 MiB | 1 .. 5 MiB | 5 .. 6 MiB |   entries: offset, length, offset in the target, target
                        |            |             |
    targets        ImageStream    aff4:Zero    another ImageStream, perhaps in another volume

    ImageStream    chunks of one size, packed or not, in segments ("bevies"):  00000000, 00000001 ...
                   each with an index: offset in the segment, length           00000000.index

Written from "AFF4 Standard v1.0a" (2022), sections 3 and 4, and the images that were published with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, Traits, read
from ferrotype.block.file import check_read
from ferrotype.errors import InvalidImage, ReadError, UnsupportedError
from ferrotype.extents import ExtentMap, State
from ferrotype.formats.aff4.codecs import CODECS, STORED
from ferrotype.formats.mapped import Kept, Kind, MappedSource, Mapping, cells
from ferrotype.formats.zipfile import Member, ZipFile
from ferrotype.units import MiB

__all__ = ["Chunks", "MapSource", "Pattern", "Point", "Stream", "StreamSource", "points"]

MOST_CHUNK: Final = 16 * MiB
MOST_SEGMENT: Final = 1 << 20  # chunks
_INDEX: Final = np.dtype([("offset", "<u8"), ("length", "<u4")])
_POINT: Final = np.dtype([("offset", "<u8"), ("length", "<u8"), ("place", "<u8"), ("target", "<u4")])
_INDEXES_KEPT: Final = 16 * MiB
_LONG: Final = 1 << 62  # bytes: a stream without an end


@dataclass(frozen=True, slots=True)
class Stream:
    """What the description says of an ImageStream."""

    urn: str
    size: int
    chunk_size: int
    chunks_in_segment: int
    compression: str  # its IRI

    def check(self) -> None:
        """Raise where no stream can be so."""
        if not 512 <= self.chunk_size <= MOST_CHUNK:
            raise InvalidImage(f"chunks of {self.chunk_size} bytes cannot be", field="chunkSize")
        if not 1 <= self.chunks_in_segment <= MOST_SEGMENT:
            raise InvalidImage(f"segments of {self.chunks_in_segment} chunks cannot be", field="chunksInSegment")
        if self.compression not in CODECS:
            raise UnsupportedError(f"the compression {self.compression!r} is not known", field="compressionMethod")

    @property
    def segment_size(self) -> int:
        return self.chunk_size * self.chunks_in_segment


class Chunks:
    """The layout of an ImageStream, whose places are offsets in the volume's file."""

    def __init__(self, stream: Stream, volume: ZipFile, find: Callable[[str], Member | None]) -> None:
        """``find`` gives the volume's member of a URN."""
        stream.check()
        self.stream, self._volume, self._find = stream, volume, find
        self._unpack = CODECS[stream.compression][1]
        self._segments: Kept[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = Kept(
            _INDEXES_KEPT, lambda pair: pair[0].nbytes + pair[1].nbytes
        )

    def member(self, name: str) -> Member:
        """The member of the stream that is called so.  Raises InvalidImage where it is not there."""
        member = self._find(f"{self.stream.urn}/{name}")
        if member is None:
            raise InvalidImage(f"the image lacks {name!r} of the stream {self.stream.urn}")
        return member

    def content(self, name: str, most: int) -> bytes:
        return self._volume.content(self.member(name), most)

    def _segment(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Offsets in the file, and lengths, of a segment's chunks, all of them inside the segment."""
        name = f"{number:08}"
        data = self.member(name)
        if data.method:
            raise UnsupportedError(f"the segment {name} is deflated by zip, so that no chunk can be found in it")
        index = np.frombuffer(self._index(name), _INDEX)
        offsets, lengths = index["offset"].astype(np.uint64), index["length"].astype(np.uint64)
        room = np.uint64(data.size)
        if bool(((offsets > room) | (lengths > room) | (offsets + lengths > room)).any()):
            raise InvalidImage(f"a chunk lies outside the segment {name}", field="index")
        if bool((lengths > np.uint64(2 * self.stream.chunk_size + 64)).any()):
            raise InvalidImage(f"a chunk of the segment {name} is longer than any can be", field="index")
        return offsets.astype(np.int64) + data.offset, lengths.astype(np.int64)

    def _index(self, name: str) -> bytes:
        size = self.stream.chunks_in_segment * _INDEX.itemsize
        content = self.content(f"{name}.index", size)
        if len(content) % _INDEX.itemsize:
            raise InvalidImage(f"the index of the segment {name} has a part of an entry", field="index")
        return content

    def mapping(self, offset: int, length: int, /) -> Mapping:
        stream = self.stream
        number, inside = divmod(offset, stream.segment_size)
        end = min(offset + length, (number + 1) * stream.segment_size)
        first = inside // stream.chunk_size
        last = -(-(end - number * stream.segment_size) // stream.chunk_size)
        offsets, lengths = self._segments.of(number, self._segment)
        if len(offsets) < last:
            raise InvalidImage(f"the index of the segment {number:08} has {len(offsets)} chunks, not {last}")
        places, sizes = offsets[first:last], lengths[first:last]
        chunk = number * stream.chunks_in_segment + np.arange(first, last)
        room = np.minimum(stream.chunk_size, stream.size - chunk * stream.chunk_size)
        whole = sizes == stream.chunk_size
        if self._unpack is None:
            whole |= sizes >= room
            if not whole.all():
                raise InvalidImage(f"a stored chunk of the segment {number:08} is too short", field="index")
        kinds = np.where(whole, Kind.STORED, Kind.PACKED).astype(np.uint8)
        start = (number * stream.chunks_in_segment + first) * stream.chunk_size
        return cells(start, stream.chunk_size, kinds, np.where(whole, places, chunk)).clip(offset, end - offset)

    def unpack(self, place: int, /) -> bytes:
        """The chunk of a number, without what its last one may have behind the stream."""
        stream = self.stream
        number, inside = divmod(place, stream.chunks_in_segment)
        offsets, lengths = self._segments.of(number, self._segment)
        packed = read(self._volume.file, int(offsets[inside]), int(lengths[inside]))
        room = min(stream.chunk_size, stream.size - place * stream.chunk_size)
        if self._unpack is None:
            return packed[:room]
        plain = self._unpack(packed, self._unpacked_size(room, packed))
        if len(plain) < room:
            raise InvalidImage(f"chunk {place} holds {len(plain)} bytes, not {room}")
        return plain[:room]

    def _unpacked_size(self, room: int, packed: bytes) -> int:
        """What may be asked of the decoder: deflate gives the first bytes, others need room for all."""
        kind = CODECS[self.stream.compression][0]
        return room if kind in ("zlib", "deflate", STORED) or not packed else self.stream.chunk_size


class StreamSource(MappedSource):
    """An ImageStream.  All of it is data, which needs no look at its indexes."""

    def __init__(self, chunks: Chunks, file: Source) -> None:
        super().__init__(file, chunks, chunks.stream.size, name="aff4", traits=Traits(preferred_size=MiB))
        self.chunks = chunks

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        check_read("stream", self.size, offset, length)
        return ExtentMap.uniform(offset, length)


class Pattern:
    """A text over and over: what the standard shows of what was not read.  It begins anew at every MiB."""

    def __init__(self, text: bytes) -> None:
        self._tile = memoryview((text * (MiB // len(text) + 1))[:MiB])
        self.traits = Traits()
        self.zero = text == b"\0"

    @property
    def size(self) -> int:
        return _LONG

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        check_read("pattern", _LONG, offset, len(buf))
        at = 0
        while at < len(buf):
            skip = (offset + at) % MiB
            count = min(MiB - skip, len(buf) - at)
            buf[at : at + count] = self._tile[skip : skip + count]
            at += count

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return ExtentMap.uniform(offset, length, State.ZERO | State.HOLE if self.zero else State.DATA)

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """The entries of a map, as columns, ascending and without gaps."""

    bounds: NDArray[np.int64]
    places: NDArray[np.int64]  # in the target
    targets: NDArray[np.int64]


def points(content: bytes, size: int | None, sources: list[Source], gap: int) -> Point:
    """The entries of a map of ``size`` bytes, or as long as they reach; ``gap`` is the target of what has none.

    Raises InvalidImage where they overlap, or lie outside the map or their targets.
    """
    if len(content) % _POINT.itemsize:
        raise InvalidImage("the map has a part of an entry", field="map")
    table = np.frombuffer(content, _POINT)
    table = table[table["length"] > 0]
    table = table[np.argsort(table["offset"], kind="stable")]
    starts, lengths, places = (table[name].astype(np.uint64) for name in ("offset", "length", "place"))
    most = np.uint64(_LONG if size is None else size)
    if bool(((starts > most) | (lengths > most) | (starts + lengths > most)).any()):
        raise InvalidImage("an entry of the map lies outside the image", field="map")
    targets = table["target"].astype(np.int64)
    if bool((targets >= gap).any()):
        raise InvalidImage("an entry of the map names a target that is not listed", field="map")
    room = np.array([source.size for source in sources], np.uint64)[targets] if len(targets) else lengths
    if bool(((places > room) | (lengths > room) | (places + lengths > room)).any()):
        raise InvalidImage("an entry of the map reaches behind the end of its target", field="map")
    first, last = starts.astype(np.int64), (starts + lengths).astype(np.int64)
    if bool((first[1:] < last[:-1]).any()):
        raise InvalidImage("two entries of the map overlap", field="map")
    end = size if size is not None else int(last[-1]) if len(last) else 0
    count = len(first)
    bounds = np.empty(2 * count + 2, np.int64)
    bounds[0], bounds[-1] = 0, end
    bounds[1:-1:2], bounds[2:-1:2] = first, last
    every = bounds[:-1].copy()  # a gap's place is its own offset
    every[1::2] = places.astype(np.int64)
    whose = np.full(2 * count + 1, gap, np.int64)
    whose[1::2] = targets
    wanted = np.flatnonzero(bounds[1:] > bounds[:-1])
    return Point(np.append(bounds[wanted], end), every[wanted], whose[wanted])


class MapSource:
    """The bytes of its targets, as a map arranges them.  It owns none of them."""

    def __init__(self, table: Point, sources: list[Source]) -> None:
        self._table, self._sources = table, sources
        zero = [isinstance(source, Pattern) and source.zero for source in sources]
        self._states = np.where(zero, State.ZERO | State.HOLE, State.DATA).astype(np.uint8)  # by target
        self.traits = Traits(preferred_size=MiB)

    @property
    def size(self) -> int:
        return int(self._table.bounds[-1])

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[Source, int, int, int]]:
        """The targets under a range: source, offset in it, start and end of the piece here."""
        bounds, end = self._table.bounds, offset + length
        first = int(np.searchsorted(bounds, offset, "right")) - 1
        last = int(np.searchsorted(bounds, end, "left"))
        starts = bounds[first : last + 1].tolist()
        places, targets = self._table.places[first:last].tolist(), self._table.targets[first:last].tolist()
        for start, stop, place, target in zip(starts, starts[1:], places, targets, strict=False):
            low = max(start, offset)
            yield self._sources[target], place + low - start, low, min(stop, end)

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        check_read("map", self.size, offset, len(buf))
        for source, place, start, stop in self._pieces(offset, len(buf)) if len(buf) else ():
            try:
                source.read_into(place, buf[start - offset : stop - offset])
            except ReadError as error:
                error.start += start - place
                raise

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        check_read("map", self.size, offset, length)
        if not length:
            return ExtentMap.uniform(offset, 0)
        bounds = self._table.bounds
        first = int(np.searchsorted(bounds, offset, "right")) - 1
        last = int(np.searchsorted(bounds, offset + length, "left"))
        cut = bounds[first : last + 1].copy()
        cut[0], cut[-1] = offset, offset + length
        return ExtentMap.joined(cut, self._states[self._table.targets[first:last]])

    def close(self) -> None:
        pass
