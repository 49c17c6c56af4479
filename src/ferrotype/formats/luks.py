"""LUKS, version 1: a disk encrypted with a key that a passphrase opens.

    byte 0      header: cipher, mode, hash, digest of the key, 8 key slots
    elsewhere   key material of each slot: the key, split into ``stripes`` parts and encrypted with its passphrase
    the data    sectors of 512 bytes, each encrypted by itself; its number makes the start (IV or tweak)

Written from "LUKS On-Disk Format Specification", version 1.2.3; section numbers are cited.  AES in one block mode
(ECB) does all the work, over a whole range at once; the modes are a few exclusive ors around it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Annotated, Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from ferrotype.block import Source, Traits, read_exactly
from ferrotype.block.file import check_read
from ferrotype.errors import InvalidImage, KeyRefused, UnsupportedError
from ferrotype.extents import ExtentMap
from ferrotype.records import Record, record, u16, u32
from ferrotype.units import MiB

__all__ = ["Decrypted", "Decryptor", "Phdr", "read_phdr", "unlock"]

SECTOR: Final = 512  # bytes
_KEY_ACTIVE: Final = 0x00AC71F3
_MOST_ITERATIONS: Final = 10_000_000  # of PBKDF2, some ten seconds; what is made in two has a few millions
_MOST_MATERIAL: Final = 4 * MiB  # bytes of one key slot; 4000 stripes of 64 bytes are usual
_SLOTS: Final = 8
_STEP: Final = MiB  # bytes decrypted in one go, for the memory's sake

Blocks = NDArray[np.uint64]  # two words a row
Decryptor = Callable[[int, bytes], bytes]
"""(number of the first sector, whole sectors) -> what they hold."""


@record(endian=">", size=208)
class Phdr(Record):
    """Section 3.1, up to the key slots."""

    magic: Annotated[bytes, "6s"]
    version: u16
    cipher_name: Annotated[bytes, "32s"]
    cipher_mode: Annotated[bytes, "32s"]
    hash_spec: Annotated[bytes, "32s"]
    payload_offset: u32  # sectors
    key_bytes: u32
    mk_digest: Annotated[bytes, "20s"]
    mk_digest_salt: Annotated[bytes, "32s"]
    mk_digest_iter: u32
    uuid: Annotated[bytes, "40s"]

    @property
    def cipher(self) -> str:
        """As it is usually written: aes-xts-plain64."""
        return f"{_text(self.cipher_name)}-{_text(self.cipher_mode)}"

    @property
    def hash(self) -> str:
        return _text(self.hash_spec)


@record(endian=">", size=48)
class KeySlot(Record):
    """Section 3.1, "key slot"."""

    active: u32
    iterations: u32
    salt: Annotated[bytes, "32s"]
    key_material_offset: u32  # sectors
    stripes: u32


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("ascii", "replace")


def read_phdr(header: Source) -> Phdr:
    """The header, checked.  ``header`` starts with it.  Raises InvalidImage and UnsupportedError."""
    phdr = Phdr.unpack(read_exactly(header, 0, Phdr.SIZE, "the LUKS header"))
    if phdr.magic != b"LUKS\xba\xbe":
        raise InvalidImage("there is no LUKS header where it should be", offset=0, field="magic")
    if phdr.version != 1:
        raise UnsupportedError(f"LUKS version {phdr.version}", field="version")
    if phdr.hash not in ("sha1", "sha256", "sha512"):
        raise UnsupportedError(f"the hash {phdr.hash!r} of LUKS", field="hash-spec")
    if phdr.key_bytes not in (16, 24, 32, 48, 64):
        raise InvalidImage(f"a key of {phdr.key_bytes} bytes", field="key-bytes")
    _decryptor(phdr, bytes(phdr.key_bytes))
    return phdr


def unlock(header: Source, passphrase: bytes | None) -> Decryptor:
    """What decrypts the data's sectors.  Raises KeyRefused where no key slot opens with the passphrase."""
    phdr = read_phdr(header)
    if passphrase is None:
        raise KeyRefused("the image is encrypted (LUKS); give its passphrase")
    _check_iterations(phdr.mk_digest_iter, "mk-digest-iterations")
    for number in range(_SLOTS):
        at = Phdr.SIZE + number * KeySlot.SIZE
        slot = KeySlot.unpack(read_exactly(header, at, KeySlot.SIZE, "a LUKS key slot"))
        if slot.active != _KEY_ACTIVE:
            continue
        key = _try_slot(header, phdr, slot, passphrase)
        digest = hashlib.pbkdf2_hmac(phdr.hash, key, phdr.mk_digest_salt, phdr.mk_digest_iter, 20)
        if hmac.compare_digest(digest, phdr.mk_digest):
            return _decryptor(phdr, key)
    raise KeyRefused("the passphrase opens no key slot of the encrypted image (LUKS)")


