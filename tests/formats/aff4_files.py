"""Builds AFF4 volumes as AFF4 Standard v1.0 describes them, with the standard library's zip files."""

from __future__ import annotations

import hashlib
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

AFF4 = "http://aff4.org/Schema#"
COMPRESSIONS = {
    "stored": "aff4:NullCompressor",
    "zlib": "<https://www.ietf.org/rfc/rfc1950.txt>",
    "deflate": "<https://tools.ietf.org/html/rfc1951>",
    "snappy": "<http://code.google.com/p/snappy/>",
    "lz4": "<https://code.google.com/p/lz4/>",
}


def deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(6, zlib.DEFLATED, -15)
    return stream.compress(data) + stream.flush()


def snappy(data: bytes) -> bytes:
    """Literals, and runs of one byte as copies of each kind."""
    out, left = bytearray(), len(data)
    while left >= 128:
        out.append(left & 127 | 128)
        left >>= 7
    out.append(left)
    at = 0
    while at < len(data):
        count = 1
        while at + count < len(data) and data[at + count] == data[at] and count < 65:
            count += 1
        if count == 65:
            out += bytes([0, data[at], *((63 << 2 | 2, 1, 0) if at % 2 else (63 << 2 | 3, 1, 0, 0, 0))])
        elif 5 <= count <= 12:
            out += bytes([0, data[at], (count - 5) << 2 | 1, 1])
        else:
            count = min(1000 if at % 3 else 50, len(data) - at)
            head = bytes([(count - 1) << 2]) if count <= 60 else bytes([61 << 2]) + struct.pack("<H", count - 1)
            out += head + data[at : at + count]
        at += count
    return bytes(out)


def lz4(data: bytes) -> bytes:
    """Literals, and runs of one byte as matches; the last bytes are literals."""
    out, at, plain = bytearray(), 0, bytearray()

    def sequence(match: int) -> None:
        token = min(len(plain), 15) << 4 | (min(match - 4, 15) if match else 0)
        out.append(token)
        out.extend(_more(len(plain)))
        out.extend(plain)
        if match:
            out.extend(b"\1\0" + _more(match - 4))
        plain.clear()

    while at < len(data):
        count = 1
        while at + count < len(data) - 12 and data[at + count] == data[at]:
            count += 1
        plain.append(data[at])
        if count > 8:
            sequence(count - 1)
            at += count
        else:
            at += 1
    sequence(0)
    return bytes(out)


