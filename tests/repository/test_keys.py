"""Key slots: what they bind, what they cost at least, and that each opens under one key alone."""

from __future__ import annotations

import os
from base64 import b64decode, b64encode
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ferrotype.errors import FormatError, InvalidImage, KeyRefused, UsageError
from ferrotype.objects.memory import MemoryStore
from ferrotype.repository import keys
from ferrotype.repository.keys import Cost, KeySlot, Secret, decode_slot, encode_slot, lock, unlock
from ferrotype.repository.slots import read_slots
from ferrotype.repository.store import Repository
from tests.repository.small import LEAST, QUICK, SECRET, create
from tests.second_reader import load

IMAGE, OTHER = "0" * 32, "f" * 32
MASTER = bytes(range(32))


def new(label: str = "first", secret: Secret = SECRET) -> KeySlot:
    return lock(MASTER, secret, IMAGE, label, QUICK)


def again(slot: KeySlot, **changes: Any) -> KeySlot:
    """The slot with some fields changed, as it is read from an image."""
    return decode_slot(encode_slot(msgspec.structs.replace(slot, **changes)))


def second_reader(slot: KeySlot, secret: Secret = SECRET, image: str = IMAGE) -> bytes:
    """What the tool unlocks.  Raises Damaged."""
    fields = msgspec.json.decode(encode_slot(slot))
    master: bytes = load().unlock([(f"key/{slot.id}", fields)], secret.value, secret.kind, image)
    return master


def refused(slot: KeySlot, secret: Secret = SECRET, image: str = IMAGE) -> None:
    with pytest.raises((InvalidImage, KeyRefused)):
        unlock([slot], secret, image)
    with pytest.raises(load().Damaged):
        second_reader(slot, secret, image)


@pytest.mark.parametrize("label", ["", "first", "with spaces  and ünïcode", "line\nfeed"])
def test_a_slot_opens_as_it_was_made(label: str) -> None:
    slot = again(new(label))
    assert unlock([slot], SECRET, IMAGE)[0] == MASTER == second_reader(slot)
    refused(slot, Secret(b"wrong"))


@pytest.mark.parametrize(
    "changes",
    [
        {"label": "office"},
        {"label": ""},
        {"kind": "keyfile"},
        {"created": datetime(2026, 1, 1, tzinfo=UTC)},
        {"id": "0123456789abcdef"},
        {"image": OTHER},
        {"cost": Cost(memory=128, passes=1, lanes=1)},
        {"cost": Cost(memory=64, passes=2, lanes=1)},
        {"salt": b64encode(bytes(16)).decode()},
        {"nonce": b64encode(bytes(12)).decode()},
        {"locked": b64encode(bytes(48)).decode()},
        {"commitment": b64encode(bytes(32)).decode()},
    ],
)
def test_no_field_of_a_slot_can_be_changed(changes: dict[str, Any]) -> None:
    slot = again(new(), **changes)
    secret = Secret(SECRET.value, slot.kind)
    refused(slot, secret, IMAGE)
    refused(slot, secret, slot.image)


def test_a_slot_opens_no_other_image() -> None:
    """Though both have one master key."""
    one, other = MemoryStore(), MemoryStore()
    create(one, SECRET).close()
    create(other, SECRET).close()
    (name,) = (info.name for info in one.list("key/"))
    (own,) = (info.name for info in other.list("key/"))
    other.delete(own)
    other.put(name, [one.get(name)])
    with pytest.raises(InvalidImage, match="another image"):
        Repository.open(other, SECRET)


def test_a_slot_under_another_name_counts_for_nothing() -> None:
    """It would stay where the slot is removed."""
    store = MemoryStore()
    with create(store, SECRET) as repository:
        (slot,) = read_slots(store)
        repository.add_key(Secret(b"second"), cost=QUICK)
        store.put("key/00000000000000ff", [store.get(f"key/{slot.id}")])
        repository.remove_key(slot.id)
    with pytest.raises(KeyRefused):
        Repository.open(store, SECRET)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["salt", "nonce", "locked", "commitment"])
def test_every_field_has_one_length(name: str, version: int) -> None:
    slot = new() if version == 2 else before()
    value = b64decode(getattr(slot, name))
    for other in (value[:-1], value + b"\0", b"") if value else (b"\0",):
        with pytest.raises(InvalidImage, match=name):
            again(slot, **{name: b64encode(other).decode()})
    for word in ("", "0", "g" * 16, "0" * 17):
        with pytest.raises(InvalidImage):
            again(slot, id=word)
    if version == 2:
        with pytest.raises(InvalidImage):
            again(slot, image="../..")
        with pytest.raises(InvalidImage):
            again(slot, label="x" * 2000)
    with pytest.raises(UsageError, match="label"):
        new("x" * 2000)


