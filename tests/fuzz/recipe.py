"""Images by recipe: everything a repository holds, sealed and named as its writer would, whatever it says.

Whoever can write to an image that is not encrypted can make everything match, since the master key stands in it; so
no hash stops what is built here.  A recipe is MessagePack, so that a mutator can change any of it:

    [config, chunks, packs, segments, snapshots]

    config      JSON
    chunks      [bytes, length] each: the bytes repeated up to the length
    packs       [[chunk ...], change of the table, count, table length] ; -1: the right number
    segments    [[[chunk, pack, offset, length] ...], count, more pack names, copies of each entry] ; -1: as above
    snapshots   JSON

In chunks and snapshots ``reference(3)`` stands for the id of chunk 3, as bytes or as hex digits.
"""

from __future__ import annotations

import re
from base64 import b64encode
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import numpy as np

from ferrotype.errors import FerrotypeError
from ferrotype.objects.memory import MemoryStore
from ferrotype.repository.merging import build_segment
from ferrotype.repository.packs import PREFIX as PACKS
from ferrotype.repository.packs import TABLE, PackHeader
from ferrotype.repository.sealing import Keys, Sealer
from ferrotype.repository.segments import ENTRY, SegmentHeader, only_used, open_long, seal_long
from ferrotype.repository.segments import PREFIX as INDEXES

MASTER: Final = bytes(range(32))
CONFIG: Final = msgspec.json.encode(
    {
        "id": "0" * 32,
        "created": "2026-01-01T00:00:00Z",
        "encryption": "none",
        "master": b64encode(MASTER).decode(),
        "chunk_size": 4096,
    }
)
_REFERENCE: Final = re.compile(rb"@chunk:(\d{25})")
_HEX: Final = re.compile(rb"@chunk:(\d{25})@hex")
_MOST: Final = 1 << 16  # bytes a chunk is made of here

Place = tuple[str, dict[int, tuple[int, int]]]  # a pack's name; of each chunk in it, offset and length


def reference(number: int) -> bytes:
    """32 bytes that stand for the id of a chunk."""
    return b"@chunk:%025d" % number


@dataclass(slots=True)
class Built:
    """What a recipe came to."""

    store: MemoryStore
    ids: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


def build(data: bytes) -> Built:
    """An image in memory.  Whatever of the recipe makes no sense is left out."""
    made = Built(MemoryStore())
    try:
        recipe = msgspec.msgpack.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError):
        recipe = []
    config, chunks, packs, segments, snapshots = [*_list(recipe), None, None, None, None, None][:5]
    sealer = Sealer(Keys.derive(MASTER, encrypted=False))
    made.store.put("config", [_bytes(config)])
    frames = []
    for chunk in _list(chunks):
        plain = _filled(chunk, made.ids)
        made.ids.append(sealer.id_of(plain))
        made.sizes.append(len(plain))
        frames.append(sealer.seal(made.ids[-1], plain))
    places = [_pack(made, sealer, frames, _list(pack)) for pack in _list(packs)]
    for segment in _list(segments):
        _segment(made, sealer, places, _list(segment))
    for snapshot in _list(snapshots):
        plain = _HEX.sub(lambda m: _id(m, made.ids).hex().encode(), _bytes(snapshot))
        name, frame = sealer.seal_object("snapshot", plain[: 16 << 20])
        _put(made, name, [frame])
    return made


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else b""


def _int(value: Any, default: int = -1) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _id(match: re.Match[bytes], ids: list[bytes]) -> bytes:
    number = int(match[1])
    return ids[number] if number < len(ids) else match[0][:32]


def _filled(chunk: Any, ids: list[bytes]) -> bytes:
    parts = [*_list(chunk), b"", 0][:2]
    pattern = _REFERENCE.sub(lambda m: _id(m, ids), _bytes(parts[0]))
    length = max(0, min(_int(parts[1], 0), _MOST))
    return (pattern * (length // len(pattern) + 1))[:length] if pattern else bytes(length)


def _put(made: Built, name: str, parts: list[bytes]) -> None:
    if name not in made.store.objects:
        made.store.put(name, parts)


def _pack(made: Built, sealer: Sealer, frames: list[bytes], parts: list[Any]) -> Place:
    listed, change, count, length = [*parts, [], b"", -1, -1][:4] if len(parts) < 4 else parts[:4]
    numbers = [n for n in _list(listed) if isinstance(n, int) and 0 <= n < len(frames)]
    table = np.zeros(len(numbers), TABLE)
    for i, n in enumerate(numbers):
        table[i] = (made.ids[n], len(frames[n]))
    plain = bytearray(table.tobytes())
    for i, octet in enumerate(_bytes(change)[: len(plain)]):
        plain[i] ^= octet
    pack_id = sealer.object_id("pack", bytes(16) + bytes(plain))
    sealed = sealer.seal(pack_id, bytes(plain), compress=False)
    fields = (_int(length) if _int(length) >= 0 else len(sealed), _int(count) if _int(count) >= 0 else len(numbers))
    header = PackHeader(b"FPCK", 1, fields[0] % 2**32, fields[1] % 2**32, bytes(16)).pack()
    name = PACKS + pack_id.hex()
    places, at = {}, len(header) + len(sealed)
    for n in numbers:
        places[n] = (at, len(frames[n]))
        at += len(frames[n])
    _put(made, name, [header, sealed, *(frames[n] for n in numbers)])
    return name, places


def _segment(made: Built, sealer: Sealer, places: list[Place], parts: list[Any]) -> None:
    listed, count, more, copies = [*parts, [], -1, [], 1][:4] if len(parts) < 4 else parts[:4]
    rows = []
    for row in _list(listed):
        numbers = [n for n in _list(row) if isinstance(n, int)]
        if len(numbers) < 4 or not 0 <= numbers[0] < len(made.ids):
            continue
        chunk, pack, offset, length = numbers[:4]
        right = places[pack][1].get(chunk, (0, 0)) if 0 <= pack < len(places) else (0, 0)
        entry = (right[0] if offset < 0 else offset, right[1] if length < 0 else length)
        rows.append((made.ids[chunk], pack % 2**32, entry[0] % 2**32, entry[1] % 2**32))
    entries = np.array(rows, ENTRY) if rows else np.zeros(0, ENTRY)
    entries = np.repeat(entries, max(1, min(_int(copies, 1), 4096)))
    names = [name for name, _ in places]
    if len(entries) and int(entries["pack"].max()) < len(names):
        entries, names = only_used(entries, names)
    names += [n for n in _list(more) if isinstance(n, str)]
    try:
        name, made_parts = build_segment(entries, names, sealer, bytes(16))
    except (FerrotypeError, UnicodeEncodeError):
        return
    if _int(count) >= 0:  # another number of entries than there are, named as if it were right
        old_id, old = bytes.fromhex(name.removeprefix(INDEXES)), made_parts[1]
        directory = open_long(sealer, old_id, lambda at, length: old[at : at + length], len(old))
        header = SegmentHeader(b"FIDX", 1, _int(count) % 2**64, 0, bytes(16), 0)
        segment_id = sealer.object_id("index", header.pack() + directory)
        sealed = seal_long(sealer, segment_id, directory)
        final = SegmentHeader(b"FIDX", 1, _int(count) % 2**64, len(sealed), bytes(16), 0)
        name, made_parts = INDEXES + segment_id.hex(), [final.pack(), sealed, *made_parts[2:]]
    _put(made, name, made_parts)
