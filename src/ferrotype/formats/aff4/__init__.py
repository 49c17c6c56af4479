"""The Advanced Forensic Format, version 4: disk images in zip files, as AFF4 Standard v1.0 describes them.

    case.aff4 (zip)
    +---------------------+-------------+----------------------+------------------+--------------------+
    | container.          | version.txt | ImageStream's        | Map's            | information.turtle |
    | description         |             | 00000000, .index ... | map, idx, ...    |                    |
    +---------------------+-------------+----------------------+------------------+--------------------+

    Image  -- dataStream ->  Map  -- targets ->  ImageStream, symbolic streams
                                                 (in this volume, or in another .aff4 file of the folder)

What was not read when the image was made reads as the standard says: UNKNOWN and UNREADABLEDATA, over and over.
Logical images (AFF4-L), encrypted ones and those of before the standard are recognised and refused.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Final

from ferrotype.block import Source
from ferrotype.errors import DeviceError, FormatError, InvalidImage, UnsupportedError
from ferrotype.formats import MAX_SIZE, Image, left_out
from ferrotype.formats.aff4.check import CheckedMap, CheckedStream, check, check_root, map_hashes, plain_hashes
from ferrotype.formats.aff4.codecs import CODECS
from ferrotype.formats.aff4.streams import Chunks, MapSource, Pattern, Stream, StreamSource, points
from ferrotype.formats.aff4.volume import AFF4, DESCRIPTION, Volume
from ferrotype.formats.related import Related
from ferrotype.formats.zipfile import has_member
from ferrotype.job import Job
from ferrotype.units import KiB, MiB

__all__ = ["open", "probe"]

MOST_MAP: Final = 40 * MiB  # 1.5 million entries
MOST_TARGETS: Final = 10_000
MOST_VOLUMES: Final = 64
MOST_DEPTH: Final = 8  # maps of maps

_IMAGES: Final = tuple(
    AFF4 + name
    for name in ("Image", "DiskImage", "VolumeImage", "MemoryImage", "ContiguousImage", "DiscontiguousImage")
)
_ENCRYPTED: Final = tuple(AFF4 + name for name in ("EncryptedStream", "KeyBag", "PasswordWrappedKeyBag"))
_LOGICAL: Final = tuple(AFF4 + name for name in ("FileImage", "FolderImage", "Folder", "ZipSegmentImage"))
_OLD: Final = tuple(f"http://afflib.org/2009/aff4#{name}" for name in ("Image", "map", "stream", "image"))
_MAP, _STREAM = AFF4 + "Map", AFF4 + "ImageStream"


def probe(file: Source) -> bool:
    """Whether the zip file has a description."""
    return has_member(file, DESCRIPTION)


def open(file: Source, related: Related) -> Image:
    """The first image of the volume; its others are further disks."""
    with ExitStack() as stack:
        volumes = _Volumes(Volume(file), related, stack)
        images = _images(volumes.first)
        disk = volumes.image(images[0])
        volumes.owner = keep = stack.pop_all()
    keep.callback(file.close)
    first, subject = volumes.first, images[0]
    terms = first.graph.all(subject, f"{AFF4}hash")
    hashes = plain_hashes(terms) or volumes.hashes_of_whole(subject)
    whole, tops = map_hashes(terms), volumes.data_streams(subject)
    striped = len(tops) > 1

    def prove(job: Job) -> list[str]:
        of_map = {} if striped else {volumes.data_stream(subject): whole}
        damages = check(disk, hashes, volumes.streams, volumes.maps, of_map, job)
        return damages + check_root(tops, whole) if striped else damages

    return Image(
        "aff4",
        disk,
        facts=volumes.facts(subject),
        disks={urn: partial(volumes.image, urn) for urn in images[1:]},
        hashes=hashes,
        besides=left_out("further disk", images[1:]),
        check=prove,
        close=keep.close,
    )


def _images(volume: Volume) -> list[str]:
    """The subjects that are disks.  Raises UnsupportedError where the volume holds something else."""
    graph = volume.graph
    if graph.of_type(*_ENCRYPTED):
        raise UnsupportedError("the AFF4 volume is encrypted; decrypt it with the program that made it first")
    logical = set(graph.of_type(*_LOGICAL))
    images = [subject for subject in graph.of_type(*_IMAGES) if subject not in logical]
    if not images and not logical:  # a map alone, as memory imagers write it
        images = graph.of_type(_MAP) or graph.of_type(_STREAM)
    if images:
        return images[:1000]
    if logical:
        raise UnsupportedError("the AFF4 volume holds files and folders (AFF4-L), no disk")
    if graph.of_type(*_OLD):
        raise UnsupportedError("the AFF4 volume was made before the standard (2009 schema)")
    raise UnsupportedError("the AFF4 volume holds no disk image")


_MOST_SIBLINGS: Final = 1000  # files that are looked into for a stream


class _Volumes:
    """The volume that was opened, and those beside it that it needs."""

    def __init__(self, first: Volume, related: Related, stack: ExitStack) -> None:
        self.first = first
        self.streams: list[CheckedStream] = []
        self.maps: list[CheckedMap] = []
        self._all = [first]
        self.owner = stack  # of the volumes' files
        self._related = related
        self._map_bytes = 0
        self._opened: dict[str, Source] = {}

    # ------------------------------------------------------------------ streams

    def image(self, urn: str) -> Source:
        """The bytes of an image."""
        source = self.stream(self.data_stream(urn))
        size = self.first.number(urn, "size")
        if size is not None and size != source.size:
            raise InvalidImage(f"the image has {source.size} bytes where it states {size}", field="size")
        if source.size > MAX_SIZE:
            raise InvalidImage(f"an image of {source.size} bytes cannot be", field="size")
        return source

    def data_stream(self, urn: str) -> str:
        """What an image's bytes are: of a striped image each volume has a map of its own."""
        terms = [term.value for term in self.first.graph.all(urn, f"{AFF4}dataStream") if term.is_iri]
        here = [term for term in terms if self._has(self.first, term)]
        if here or terms:
            return (here or terms)[0]
        if self.first.graph.types(urn) & {_MAP, _STREAM}:
            return urn
        raise InvalidImage(f"the image {urn} has no data", field="dataStream")

    def data_streams(self, urn: str) -> dict[str, Volume]:
        """The maps or streams of an image that the volumes opened so far hold: one in each, if it is striped."""
        return {
            term.value: volume
            for volume in self._all
            for term in volume.graph.all(urn, f"{AFF4}dataStream")
            if term.is_iri and self._has(volume, term.value)
        }

    def stream(self, urn: str, depth: int = 0) -> Source:
        """What a URN stands for.  Raises InvalidImage where it is nowhere."""
        if urn in self._opened:
            return self._opened[urn]
        pattern = _symbolic(urn)
        if pattern is not None:
            return pattern
        if depth > MOST_DEPTH:
            raise InvalidImage("the image's maps refer to each other without an end")
        volume = self._holder(urn)
        types = volume.graph.types(urn)
        if _MAP in types:
            source: Source = self._map(urn, volume, depth)
        elif _STREAM in types:
            source = self._image_stream(urn, volume)
        else:
            raise UnsupportedError(f"{urn} is a stream of a kind that is not read: {', '.join(sorted(types))[:200]}")
        self._opened[urn] = source
        return source

    def _image_stream(self, urn: str, volume: Volume) -> Source:
        size, chunk = volume.number(urn, "size"), volume.number(urn, "chunkSize")
        method = volume.graph.one(urn, f"{AFF4}compressionMethod")
        if size is None or chunk is None or size > MAX_SIZE:
            raise InvalidImage(f"the size of the stream {urn}, or of its chunks, is not stated", field="size")
        stream = Stream(
            urn,
            size,
            chunk,
            volume.number(urn, "chunksInSegment") or 1024,
            method.value if method is not None else f"{AFF4}NullCompressor",
        )
        source = StreamSource(Chunks(stream, volume.zip, volume.find), volume.file)
        self.streams.append(CheckedStream(urn, source, volume))
        return source

    def _map(self, urn: str, volume: Volume, depth: int) -> Source:
        content = volume.content(f"{urn}/map", MOST_MAP)
        index = volume.content(f"{urn}/idx", MOST_TARGETS * 128)
        if content is None or index is None:
            raise InvalidImage(f"the map {urn} lacks its entries or its targets")
        self._map_bytes += len(content) + len(index)
        if self._map_bytes > MOST_MAP:
            raise InvalidImage("the maps of the image are too long", field="map")
        names = [line.decode("utf-8", "replace").strip("\r") for line in index.split(b"\n")]
        while names and not names[-1]:
            names.pop()
        if "" in names:  # each line is the number of a target
            raise InvalidImage(f"the map {urn} has a target without a name", field="idx")
        if len(names) > MOST_TARGETS:
            raise InvalidImage(f"the map {urn} has too many targets", field="idx")
        gap = volume.graph.one(urn, f"{AFF4}mapGapDefaultStream")
        sources = [self.stream(name, depth + 1) for name in names]
        sources.append(self.stream(gap.value if gap is not None else f"{AFF4}Zero", depth + 1))
        size = volume.number(urn, "size")
        if size is not None and size > MAX_SIZE:
            raise InvalidImage(f"a map of {size} bytes cannot be", field="size")
        source = MapSource(points(content, size, sources, len(names)), sources)
        self.maps.append(CheckedMap(urn, source, volume, tuple(names)))
        return source

    # ------------------------------------------------------------------ volumes

    def _holder(self, urn: str) -> Volume:
        """The volume that a stream is in; those beside are looked at until it is found."""
        for volume in self._all:
            if self._has(volume, urn):
                return volume
        for name in self._related.siblings(".aff4", "volume of the stream", _MOST_SIBLINGS):
            beside = self._beside(name, urn)
            if beside is not None:
                return beside
        if self.first.graph.types(urn):
            return self.first
        raise InvalidImage(f"the stream {urn} is neither in this volume nor in one beside it")

    @staticmethod
    def _has(volume: Volume, urn: str) -> bool:
        """Whether the volume both describes a stream and stores it."""
        types = volume.graph.types(urn)
        if _MAP in types:
            return volume.find(f"{urn}/map") is not None
        return _STREAM in types and volume.find(f"{urn}/00000000.index") is not None

    def _beside(self, name: str, urn: str) -> Volume | None:
        """The volume in a file beside, where it is one that has the stream; others are closed again."""
        own = self._related.path is not None and name == self._related.path.name
        file = None if own or len(self._all) >= MOST_VOLUMES else self._related.file(name, "volume")
        if file is None:
            return None
        with ExitStack() as stack:
            stack.callback(file.close)
            try:
                volume = Volume(file)
            except (FormatError, DeviceError):  # another file's trouble
                return None
            if not self._has(volume, urn):
                return None
            self.owner.callback(stack.pop_all().close)
        self._all.append(volume)
        return volume

    # ------------------------------------------------------------------ what is told

    def hashes_of_whole(self, urn: str) -> dict[str, str]:
        """The hashes of the stream or map that is all of an image."""
        return plain_hashes(self.first.graph.all(self.data_stream(urn), f"{AFF4}hash"))

    def facts(self, urn: str) -> dict[str, object]:
        graph, streams = self.first.graph, [one.source.chunks.stream for one in self.streams]
        told = {
            "make": "diskMake",
            "model": "diskModel",
            "serial": "diskSerial",
            "acquisition": "acquisitionCompletionState",
        }
        texts = {key: graph.one(urn, AFF4 + name) for key, name in told.items()}
        created = graph.one(self.first.urn, f"{AFF4}creationTime")
        return {
            "subformat": "map" if self.maps else "stream",
            "version": self.first.version,
            "tool": self.first.tool,
            "image": urn,
            "volumes": len(self._all),
            "unit": max((stream.chunk_size for stream in streams), default=32 * KiB),
            "compression": "+".join(sorted({CODECS[stream.compression][0] for stream in streams})) or "none",
            "encrypted": False,
            "created": created.value if created is not None else None,
            **{key: term.value for key, term in texts.items() if term is not None},
        }


def _symbolic(urn: str) -> Pattern | None:
    """The streams that are described by their name alone."""
    name = urn.removeprefix(AFF4 if urn.startswith(AFF4) else "aff4:")  # short, as in the standard's text
    if name == urn or name.startswith("//"):
        return None
    if name in ("Zero", "FFDevice", "FF"):
        return Pattern(b"\0" if name == "Zero" else b"\xff")
    if name == "UnknownData":
        return Pattern(b"UNKNOWN")
    if name == "UnreadableData":
        return Pattern(b"UNREADABLEDATA")
    code = name.removeprefix("SymbolicStream")
    if code != name and len(code) == 2 and all(digit in "0123456789abcdefABCDEF" for digit in code):
        return Pattern(bytes.fromhex(code))
    return None
