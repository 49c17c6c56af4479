"""Frames that no pack table and no index tells of, found by their looks.

    | codec 1 | zeros 3 | length of the plaintext 4 | zstd frame, or the plaintext itself |

What may be a frame's head is opened, and its chunk named by hashing what is in it.  Only an image that is not
encrypted tells ids by content.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from ferrotype.job import Job
from ferrotype.objects.rescue import Piece, RescueStore
from ferrotype.repository.sealing import FRAME_HEAD, ID_SIZE, MAX_PLAIN, Sealer
from ferrotype.repository.segments import ENTRY, Entries
from ferrotype.units import GiB, MiB

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_WINDOW: Final = 8 * MiB  # bytes searched at a time
_SLICE: Final = MiB  # bytes of it looked at in one sweep: where all look alike, each takes forty times as many
_REACH: Final = GiB  # bytes that one piece of found frames covers: their offsets in it have 32 bits
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True, slots=True)
class BareFrames:
    """The search for them.  ``lengths`` are those that chunks may have.

    Frames that are not compressed have nothing else to know them by.
    """

    store: RescueStore
    sealer: Sealer
    job: Job
    lengths: frozenset[int]

    def entries(self) -> Iterator[tuple[Piece, Entries]]:
        """Pieces in which no whole record stands, and the frames that were opened in them."""
        self.job.begin("looking for chunks by their content", sum(piece.length for piece in self.store.dark()))
        for dark in self.store.dark():
            for low in range(0, dark.length, _REACH):
                piece = Piece(dark.volume, dark.start + low, min(_REACH, dark.length - low))
                found: dict[bytes, tuple[int, int]] = {}  # each was opened: one place of a chunk is enough
                for chunk_id, offset, length in self._frames(piece, dark.length - low):
                    found.setdefault(chunk_id, (offset, length))
                if found:
                    entries = np.zeros(len(found), ENTRY)
                    entries["id"] = np.frombuffer(b"".join(found), f"V{ID_SIZE}")
                    entries["offset"], entries["length"] = np.array(list(found.values())).T
                    yield Piece(piece.volume, piece.start, dark.length - low), entries

    def _frames(self, piece: Piece, room: int) -> Iterator[tuple[bytes, int, int]]:
        at = low = 0
        while low < piece.length:
            low = max(low, min(self.store.stored_from(piece, low), piece.length))
            data = self.store.read(piece, low, min(_WINDOW + MAX_PLAIN + 64, room - low))
            for head in _heads(data, self.lengths):
                if low + head < at:
                    continue  # inside a frame that was decompressed
                self.job.advance(0)  # there may be millions of them, each as dear as a chunk
                opened = self._opened(memoryview(data)[head:])
                if opened is not None:
                    yield opened[0], low + head, opened[1]
                    if data[head]:  # one that is not compressed may be the beginning of one, and cover others
                        at = low + head + opened[1]
            self.job.advance(min(_WINDOW, piece.length - low))
            low += _WINDOW

    def _opened(self, view: memoryview) -> tuple[bytes, int] | None:
        """Id and length of the frame that begins here."""
        length = int.from_bytes(view[4:8], "little")
        if view[0]:
            decoder = zstd.ZstdDecompressor()
            try:
                plain = decoder.decompress(view[FRAME_HEAD : FRAME_HEAD + length], max_length=length + 1)
            except zstd.ZstdError:
                return None
            if len(plain) != length or not decoder.eof:
                return None
            used = min(length, len(view) - FRAME_HEAD) - len(decoder.unused_data)
            return self.sealer.id_of(plain), FRAME_HEAD + used
        if len(view) < FRAME_HEAD + length:
            return None
        return self.sealer.id_of(view[FRAME_HEAD : FRAME_HEAD + length]), FRAME_HEAD + length


def _heads(data: bytes, lengths: frozenset[int]) -> Iterator[int]:
    """Offsets in the first window at which a frame's head may stand."""
    for at in range(0, min(len(data), _WINDOW), _SLICE):
        for head in _heads_in(data[at : min(at + _SLICE, _WINDOW) + FRAME_HEAD + 4], lengths):
            yield at + head


def _heads_in(data: bytes, lengths: frozenset[int]) -> list[int]:
    count = len(data) - FRAME_HEAD - len(_ZSTD_MAGIC)
    if count <= 0:
        return []
    raw = np.frombuffer(data, np.uint8)
    likely = (raw[:count] <= 1) & ((raw[1 : count + 1] | raw[2 : count + 2] | raw[3 : count + 3]) == 0)
    likely &= raw[7 : count + 7] <= 1
    likely &= (raw[4 : count + 4] | raw[5 : count + 5] | raw[6 : count + 6] | raw[7 : count + 7]) != 0
    at = np.flatnonzero(likely)
    size = sum(raw[at + 4 + n].astype(np.int64) << 8 * n for n in range(4))
    magic = np.frombuffer(_ZSTD_MAGIC, np.uint8)
    packed = (raw[at[:, None] + np.arange(8, 12)] == magic).all(axis=1) & (raw[at] == 1) & (size > 0)
    bare = (raw[at] == 0) & np.isin(size, np.array(sorted(lengths), np.int64)) & (size > 0)
    hits: list[int] = at[packed | bare].tolist()
    return hits