def _check_iterations(count: int, field: str) -> None:
    if not 0 < count <= _MOST_ITERATIONS:
        raise InvalidImage(f"{count} iterations to make a key", field=field)


def _try_slot(header: Source, phdr: Phdr, slot: KeySlot, passphrase: bytes) -> bytes:
    """The key that a slot gives: the right one, if the passphrase is (section 4.2)."""
    _check_iterations(slot.iterations, "iterations")
    size = phdr.key_bytes * slot.stripes
    if not 0 < size <= _MOST_MATERIAL:
        raise InvalidImage(f"{slot.stripes} stripes of a key", field="stripes")
    padded = -(-size // SECTOR) * SECTOR
    material = read_exactly(header, slot.key_material_offset * SECTOR, padded, "the material of a LUKS key slot")
    own = hashlib.pbkdf2_hmac(phdr.hash, passphrase, slot.salt, slot.iterations, phdr.key_bytes)
    return _merge(_decryptor(phdr, own)(0, material)[:size], phdr)


def _merge(split: bytes, phdr: Phdr) -> bytes:
    """Section 2.4: the stripes joined, each but the last diffused."""
    size = phdr.key_bytes
    merged = bytes(size)
    for at in range(0, len(split), size):
        merged = _xor(merged, split[at : at + size])
        if at + size < len(split):
            merged = _diffuse(merged, phdr.hash)
    return merged


def _diffuse(data: bytes, name: str) -> bytes:
    size = hashlib.new(name).digest_size
    parts = []
    for number, at in enumerate(range(0, len(data), size)):
        part = data[at : at + size]
        parts.append(hashlib.new(name, number.to_bytes(4, "big") + part).digest()[: len(part)])
    return b"".join(parts)


def _xor(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).to_bytes(len(a), "big")


# ---------------------------------------------------------------------- sectors


def _decryptor(phdr: Phdr, key: bytes) -> Decryptor:
    """Raises UnsupportedError where the cipher is another than AES, or its mode is not known."""
    mode, _, start = _text(phdr.cipher_mode).partition("-")
    if _text(phdr.cipher_name) != "aes":
        raise UnsupportedError(f"the cipher {phdr.cipher} of LUKS", field="cipher-name")
    try:
        if mode == "xts" and start in ("plain", "plain64"):
            return _Xts(key, narrow=start == "plain")
        if mode == "cbc":
            return _Cbc(key, start)
    except ValueError:  # a key of a length that AES does not have
        raise InvalidImage(f"{phdr.cipher} with a key of {len(key)} bytes", field="key-bytes") from None
    raise UnsupportedError(f"the cipher {phdr.cipher} of LUKS", field="cipher-mode")


class _Aes:
    """AES by single blocks, many of them at once."""

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.ECB())  # noqa: S305  the modes are made of it, see above

    def encrypt(self, blocks: Blocks) -> Blocks:
        return np.frombuffer(self._cipher.encryptor().update(blocks.tobytes()), np.uint64).reshape(-1, 2)

    def decrypt(self, blocks: Blocks) -> Blocks:
        return np.frombuffer(self._cipher.decryptor().update(blocks.tobytes()), np.uint64).reshape(-1, 2)


