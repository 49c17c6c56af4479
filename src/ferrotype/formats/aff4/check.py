"""The hashes of an AFF4 image.

    chunks           00000000.blockHash.md5 ...: a digest for each chunk of a segment, one behind the other
    their lists      <stream>/blockhash.md5  aff4:hash  of those lists, of all segments
    streams, disk    aff4:hash                          of their bytes
    maps             mapIdxHash, mapPointHash, mapPathHash, mapHash    of the members idx, map, mapPath, and of all
    all of it        blockMapHash of the map, aff4:hash of the image    of the lists' hashes and the map's

Written from "AFF4 Standard v1.0a" (2022), section 6, and the images that were published with it, whose names for the
lists of digests are others: both are taken.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
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

__all__ = ["CheckedMap", "CheckedStream", "check", "check_root", "map_hashes", "plain_hashes"]

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


def map_hashes(terms: Iterable[Term]) -> dict[str, str]:
    """The hashes of an image that are over its map and its lists of digests: {"sha512": hex digits}."""
    prefix = f"{AFF4}blockMapHash"
    found = {term.datatype.removeprefix(prefix).lower(): term for term in terms if term.datatype.startswith(prefix)}
    return {name: term.value.lower() for name, term in found.items() if name in ALGORITHMS}


def check(
    disk: Source,
    stated: dict[str, str],
    streams: list[CheckedStream],
    maps: list[CheckedMap],
    whole: Mapping[str, Mapping[str, str]],
    job: Job,
) -> list[str]:
    """A sentence for each hash that does not hold; ``stated`` are those of the disk, ``whole`` those of its maps."""
    damages: list[str] = []
    for stream in streams:
        _check_stream(stream, job, damages)
    for one in maps:
        _check_map(one, streams, whole.get(one.urn, {}), damages)
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
    present = _lists_of(stream)
    totals = {name: _stated(stream.volume, f"{stream.urn}/blockhash.{name}", "hash") for name in present}
    lists = {name: {kind: _new(kind) for kind in totals[name]} for name in present}
    job.begin("checking the chunks", about.size)
    group = max(1, 4 * MiB // about.chunk_size)  # chunks looked at in one go

    def pieces() -> Iterator[tuple[int, int, dict[str, bytes]]]:
        """(first chunk, how many, their digests) of every group."""
        for number in range(-(-about.size // about.segment_size)):
            digests = {}
            for name in present:
                digests[name] = chunks.content(f"{number:08}.{present[name]}", about.chunks_in_segment * 64)
                for one in lists[name].values():
                    one.update(digests[name])
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
    damages.extend(
        f"the list of {name} digests of {stream.urn} is not the one that was made"
        for name in present
        if any(lists[name][kind].hexdigest() != digest for kind, digest in totals[name].items())
    )


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


def _lists_of(stream: CheckedStream) -> dict[str, str]:
    """The algorithms of which there are digests of chunks, and what the names of their members end with."""
    names = ((name, form) for name in ALGORITHMS for form in (name, f"blockHash.{name}"))
    return {name: form for name, form in names if stream.volume.find(f"{stream.urn}/00000000.{form}")}


def _stated(volume: Volume, subject: str, name: str) -> dict[str, str]:
    """The hashes that the description states of something: {"sha512": hex digits}."""
    return plain_hashes(volume.graph.all(subject, AFF4 + name))


# ---------------------------------------------------------------------- maps


def _check_map(one: CheckedMap, streams: list[CheckedStream], whole: Mapping[str, str], damages: list[str]) -> None:
    """The hashes of its members, and those over all, which the map states or the image does (``whole``)."""
    contents = {name: one.volume.content(f"{one.urn}/{name}", MOST_MEMBER) for name in ("map", "idx", "mapPath")}
    parts = {"mapPointHash": ["map"], "mapIdxHash": ["idx"], "mapPathHash": ["mapPath"], "mapHash": [*contents]}
    for name, members in parts.items():
        for kind, stated in _stated(one.volume, one.urn, name).items():
            found = _digest(kind, b"".join(contents[member] or b"" for member in members)).hex()
            if stated != found:
                damages.append(f"the {name} of the map {one.urn} is {found}, not {stated}")
    local = [stream for stream in streams if stream.volume is one.volume and stream.urn in one.targets]
    if len(local) != 1:
        return
    for stated_of in (_stated(one.volume, one.urn, "blockMapHash"), whole):
        for kind, stated in stated_of.items():
            found = _block_map_hash(one, local[0], kind)
            if found != stated:
                damages.append(f"the blockMapHash of the map {one.urn} is {found}, not {stated}")


def _block_map_hash(one: CheckedMap, stream: CheckedStream, kind: str) -> str:
    """The hash over the stated hashes of the lists of digests and of the map's members, of its own kind if there."""
    subjects = [(f"{stream.urn}/blockhash.{name}", "hash") for name in ALGORITHMS]
    subjects += [(one.urn, name) for name in ("mapPointHash", "mapIdxHash", "mapPathHash")]
    stated = [_stated(one.volume, subject, name) for subject, name in subjects]
    digests = [hashes.get(kind) or next(iter(hashes.values())) for hashes in stated if hashes]
    try:
        return _digest(kind, b"".join(bytes.fromhex(digest) for digest in digests)).hex()
    except ValueError:
        return "no hash"


def check_root(maps: Mapping[str, Volume], whole: Mapping[str, str]) -> list[str]:
    """A sentence for each hash of a striped image that is not the one over those its volumes' maps state.

    They stand in the order of the maps' names, as the canonical striped images have them.
    """
    damages = []
    for kind, stated in whole.items():
        hashes = [_stated(volume, urn, "blockMapHash").get(kind, "") for urn, volume in sorted(maps.items())]
        if not all(hashes):
            continue
        try:
            found = _digest(kind, b"".join(map(bytes.fromhex, hashes))).hex()
        except ValueError:
            found = "no hash"
        if found != stated:
            damages.append(f"the {kind} over the maps of the image is {found}, not {stated}")
    return damages
