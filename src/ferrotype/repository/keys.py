"""Key slots: each holds the master key, locked with one passphrase or key file.

A slot is the object ``key/<id>``, JSON in the clear except for the locked master key:

    secret --Argon2id(salt, memory, passes, lanes)--> AES-256-GCM key --unlocks--> master key

Slots are added and removed without touching any data.  The cost parameters stand in the slot, so that they can grow
with the machines; a reader refuses absurd ones, since they come from the file.
"""

from __future__ import annotations

import os
from base64 import b64decode, b64encode
from datetime import UTC, datetime
from typing import Annotated, Final, Literal

import msgspec

from ferrotype.errors import InvalidImage, KeyRefused, UnsupportedError
from ferrotype.units import GiB, KiB, MiB

MASTER_SIZE: Final = 32
_MAX_MEMORY: Final = 256 * MiB // KiB  # KiB: what a slot may ask of this machine, which did not choose it
_MAX_WORK: Final = 2 * GiB // KiB  # KiB times passes: some seconds
MAX_TRIED: Final = 32 * GiB // KiB  # KiB times passes over all slots that are tried: 170 of the usual ones


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of Argon2id: memory in KiB, passes over it, lanes."""

    memory: int = 64 * 1024
    passes: int = 3
    lanes: int = 4

    @property
    def work(self) -> int:
        """KiB that are gone over: what trying a slot takes."""
        return self.memory * self.passes


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


def lock(master: bytes, secret: Secret, label: str = "", cost: Cost | None = None) -> KeySlot:
    """A new slot that ``unlock`` opens with the same secret."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    cost = cost or Cost()
    slot_id, salt, nonce = os.urandom(8).hex(), os.urandom(16), os.urandom(12)
    locked = AESGCM(_derive(secret, salt, cost)).encrypt(nonce, master, _bound(slot_id, cost))
    created = datetime.now(UTC)  # to the microsecond: slots are listed in the order they were added
    return KeySlot(slot_id, secret.kind, created, label, cost, _text(salt), _text(nonce), _text(locked))


def unlock(slots: list[KeySlot], secret: Secret) -> tuple[bytes, KeySlot]:
    """The master key, and the slot that gave it.  Raises KeyRefused where no slot opens.

    A damaged slot does not stand in the way of another one.  The work for all of them together is bounded.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    damaged: InvalidImage | None = None
    work = 0
    for slot in slots:
        if slot.kind != secret.kind:
            continue
        work += slot.cost.work
        if work > MAX_TRIED:
            raise KeyRefused("none of the key slots tried so far opens, and the image has more than can be tried")
        try:
            salt, nonce, locked = (b64decode(field, validate=True) for field in (slot.salt, slot.nonce, slot.locked))
            return AESGCM(_derive(secret, salt, slot.cost)).decrypt(nonce, locked, _bound(slot.id, slot.cost)), slot
        except InvalidTag:
            continue
        except ValueError as error:
            damaged = InvalidImage(f"key slot {slot.id} is damaged: {error}")
    if damaged is not None:
        raise damaged
    what = "passphrase" if secret.kind == "passphrase" else "key file"
    raise KeyRefused(f"the {what} opens none of the image's key slots")


def encode_slot(slot: KeySlot) -> bytes:
    return msgspec.json.encode(slot)


def decode_slot(data: bytes) -> KeySlot:
    """Raises InvalidImage for anything but a key slot with bearable costs."""
    try:
        slot = msgspec.json.decode(data, type=KeySlot)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidImage(f"a key slot is damaged: {error}") from error
    if slot.version != 1:
        raise UnsupportedError(f"key slot {slot.id} is of version {slot.version}; use a newer ferrotype")
    cost = slot.cost
    if not (
        1 <= cost.lanes <= 64
        and 8 * cost.lanes <= cost.memory <= _MAX_MEMORY
        and 1 <= cost.passes <= _MAX_WORK // cost.memory
    ):
        raise InvalidImage(f"key slot {slot.id} asks for impossible costs")
    return slot


def _derive(secret: Secret, salt: bytes, cost: Cost) -> bytes:
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    kdf = Argon2id(salt=salt, length=32, iterations=cost.passes, lanes=cost.lanes, memory_cost=cost.memory)
    return kdf.derive(secret.value)


def _bound(slot_id: str, cost: Cost) -> bytes:
    return f"ferrotype key slot v1 {slot_id} {cost.memory} {cost.passes} {cost.lanes}".encode()


def _text(data: bytes) -> str:
    return b64encode(data).decode("ascii")