def _numbers(first: int, count: int, *, narrow: bool) -> Blocks:
    """Sector numbers as blocks, little-endian; ``narrow``: of 32 bits, and then again from 0."""
    blocks = np.zeros((count, 2), "<u8")
    blocks[:, 0] = np.arange(first, first + count, dtype=np.uint64)
    if narrow:
        blocks[:, 0] &= np.uint64(0xFFFFFFFF)
    return blocks


class _Xts:
    """IEEE 1619: block j of a sector lies between two exclusive ors with its number, encrypted, times x to the j."""

    def __init__(self, key: bytes, *, narrow: bool) -> None:
        self._data, self._tweak = _Aes(key[: len(key) // 2]), _Aes(key[len(key) // 2 :])
        self._narrow = narrow

    def __call__(self, first: int, sectors: bytes) -> bytes:
        count = len(sectors) // SECTOR
        tweaks = np.empty((count, SECTOR // 16, 2), np.uint64)
        tweaks[:, 0] = self._tweak.encrypt(_numbers(first, count, narrow=self._narrow))
        one, top = np.uint64(1), np.uint64(63)
        for j in range(1, SECTOR // 16):  # times x in GF(2^128): one bit further, 0x87 for the one that falls out
            low, high = tweaks[:, j - 1, 0], tweaks[:, j - 1, 1]
            tweaks[:, j, 0] = (low << one) ^ ((high >> top) * np.uint64(0x87))
            tweaks[:, j, 1] = (high << one) | (low >> top)
        flat = tweaks.reshape(-1, 2)
        blocks = np.frombuffer(sectors, np.uint64).reshape(-1, 2)
        return (self._data.decrypt(blocks ^ flat) ^ flat).tobytes()


class _Cbc:
    """Each block is mixed with the stored one before it, the first with an IV made of the sector's number."""

    def __init__(self, key: bytes, start: str) -> None:
        self._data = _Aes(key)
        self._salted: _Aes | None = None
        self._narrow = start == "plain"
        maker, _, name = start.partition(":")
        if maker == "essiv" and name in ("sha1", "sha256", "sha512"):
            self._salted = _Aes(hashlib.new(name, key).digest())
        elif start not in ("plain", "plain64"):
            raise UnsupportedError(f"the start {start!r} of LUKS sectors", field="cipher-mode")

    def __call__(self, first: int, sectors: bytes) -> bytes:
        count = len(sectors) // SECTOR
        starts = _numbers(first, count, narrow=self._narrow)
        if self._salted is not None:
            starts = self._salted.encrypt(starts)
        stored = np.frombuffer(sectors, np.uint64).reshape(count, -1, 2)
        before = np.empty_like(stored)
        before[:, 0], before[:, 1:] = starts, stored[:, :-1]
        return (self._data.decrypt(stored.reshape(-1, 2)) ^ before.reshape(-1, 2)).tobytes()


class Decrypted:
    """A source of whole sectors, decrypted: sector n stands at 512 n.  It owns nothing."""

    def __init__(self, file: Source, decrypt: Decryptor) -> None:
        self._file, self._decrypt = file, decrypt
        self.traits = Traits(parallel=file.traits.parallel)

    @property
    def size(self) -> int:
        return self._file.size

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        check_read("encrypted disk", self.size, offset, len(buf))
        end = offset + len(buf)
        for at in range(offset - offset % SECTOR, end, _STEP):
            stop = min(-(-min(at + _STEP, end) // SECTOR) * SECTOR, self.size)
            stored = bytearray(-(-(stop - at) // SECTOR) * SECTOR)  # what a last sector lacks is zeros
            self._file.read_into(at, memoryview(stored)[: stop - at])
            plain = memoryview(self._decrypt(at // SECTOR, bytes(stored)))
            low, high = max(at, offset), min(at + _STEP, end)
            buf[low - offset : high - offset] = plain[low - at : high - at]

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        """Nothing is known: a hole of the file is not zeros here."""
        check_read("encrypted disk", self.size, offset, length)
        return ExtentMap.uniform(offset, length)

    def close(self) -> None:
        """Nothing: whoever made it closes the file."""