def test_a_slot_that_costs_too_little_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weak = new()
    monkeypatch.setattr(keys, "LEAST", LEAST)
    with pytest.raises(InvalidImage, match="can be guessed"):
        again(weak)
    for cost in (QUICK, Cost(memory=LEAST.memory, passes=1), Cost(memory=LEAST.memory // 2, passes=100)):
        with pytest.raises(UsageError, match="cost"):
            lock(MASTER, SECRET, IMAGE, "", cost)
    for enough in (None, LEAST):
        decode_slot(encode_slot(lock(MASTER, SECRET, IMAGE, "", enough)))
    with pytest.raises(InvalidImage, match="costs"):
        again(before(), cost=Cost(memory=32, passes=1, lanes=1))


# ---------------------------------------------------------------------- slots of version 1


def before(secret: Secret = SECRET) -> KeySlot:
    """As they were made."""
    salt, nonce = os.urandom(16), os.urandom(12)
    key = keys._derive(secret, salt, QUICK)
    locked = AESGCM(key).encrypt(nonce, MASTER, b"ferrotype key slot v1 0123456789abcdef 64 1 1")
    one, two, three = (b64encode(value).decode() for value in (salt, nonce, locked))
    return KeySlot("0123456789abcdef", "passphrase", datetime.now(UTC), "old", QUICK, one, two, three)


def test_a_slot_of_version_1_opens() -> None:
    slot = again(before())
    assert unlock([slot], SECRET, IMAGE)[0] == MASTER == second_reader(slot)
    refused(slot, Secret(b"wrong"))
    with pytest.raises(FormatError, match="newer"):
        again(slot, version=3)


# ---------------------------------------------------------------------- one ciphertext, two keys


def times(x: int, y: int) -> int:
    """The product in the field of GCM (NIST SP 800-38D, 6.3)."""
    product = 0
    for bit in range(127, -1, -1):
        if y >> bit & 1:
            product ^= x
        x = x >> 1 ^ (0xE1 << 120 if x & 1 else 0)
    return product


def inverse(x: int) -> int:
    result, exponent = 1 << 127, (1 << 128) - 2
    while exponent:
        if exponent & 1:
            result = times(result, x)
        x, exponent = times(x, x), exponent >> 1
    return result


def opens_twice(one: bytes, two: bytes, nonce: bytes, bound: bytes) -> bytes:
    """32 bytes of ciphertext and a tag that AES-GCM takes under both keys.

    The tag is E(J0) + GHASH, and GHASH is linear in each block: with the first block of the ciphertext chosen, the
    second is solved for.
    """
    blocks = [bound[at : at + 16].ljust(16, b"\0") for at in range(0, len(bound), 16)]
    lengths = (8 * len(bound)).to_bytes(8) + (8 * 32).to_bytes(8)
    known, slopes = [], []
    for key in (one, two):
        encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305  one block
        h, mask = (int.from_bytes(encryptor.update(b)) for b in (bytes(16), nonce + b"\0\0\0\1"))
        y = 0
        for block in (*blocks, bytes(16), bytes(16)):  # the ciphertext as zeros
            y = times(y ^ int.from_bytes(block), h)
        known.append(times(y ^ int.from_bytes(lengths), h) ^ mask)
        slopes.append(times(h, h))
    second = times(known[0] ^ known[1], inverse(slopes[0] ^ slopes[1]))
    tag = known[0] ^ times(second, slopes[0])
    return bytes(16) + second.to_bytes(16) + tag.to_bytes(16)


def test_a_ciphertext_that_opens_under_two_keys_is_refused() -> None:
    secrets = SECRET, Secret(b"another one")
    slot = new()
    nonce, bound = b64decode(slot.nonce), keys._bound(slot)
    slot_keys = [keys._derive(secret, b64decode(slot.salt), slot.cost) for secret in secrets]
    one, two = (keys._subkey(key, "encryption") for key in slot_keys)
    locked = opens_twice(one, two, nonce, bound)
    assert AESGCM(one).decrypt(nonce, locked, bound) != AESGCM(two).decrypt(nonce, locked, bound)
    with pytest.raises(InvalidTag):
        AESGCM(bytes(32)).decrypt(nonce, locked, bound)
    crafted = again(slot, locked=b64encode(locked).decode())
    unlock([crafted], secrets[0], IMAGE)  # the commitment is to this one
    refused(crafted, secrets[1])