def _more(count: int) -> bytes:
    return b"" if count < 15 else bytes([255] * ((count - 15) // 255) + [(count - 15) % 255])


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "stored": bytes,
    "zlib": zlib.compress,
    "deflate": deflate,
    "snappy": snappy,
    "lz4": lz4,
}


@dataclass(slots=True)
class ImageStream:
    """A stream of chunks in segments."""

    urn: str
    content: bytes
    compression: str = "zlib"
    chunk: int = 4096
    chunks_in_segment: int = 16
    hashes: tuple[str, ...] = ("md5", "sha1")
    size: int | None = None

    def members(self) -> dict[str, bytes]:
        made: dict[str, bytes] = {}
        step = self.chunk * self.chunks_in_segment
        for number in range(-(-len(self.content) // step)):
            data, index = bytearray(), bytearray()
            digests: dict[str, bytes] = dict.fromkeys(self.hashes, b"")
            for at in range(number * step, min((number + 1) * step, len(self.content)), self.chunk):
                plain = self.content[at : at + self.chunk]
                packed = PACKERS[self.compression](plain.ljust(self.chunk, b"\0"))
                packed = packed if len(packed) < self.chunk else plain.ljust(self.chunk, b"\0")
                index += struct.pack("<QI", len(data), len(packed))
                data += packed
                digests = {name: digest + hashlib.new(name, plain).digest() for name, digest in digests.items()}
            made[f"{self.urn}/{number:08}"] = bytes(data)
            made[f"{self.urn}/{number:08}.index"] = bytes(index)
            for name, digest in digests.items():
                made[f"{self.urn}/{number:08}.blockHash.{name}"] = digest
        return made

    def turtle(self, members: dict[str, bytes]) -> str:
        lines = [
            f"<{self.urn}> a aff4:ImageStream ; aff4:chunkSize {self.chunk} ;",
            f'  aff4:chunksInSegment "{self.chunks_in_segment}"^^xsd:int ;',
            f"  aff4:compressionMethod {COMPRESSIONS[self.compression]} ;",
            *(f'  aff4:hash "{hashlib.new(n, self.content).hexdigest()}"^^aff4:{n.upper()} ;' for n in self.hashes),
            f'  aff4:size "{len(self.content) if self.size is None else self.size}"^^xsd:long .',
        ]
        for name in self.hashes:
            parts = [
                members[key]
                for key in sorted(members)
                if key.startswith(f"{self.urn}/") and key.endswith(f".blockHash.{name}")
            ]
            digest = hashlib.sha512(b"".join(parts)).hexdigest()
            lines.append(f'<{self.urn}/blockhash.{name}> a aff4:BlockHashes ; aff4:hash "{digest}"^^aff4:SHA512 .')
        return "\n".join(lines)


@dataclass(slots=True)
class Map:
    """Entries (offset, length, offset in the target, target)."""

    urn: str
    targets: list[str]
    entries: list[tuple[int, int, int, int]]
    size: int | None = None
    gap: str = ""
    hashes: bool = True

    def members(self) -> dict[str, bytes]:
        points = b"".join(struct.pack("<QQQI", *entry) for entry in self.entries)
        return {
            f"{self.urn}/map": points,
            f"{self.urn}/idx": "\n".join(self.targets).encode(),
            f"{self.urn}/mapPath": b"path",
        }

    def turtle(self, members: dict[str, bytes]) -> str:
        text = f"<{self.urn}> a aff4:Map ; aff4:dependentStream <{self.targets[0]}>"
        text += f" ; aff4:mapGapDefaultStream <{self.gap}>" if self.gap else ""
        text += "" if self.size is None else f' ; aff4:size "{self.size}"^^xsd:long'
        own = {name: members[f"{self.urn}/{name}"] for name in ("map", "idx", "mapPath")}
        digests = {"mapPointHash": own["map"], "mapIdxHash": own["idx"], "mapHash": b"".join(own.values())}
        for name, content in digests.items() if self.hashes else ():
            text += f' ; aff4:{name} "{hashlib.sha512(content).hexdigest()}"^^aff4:SHA512'
        return text + " ."


@dataclass(slots=True)
class Aff4:
    """A volume."""

    parts: list[ImageStream | Map]
    image: str = ""  # the URN of what the image's data are
    urn: str = "aff4://11111111-2222-3333-4444-555555555555"
    size: int | None = None
    hashes: dict[str, str] = field(default_factory=dict)  # of the disk
    turtle: str = ""  # more of it
    version: str = "major=1\nminor=0\ntool=tests\n"
    types: str = "aff4:Image , aff4:DiskImage , aff4:ContiguousImage"
    relative: bool = False  # names of members as they are, not escaped
    deflated: tuple[str, ...] = ()  # endings of members that zip deflates

    def description(self, members: dict[str, bytes]) -> str:
        lines = [
            f"@prefix : <{self.urn}> .",
            "@prefix rdf: <http://www.w3.org/1999/02/22-rdf-syntax-ns#> .",
            "@prefix xsd: <http://www.w3.org/2001/XMLSchema#> .",
            f"@prefix aff4: <{AFF4}> .",
            "# a volume",
            ': a aff4:ZipVolume ; aff4:creationTime "2026-01-02T03:04:05Z"^^xsd:dateTime .',
        ]
        if self.image:
            size = "" if self.size is None else f'; aff4:size "{self.size}"^^xsd:long'
            hashes = "".join(f'; aff4:hash "{value}"^^aff4:{name.upper()}' for name, value in self.hashes.items())
            lines.append(f"<aff4://image> a {self.types} ; aff4:dataStream <{self.image}> {size} {hashes} .")
        return "\n".join([*lines, *(part.turtle(members) for part in self.parts), self.turtle])

    def members(self) -> dict[str, bytes]:
        made: dict[str, bytes] = {}
        for part in self.parts:
            made |= part.members()
        return made

    def write(self, path: Path, *, seed: int = 0, members: dict[str, bytes] | None = None) -> Path:
        """Members in shuffled order; ``members`` are used as they are where they are given."""
        made = self.members() if members is None else members
        names = list(made)
        random.Random(seed).shuffle(names)
        with zipfile.ZipFile(path, "w") as archive:
            archive.comment = self.urn.encode()
            archive.writestr("container.description", self.urn)
            archive.writestr("version.txt", self.version)
            for urn in names:
                name = urn.removeprefix(f"{self.urn}/") if self.relative else urn.replace("aff4://", "aff4%3A%2F%2F")
                method = zipfile.ZIP_DEFLATED if urn.endswith(self.deflated or "\0") else zipfile.ZIP_STORED
                archive.writestr(name, made[urn], method)
            archive.writestr("information.turtle", self.description(made), zipfile.ZIP_DEFLATED)
        return path
