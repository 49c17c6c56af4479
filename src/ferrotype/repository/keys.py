"""Key slots: each holds the master key, locked with one passphrase or key file.

A slot is the object ``key/<id>``, JSON in the clear except for the locked master key:

    secret --Argon2id(salt, memory, passes, lanes)--> slot key --BLAKE3--> commitment, which stands in the slot
                                                               --BLAKE3--> AES-256-GCM key --unlocks--> master key

All else that a slot says (image, id, kind, time, label, costs) is authenticated with the master key.  One ciphertext
of AES-GCM can be made to open under several keys; the commitment allows one.  Slots of version 1 have none, and bind
id and costs alone.

Slots are added and removed without touching any data.  The cost parameters stand in the slot, so that they can grow
with the machines; a reader refuses absurd ones, since they come from the file, and ones that protect nothing.
"""

from __future__ import annotations

import hmac
import os
import re
from base64 import b64decode, b64encode
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
from blake3 import blake3

from ferrotype.errors import InvalidImage, KeyNotKnown, KeyRefused, UnsupportedError, UsageError
from ferrotype.units import GiB, KiB, MiB

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MASTER_SIZE: Final = 32
_MAX_MEMORY: Final = 256 * MiB // KiB  # KiB: what a slot may ask of this machine, which did not choose it
_MAX_WORK: Final = 2 * GiB // KiB  # KiB times passes: some seconds
MAX_TRIED: Final = 32 * GiB // KiB  # KiB times passes over all slots that are tried: 170 of the usual ones
_MAX_LABEL: Final = 1024  # bytes of UTF-8
_VERSION: Final = 2
_SALT, _NONCE, _LOCKED, _COMMITMENT = 16, 12, MASTER_SIZE + 16, 32  # bytes
_ID: Final = re.compile(r"[0-9a-f]{16}")
_IMAGE: Final = re.compile(r"[0-9a-f]{32}")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of Argon2id: memory in KiB, passes over it, lanes."""

    memory: int = 64 * 1024
    passes: int = 3
    lanes: int = 4

    @property
    def work(self) -> int:
        """KiB that are gone over: what trying a slot takes."""
        return self.memory * self.passes

    def below(self, least: Cost) -> bool:
        """Whether trying a secret takes less memory or less work."""
        return self.memory < least.memory or self.work < least.work


LEAST = Cost(memory=16 * 1024, passes=4, lanes=1)  # of new slots: a third of the usual work
_LEAST_BEFORE: Final = Cost(memory=64, passes=1, lanes=1)  # of version 1, whose writers had no bound


class Secret(msgspec.Struct, frozen=True):
    """What a user knows or has: a passphrase's UTF-8 bytes, or a key file's content."""

    value: bytes
    kind: Literal["passphrase", "keyfile"] = "passphrase"

    def __repr__(self) -> str:  # never shown, whatever prints it
        return f"Secret({self.kind})"


class KeySlot(msgspec.Struct, frozen=True):
    """One way to open the image."""

    id: str
    kind: Literal["passphrase", "keyfile"]
    created: Annotated[datetime, msgspec.Meta(tz=True)]
    label: str
    cost: Cost
    salt: str
    nonce: str
    locked: str
    version: int = 1
    image: str = ""  # the id of the configuration it was made for
    commitment: str = ""


def lock(master: bytes, secret: Secret, image: str, label: str = "", cost: Cost | None = None) -> KeySlot:
    """A new slot that ``unlock`` opens with the same secret, in that image alone.  Raises UsageError."""
    cost = cost or Cost()
    if cost.below(LEAST):
        raise UsageError(f"a key slot must cost at least {LEAST.memory} KiB and {LEAST.work} KiB times passes")
    if len(_utf8(label)) > _MAX_LABEL:
        raise UsageError(f"the label of a key slot may have {_MAX_LABEL} bytes; choose a shorter one")
    salt, nonce = os.urandom(_SALT), os.urandom(_NONCE)
    slot_key = _derive(secret, salt, cost)
    slot = KeySlot(
        id=os.urandom(8).hex(),
        kind=secret.kind,
        created=datetime.now(UTC),  # to the microsecond: slots are listed in the order they were added
        label=_utf8(label).decode(),
        cost=cost,
        salt=_text(salt),
        nonce=_text(nonce),
        locked="",
        version=_VERSION,
        image=image,
        commitment=_text(_subkey(slot_key, "commitment")),
    )
    return msgspec.structs.replace(slot, locked=_text(_cipher(slot, slot_key).encrypt(nonce, master, _bound(slot))))


def unlock(slots: list[KeySlot], secret: Secret, image: str) -> tuple[bytes, KeySlot]:
    """The master key of an image, and the slot that gave it.  Raises KeyRefused where no slot opens.

    A damaged slot does not stand in the way of another one.  The work for all of them together is bounded.
    """
    damaged: InvalidImage | None = None
    work = 0
    what = "passphrase" if secret.kind == "passphrase" else "key file"
    mine = [slot for slot in slots if slot.kind == secret.kind]
    if slots and not mine:
        other = "key file" if secret.kind == "passphrase" else "passphrase"
        raise KeyNotKnown(f"a {what} was given, and all key slots of the image are for a {other}")
    for slot in mine:
        if slot.version > 1 and slot.image != image:
            damaged = InvalidImage(f"key slot {slot.id} is that of another image, and does not open this one")
            continue
        work += slot.cost.work
        if work > MAX_TRIED:
            raise KeyRefused("none of the key slots tried so far opens, and the image has more than can be tried")
        try:
            master = _opened(slot, secret)
        except InvalidImage as error:
            damaged = error
            continue
        if master is not None:
            return master, slot
    if damaged is not None:
        raise damaged
    raise KeyNotKnown(f"the {what} opens none of the image's key slots: it is wrong, or that of another image")


def _opened(slot: KeySlot, secret: Secret) -> bytes | None:
    """The master key; None for another slot's secret.  Raises InvalidImage where the slot was changed."""
    from cryptography.exceptions import InvalidTag

    salt, nonce, locked, commitment = _fields(slot)
    slot_key = _derive(secret, salt, slot.cost)
    if slot.version > 1 and not hmac.compare_digest(commitment, _subkey(slot_key, "commitment")):
        return None
    try:
        return _cipher(slot, slot_key).decrypt(nonce, locked, _bound(slot))
    except InvalidTag:
        if slot.version == 1:
            return None
        raise InvalidImage(f"key slot {slot.id} is damaged, or was changed after it was made") from None


