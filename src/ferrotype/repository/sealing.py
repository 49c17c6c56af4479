"""Sealing: compress and encrypt a plaintext into a frame, and prove it on the way back.

    plain image       | codec u8 | flags u8 | reserved u16 | plain length u32 | payload ............ |
    encrypted image   | codec u8 | flags u8 | reserved u16 | plain length u32 | nonce 12 | payload .. | tag 16 |

The id of a plaintext is its keyed BLAKE3 hash, so ids tell nothing without the key, and every plaintext that leaves
``unseal`` has been hashed and compared with the id it was asked for.  Each id has an encryption key of its own (keyed
BLAKE3 of the id), under which the 96-bit nonces are random: a key sees as many messages as one chunk is stored anew,
so the bound of AES-GCM on random nonces is out of reach for any image.  The frame's head is authenticated with it.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NewType

from blake3 import blake3

from ferrotype.errors import CorruptChunk, CorruptObject
from ferrotype.trouble import lacks_memory

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from ferrotype.repository.ciphers import Cipher

ChunkId = NewType("ChunkId", bytes)  # 32 bytes

ID_SIZE: Final = 32
OBJECT_ID_SIZE: Final = 16
ZERO_ID: Final = ChunkId(bytes(ID_SIZE))  # stands for plaintext that is all zeros; never stored
MAX_PLAIN: Final = 16 << 20  # bytes; nothing larger is ever sealed, so nothing larger is ever unsealed
FRAME_HEAD: Final = 8
_HEAD: Final = struct.Struct("<BBHI")
_RAW, _ZSTD = 0, 1
_NONCE, _TAG = 12, 16


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one repository, all derived from its master key; ``data`` is None where it is not encrypted."""

    ids: bytes
    objects: bytes
    data: bytes | None

    @classmethod
    def derive(cls, master: bytes, *, encrypted: bool) -> Keys:
        """BLAKE3 in key-derivation mode, with one context string for each purpose."""

        def subkey(purpose: str) -> bytes:
            return blake3(master, derive_key_context=f"ferrotype image v1 2026-11 {purpose}").digest()

        return cls(subkey("chunk ids"), subkey("object names"), subkey("data") if encrypted else None)


class Sealer:
    """Seals and unseals under one repository's keys.  Safe to share between threads."""

    def __init__(self, keys: Keys, level: int = 1) -> None:
        self._keys = keys
        self._level = level
        self._local = threading.local()  # a compression context each thread
        self._cipher = None if keys.data is None else _cipher(keys.data)

    @property
    def encrypted(self) -> bool:
        return self._keys.data is not None

    def has_keys_of(self, other: Sealer) -> bool:
        """Whether what the other one seals can be taken over as it is."""
        return self._keys == other._keys

    @property
    def overhead(self) -> int:
        """Bytes a frame is longer than its payload."""
        return FRAME_HEAD + (_NONCE + _TAG if self.encrypted else 0)

    def id_of(self, plain: bytes | bytearray | memoryview, /) -> ChunkId:
        """Keyed BLAKE3-256 of a chunk's plaintext."""
        return ChunkId(blake3(plain, key=self._keys.ids).digest())

    def object_id(self, kind: str, plain: bytes, /) -> bytes:
        """Keyed BLAKE3 of a metadata object's kind and plaintext, 16 bytes: the second half of the object's name."""
        return blake3(kind.encode() + b"\0" + plain, key=self._keys.objects).digest(length=OBJECT_ID_SIZE)

    def seal_object(self, kind: str, plain: bytes, /) -> tuple[str, bytes]:
        """Name and frame of a metadata object."""
        object_id = self.object_id(kind, plain)
        return f"{kind}/{object_id.hex()}", self.seal(object_id, plain)

    def unseal_object(self, name: str, frame: bytes | memoryview, /) -> bytes:
        """The plaintext of a metadata object, proven to be the one its name says.  Raises CorruptObject."""
        kind, _, text = name.partition("/")
        try:
            object_id = bytes.fromhex(text)
            plain = self.open(object_id, frame)
        except (ValueError, CorruptChunk) as error:
            raise CorruptObject(name, "it cannot be opened") from error
        if self.object_id(kind, plain) != object_id:
            raise CorruptObject(name, "its content does not match its name")
        return plain

    def seal(self, chunk_id: bytes, plain: bytes | bytearray | memoryview, /, *, compress: bool = True) -> bytes:
        """A frame that ``unseal`` turns back, given the same id."""
        codec, payload = _RAW, plain
        if compress:
            packed = self._compressor().compress(plain, zstd.ZstdCompressor.FLUSH_FRAME)
            if len(packed) < len(plain) - len(plain) // 32:  # a saving under 3 % is not worth decoding for ever
                codec, payload = _ZSTD, packed
        head = _HEAD.pack(codec, 0, 0, len(plain))
        if self._cipher is None:
            return b"".join((head, payload))
        nonce = os.urandom(_NONCE)
        return b"".join((head, nonce, self._cipher.encrypt(chunk_id, nonce, payload, head)))

    def unseal(self, chunk_id: bytes, frame: bytes | memoryview, /) -> bytes:
        """The plaintext, proven to be the one that ``chunk_id`` names.  Raises CorruptChunk."""
        plain = self.open(chunk_id, frame)
        if blake3(plain, key=self._keys.ids).digest() != chunk_id:
            raise CorruptChunk(chunk_id, "its content does not match its id")
        return plain

    def open(self, chunk_id: bytes, frame: bytes | memoryview, /) -> bytes:
        """Decrypt and decompress, without comparing the plaintext with the id; its length is right."""
        codec, length, payload = self._payload(chunk_id, frame)
        if codec == _RAW:
            plain = bytes(payload)
        else:
            try:
                plain = zstd.ZstdDecompressor().decompress(payload, max_length=length + 1)
            except zstd.ZstdError as error:
                if lacks_memory(error):
                    raise MemoryError from error
                raise CorruptChunk(chunk_id, f"it cannot be decompressed ({error})") from error
        if len(plain) != length:
            raise CorruptChunk(chunk_id, f"it should have {length} bytes and has {len(plain)}")
        return plain

    def authenticate(self, chunk_id: bytes, frame: bytes | memoryview, /) -> None:
        """Prove stored bytes by their tag, without decompressing; plain images have none.  Raises CorruptChunk."""
        self._payload(chunk_id, frame)

    def _payload(self, chunk_id: bytes, frame: bytes | memoryview) -> tuple[int, int, bytes | memoryview]:
        if len(frame) < self.overhead:
            raise CorruptChunk(chunk_id, "its frame is cut short")
        codec, flags, reserved, length = _HEAD.unpack_from(frame)
        if codec > _ZSTD or flags or reserved or length > MAX_PLAIN:
            raise CorruptChunk(chunk_id, "its frame has an impossible head")
        view = memoryview(frame)
        if self._cipher is None:
            return codec, length, view[FRAME_HEAD:]
        nonce, sealed = view[FRAME_HEAD : FRAME_HEAD + _NONCE], view[FRAME_HEAD + _NONCE :]
        return codec, length, self._cipher.decrypt(chunk_id, nonce, sealed, view[:FRAME_HEAD])

    def _compressor(self) -> zstd.ZstdCompressor:
        try:
            compressor: zstd.ZstdCompressor = self._local.compressor
        except AttributeError:
            compressor = self._local.compressor = zstd.ZstdCompressor(level=self._level)
        return compressor


def _cipher(key: bytes) -> Cipher:
    from ferrotype.repository.ciphers import Cipher  # images without encryption do without it

    return Cipher(key)
