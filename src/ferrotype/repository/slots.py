"""The key slots of a stored repository: read, tried, added, removed.

A slot that is added or removed changes the spare copies, too: they hold all that opens an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from ferrotype.errors import InvalidImage, KeyRefused, UsageError
from ferrotype.objects import ObjectStore, SpaceReport
from ferrotype.repository import keys
from ferrotype.repository.config import Config, decode_config
from ferrotype.repository.keys import Cost, KeySlot, Secret, decode_slot, encode_slot, lock, unlock
from ferrotype.repository.spare import KEYS, bring_forward, read_heads, renew

_TOGETHER: Final = (
    "the key slots stand near the end of the image, as their spare copies do, since the image is being read, cannot "
    "be read, or has no room: the next `ferrotype backup` or `prune` sets them apart"
)
LOST: Final = (
    "the image is encrypted, and all of its key slots are lost, the spare copies of them too: it was cut short or "
    "damaged; look for another copy of it, or let `ferrotype salvage` look for a key slot everywhere"
)
NOT_ENCRYPTED: Final = (
    "a passphrase or key file was given, and the image is not encrypted: it may not be the one you mean; if it is, "
    "give none (nor FERROTYPE_PASSWORD)"
)
Warn = Callable[[str], None]


def read_slots(store: ObjectStore) -> list[KeySlot]:
    """The readable key slots, oldest first.  Raises where there are some and none can be read."""
    return decoded_slots(read_heads(store).slots)


def decoded_slots(payloads: Mapping[str, bytes]) -> list[KeySlot]:
    """Those that can be read, by their names, oldest first.  Raises where there are some and none can be read."""
    found, damaged = [], None
    for name, data in payloads.items():
        try:
            slot = decode_slot(data)
            if KEYS + slot.id != name:  # a copy that would stay where the slot is removed
                raise InvalidImage(f"the object {name} holds key slot {slot.id}, whose name it does not have")
            found.append(slot)
        except InvalidImage as error:
            damaged = error
    if damaged is not None and not found:
        raise InvalidImage(f"{LOST} ({damaged})")
    return sorted(found, key=lambda slot: (slot.created, slot.id))


def listed_slots(store: ObjectStore, warn: Warn) -> list[KeySlot]:
    """The readable key slots, oldest first; none where the image is not encrypted.

    Raises InvalidImage where it is, or where nothing tells, and there is none.
    """
    heads = read_heads(store, warn)
    if not heads.slots and decode_config(heads.config).encrypted:
        raise InvalidImage(LOST)
    return decoded_slots(heads.slots)


def master_key(config: Config, payloads: Mapping[str, bytes], secret: Secret | None) -> bytes:
    """What unlocks the repository.

    Raises KeyRefused where ``secret`` is missing, wrong, or given for a repository that is not encrypted;
    InvalidImage where there is nothing that it could unlock.
    """
    if config.encrypted:
        if not payloads:
            raise InvalidImage(LOST)
        if secret is None:
            raise KeyRefused("the image is encrypted: give its passphrase or key file")
        return unlock(decoded_slots(payloads), secret, config.id)[0]
    if secret is not None:
        raise KeyRefused(NOT_ENCRYPTED)
    return config.clear_master


def put_slot(store: ObjectStore, master: bytes, secret: Secret, image: str, label: str, cost: Cost | None) -> KeySlot:
    """One more slot, which is durable and copied once the caller sees to it."""
    slot = lock(master, secret, image, label, cost)
    store.put(KEYS + slot.id, [encode_slot(slot)])
    return slot


def add_slot(
    store: ObjectStore, master: bytes, secret: Secret, image: str, label: str, cost: Cost | None, warn: Warn
) -> KeySlot:
    """One more slot, durable, its copies far apart.  Raises UsageError where there are as many as can be tried."""
    if sum(slot.cost.work for slot in read_slots(store)) + (cost or Cost()).work > keys.MAX_TRIED:
        raise UsageError("the image has as many key slots as can be tried; remove one with `ferrotype key remove`")
    slot = put_slot(store, master, secret, image, label, cost)
    renew(store)
    store.flush()
    _set_apart(store, warn)
    return slot


def _set_apart(store: ObjectStore, warn: Warn) -> None:
    if not bring_forward(store):
        warn(_TOGETHER)


def remove_slot(store: ObjectStore, slot_id: str, warn: Warn) -> tuple[KeySlot, SpaceReport]:
    """Remove a slot by its id or a unique prefix, and overwrite it where nobody reads the store.

    The last one stays.  Raises UsageError.
    """
    heads = read_heads(store)
    known = decoded_slots(heads.slots)
    chosen = [slot for slot in known if slot.id.startswith(slot_id)]
    if len(chosen) != 1:
        raise UsageError(
            f"{'no' if not chosen else 'more than one'} key slot starts with {slot_id!r}; "
            "`ferrotype key list` shows them"
        )
    if len(known) == 1:
        raise UsageError("this is the last key slot; without it nobody could open the image again")
    name = KEYS + chosen[0].id
    renew(store, heads, without=name)  # the spare copies there are hold it, too
    if any(info.name == name for info in store.list(name)):
        store.delete(name)
    store.flush()
    _set_apart(store, warn)  # also in images where they are not yet
    return chosen[0], store.reclaim()