def encode_slot(slot: KeySlot) -> bytes:
    return msgspec.json.encode(slot)


def decode_slot(data: bytes) -> KeySlot:
    """Raises InvalidImage for anything but a key slot with bearable costs."""
    try:
        slot = msgspec.json.decode(data, type=KeySlot)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidImage(f"a key slot is damaged: {error}") from error
    if not _ID.fullmatch(slot.id):
        raise InvalidImage("a key slot is damaged: its id is none")
    if slot.version not in (1, _VERSION):
        raise UnsupportedError(f"key slot {slot.id} is of version {slot.version}; use a newer ferrotype")
    if slot.version > 1 and not (_IMAGE.fullmatch(slot.image) and len(slot.label.encode()) <= _MAX_LABEL):
        raise InvalidImage(f"key slot {slot.id} is damaged: its image or label is impossible")
    _fields(slot)
    cost = slot.cost
    if not (
        1 <= cost.lanes <= 64
        and 8 * cost.lanes <= cost.memory <= _MAX_MEMORY
        and 1 <= cost.passes <= _MAX_WORK // cost.memory
    ):
        raise InvalidImage(f"key slot {slot.id} asks for impossible costs")
    if cost.below(LEAST if slot.version > 1 else _LEAST_BEFORE):
        raise InvalidImage(
            f"key slot {slot.id} has costs so low that its secret can be guessed, which ferrotype never writes; "
            "do not trust it"
        )
    return slot


def _fields(slot: KeySlot) -> tuple[bytes, bytes, bytes, bytes]:
    """Salt, nonce, locked key and commitment, each of its one length.  Raises InvalidImage."""
    values = []
    for name, text, length in (
        ("salt", slot.salt, _SALT),
        ("nonce", slot.nonce, _NONCE),
        ("locked", slot.locked, _LOCKED),
        ("commitment", slot.commitment, _COMMITMENT if slot.version > 1 else 0),
    ):
        try:
            value = b64decode(text, validate=True)
        except ValueError as error:
            raise InvalidImage(f"key slot {slot.id} is damaged: {error}") from error
        if len(value) != length:
            raise InvalidImage(f"key slot {slot.id} is damaged: its {name} has {len(value)} bytes, not {length}")
        values.append(value)
    salt, nonce, locked, commitment = values
    return salt, nonce, locked, commitment


def _derive(secret: Secret, salt: bytes, cost: Cost) -> bytes:
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    kdf = Argon2id(salt=salt, length=32, iterations=cost.passes, lanes=cost.lanes, memory_cost=cost.memory)
    return kdf.derive(secret.value)


def _subkey(slot_key: bytes, purpose: str) -> bytes:
    return blake3(slot_key, derive_key_context=f"ferrotype image v1 2026-11 key slot {purpose}").digest()


def _cipher(slot: KeySlot, slot_key: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(slot_key if slot.version == 1 else _subkey(slot_key, "encryption"))


def _bound(slot: KeySlot) -> bytes:
    """What the tag authenticates besides the master key."""
    cost = slot.cost
    text = f"ferrotype key slot v{slot.version} {slot.id} {cost.memory} {cost.passes} {cost.lanes}"
    if slot.version == 1:
        return text.encode()
    created = (slot.created - _EPOCH) // timedelta(microseconds=1)
    return (
        f"{text} {slot.image} {slot.kind} {created} {slot.label}".encode()
    )  # the label is the last: it may hold spaces


def _utf8(text: str) -> bytes:
    """A text as JSON can hold it: what was no text on the command line becomes question marks."""
    return text.encode(errors="replace")


def _text(data: bytes) -> str:
    return b64encode(data).decode("ascii")
