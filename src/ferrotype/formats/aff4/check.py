"""The hashes of an AFF4 image.

    chunks           00000000.blockHash.md5 ...: a digest for each chunk of a segment, one behind the other
    their lists      <stream>/blockhash.md5  aff4:hash  of those lists, of all segments
    streams, disk    aff4:hash                          of their bytes
    maps             mapIdxHash, mapPointHash, mapPathHash, mapHash    of the members idx, map, mapPath, and of all
    all of it        blockMapHash                       of the lists' hashes and the map's

Written from the images that were published with "AFF4 Standard v1.0" (2017), and from what the readers of its authors
say of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from ferrotype.block import Source, read
from ferrotype.errors import DeviceError, FormatError, InvalidImage
from ferrotype.formats.aff4.streams import StreamSource
from ferrotype.formats.aff4.turtle import Term
from ferrotype.formats.aff4.volume import AFF4, Volume
from ferrotype.job import Job
from ferrotype.pipeline import map_ordered
from ferrotype.units import MiB

__all__ = ["CheckedMap", "CheckedStream", "check", "plain_hashes"]

ALGORITHMS: Final = ("md5", "sha1", "sha256", "sha512", "blake2b")  # in the order of blockMapHash
MOST_MEMBER: Final = 40 * MiB


@dataclass(frozen=True, slots=True)
class CheckedStream:
    """An ImageStream, and the volume it is in."""

    urn: str
    source: StreamSource
    volume: Volume


@dataclass(frozen=True, slots=True)
class CheckedMap:
    """A map, its bytes, the volume it is in, and the URNs of its targets."""

    urn: str
    source: Source
    volume: Volume
    targets: tuple[str, ...]


def plain_hashes(terms: Iterable[Term]) -> dict[str, str]:
    """The hashes that are of the bytes themselves: {"md5": hex digits}."""
    found = {}
    for term in terms:
        name = term.datatype.removeprefix(AFF4).lower()
        if term.datatype.startswith(AFF4) and name in ALGORITHMS:
            found[name] = term.value.lower()
    return found


def check(
    disk: Source, stated: dict[str, str], streams: list[CheckedStream], maps: list[CheckedMap], job: Job
) -> list[str]:
    """A sentence for each hash that does not hold; ``stated`` are those of the disk."""
    damages: list[str] = []
    for stream in streams:
        _check_stream(stream, job, damages)
    for one in maps:
        _check_map(one, streams, damages)
    if stated:
        job.begin("checking the disk", disk.size)
        _check_bytes(disk, "the disk", stated, job, damages)
    return damages


def _check_bytes(source: Source, what: str, stated: dict[str, str], job: Job, damages: list[str]) -> None:
    running = {name: _new(name) for name in stated}
    for at in range(0, source.size, MiB):
        try:
            piece = read(source, at, min(MiB, source.size - at))
        except (FormatError, DeviceError) as error:
            damages.append(f"{what} cannot be read: {error}")
            return
        for one in running.values():
            one.update(piece)
        job.advance(len(piece))
    _compare(what, stated, running, damages)


def _compare(what: str, stated: dict[str, str], found: dict[str, Any], damages: list[str]) -> None:
    for name, digest in stated.items():
        if found[name].hexdigest() != digest:
            damages.append(f"the {name} of {what} is {found[name].hexdigest()}, not {digest}")


def _new(name: str) -> Any:
    return hashlib.new(name, usedforsecurity=False)


# ---------------------------------------------------------------------- streams


def _check_stream(stream: CheckedStream, job: Job, damages: list[str]) -> None:
    """Its chunks, the lists of their digests, and all of its bytes."""
    chunks, graph = stream.source.chunks, stream.volume.graph
    about = chunks.stream
    stated = plain_hashes(graph.all(stream.urn, f"{AFF4}hash"))
    running = {name: _new(name) for name in stated}
    present = [name for name in ALGORITHMS if stream.volume.find(f"{stream.urn}/00000000.blockHash.{name}")]
    lists = {name: _new("sha512") for name in present}
    job.begin("checking the chunks", about.size)
    group = max(1, 4 * MiB // about.chunk_size)  # chunks looked at in one go

    def pieces() -> Iterator[tuple[int, int, dict[str, bytes]]]:
        """(first chunk, how many, their digests) of every group."""
        for number in range(-(-about.size // about.segment_size)):
            digests = {}
            for name in present:
                digests[name] = chunks.content(f"{number:08}.blockHash.{name}", about.chunks_in_segment * 64)
                lists[name].update(digests[name])
            first = number * about.chunks_in_segment
            count = min(about.chunks_in_segment, -(-about.size // about.chunk_size) - first)
            for at in range(0, count, group):
                width = {name: _new(name).digest_size for name in present}
                part = {name: digests[name][at * width[name] : (at + group) * width[name]] for name in present}
                yield first + at, min(group, count - at), part

    def looked_at(piece: tuple[int, int, dict[str, bytes]]) -> tuple[bytes, list[str]]:
        first, count, digests = piece
        start = first * about.chunk_size
        length = min(count * about.chunk_size, about.size - start)
        try:
            plain = read(stream.source, start, length)
        except (FormatError, DeviceError) as error:
            return b"", [f"chunks from {first} on: {error}"]
        return plain, list(_wrong_chunks(plain, first, about.chunk_size, digests))

    workers = len(os.sched_getaffinity(0))
    try:
        for plain, wrong in map_ordered(looked_at, pieces(), workers=workers, depth=2 * workers):
            damages.extend(wrong)
            for one in running.values():
                one.update(plain)
            job.advance(len(plain))
    except InvalidImage as error:
        damages.append(f"the digests of {stream.urn} cannot be read: {error}")
        return
    _compare(f"the stream {stream.urn}", stated, running, damages)
    for name in present:
        digest = _hash_of(stream.volume, f"{stream.urn}/blockhash.{name}", "hash")
        if digest is not None and digest != lists[name].hexdigest():
            damages.append(f"the list of {name} digests of {stream.urn} is not the one that was made")


def _wrong_chunks(plain: bytes, first: int, size: int, digests: dict[str, bytes]) -> Iterator[str]:
    for name, part in digests.items():
        width = _new(name).digest_size
        for number, at in enumerate(range(0, len(plain), size)):
            chunk, digest = plain[at : at + size], part[number * width : (number + 1) * width]
            # the last chunk's digest is of what the stream holds of it, or of all of it with zeros behind
            if digest not in (_digest(name, chunk), _digest(name, chunk.ljust(size, b"\0"))):
                yield f"the {name} of chunk {first + number} is not the one stored"


def _digest(name: str, data: bytes) -> bytes:
    return bytes(hashlib.new(name, data, usedforsecurity=False).digest())


def _hash_of(volume: Volume, subject: str, name: str) -> str | None:
    """A SHA-512 that the description states."""
    term = volume.graph.one(subject, AFF4 + name)
    return term.value.lower() if term is not None and term.datatype == f"{AFF4}SHA512" else None


# ---------------------------------------------------------------------- maps


def _check_map(one: CheckedMap, streams: list[CheckedStream], damages: list[str]) -> None:
    contents = {name: one.volume.content(f"{one.urn}/{name}", MOST_MEMBER) for name in ("map", "idx", "mapPath")}
    parts = {"mapPointHash": ["map"], "mapIdxHash": ["idx"], "mapPathHash": ["mapPath"], "mapHash": [*contents]}
    for name, members in parts.items():
        stated = _hash_of(one.volume, one.urn, name)
        found = hashlib.sha512(b"".join(contents[member] or b"" for member in members)).hexdigest()
        if stated is not None and stated != found:
            damages.append(f"the {name} of the map {one.urn} is {found}, not {stated}")
    stated = _hash_of(one.volume, one.urn, "blockMapHash")
    local = [stream for stream in streams if stream.volume is one.volume and stream.urn in one.targets]
    if stated is None or len(local) != 1:
        return
    subjects = [(f"{local[0].urn}/blockhash.{name}", "hash") for name in ALGORITHMS]
    subjects += [(one.urn, name) for name in ("mapPointHash", "mapIdxHash", "mapPathHash")]
    digests = [digest for subject, name in subjects if (digest := _hash_of(one.volume, subject, name))]
    try:
        found = hashlib.sha512(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest()
    except ValueError:
        found = "no hash"
    if found != stated:
        damages.append(f"the blockMapHash of the map {one.urn} is {found}, not {stated}")
