"""The encryption of frames: AES-256-GCM, each id under a key of its own.

Imported where a repository is encrypted: others do without the library.
"""

from __future__ import annotations

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ferrotype.errors import CorruptChunk


class Cipher:
    """Encrypts and decrypts under one repository's data key.  Safe to share between threads."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def encrypt(
        self, chunk_id: bytes, nonce: bytes, payload: bytes | bytearray | memoryview, head: bytes | memoryview
    ) -> bytes:
        """The payload encrypted, and behind it a tag over it and ``head``."""
        return self._of(chunk_id).encrypt(nonce, payload, head)

    def decrypt(self, chunk_id: bytes, nonce: memoryview, sealed: memoryview, head: memoryview) -> bytes:
        """What ``encrypt`` was given.  Raises CorruptChunk."""
        try:
            return self._of(chunk_id).decrypt(nonce, sealed, head)
        except InvalidTag:
            raise CorruptChunk(chunk_id, "its authentication tag is wrong") from None

    def _of(self, chunk_id: bytes) -> AESGCM:
        return AESGCM(blake3(chunk_id, key=self._key).digest())
