"""Spare copies of what opens an image: without its configuration or its key slots no chunk of it can be read.

    | config | key/... | pack ... pack ... | spare/... | ... pack | spare/... | snapshot |

``config`` and the key slots stand before all packs: those that are put later are moved there.  A spare is an object
that holds the exact bytes of them all; the newest stands in the second half of what is stored, so no one lost region
takes both.  Readers do not need it; they use it where an original is damaged.  Whoever writes next puts the original
again.
"""

from __future__ import annotations

import os
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from ferrotype.errors import CorruptObject, DeviceError, FormatError, InvalidImage, StoreError, WriteError
from ferrotype.objects import ObjectStore
from ferrotype.repository.config import NAME as CONFIG
from ferrotype.repository.config import decode_config
from ferrotype.units import GiB, MiB

PREFIX: Final = "spare/"
KEYS: Final = "key/"
_APART: Final = GiB  # bytes of packs stored behind the newest spare before the next one is due
_LARGEST: Final = 16 * MiB  # bytes of a spare that is believed to be one

_LOST: Final = (CorruptObject, DeviceError, StoreError)


class Spare(msgspec.Struct, frozen=True, kw_only=True):
    """The payload, as JSON in the clear."""

    version: int = 1
    stored: int  # bytes of all packs when it was put
    objects: dict[str, str]  # name -> base64 of its bytes


@dataclass(frozen=True, slots=True)
class Heads:
    """Configuration and key slots of a repository: name -> bytes."""

    objects: dict[str, bytes]
    damaged: dict[str, str] = field(default_factory=dict)  # those whose own object is not whole, and why
    mended: frozenset[str] = frozenset()  # those of them that a spare gave back

    @property
    def config(self) -> bytes:
        """Raises InvalidImage."""
        try:
            return self.objects[CONFIG]
        except KeyError:
            raise InvalidImage(
                "the image holds no configuration and no spare copy of it; `ferrotype salvage` looks everywhere"
            ) from None

    @property
    def slots(self) -> dict[str, bytes]:
        return {name: data for name, data in sorted(self.objects.items()) if name.startswith(KEYS)}


def read_heads(store: ObjectStore, warn: Callable[[str], None] = lambda _: None) -> Heads:
    """Configuration and key slots, each from its own object where that is whole, else from a spare."""
    names = [CONFIG, *(info.name for info in store.list(KEYS))]
    objects: dict[str, bytes] = {}
    damaged: dict[str, str] = {}
    for name in names:
        try:
            if store.size(name) > _LARGEST:
                raise CorruptObject(name, "it is larger than any")
            store.check(name)
            objects[name] = store.get(name)
        except _LOST as error:
            damaged[name] = str(error)
    mended: set[str] = set()
    if damaged or _lacks_slots(objects):
        for spare in _whole(store):
            found = {name: data for name, data in opened(spare).items() if name not in objects}
            mended |= found.keys()
            objects |= found
            if CONFIG in objects and not _lacks_slots(objects) and objects.keys() >= damaged.keys():
                break
    for name, why in damaged.items():
        if name in mended:
            warn(f"{why}; a spare copy of it is used")
            continue
        warn(f"{why}; there is no spare copy of it")
        try:
            objects[name] = store.get(
                name, 0, min(store.size(name), _LARGEST)
            )  # its own layer may still find it good: a key slot has a tag
        except _LOST:
            continue
    return Heads(objects, damaged, frozenset(mended))


def _lacks_slots(objects: dict[str, bytes]) -> bool:
    if any(name.startswith(KEYS) for name in objects):
        return False
    try:
        return CONFIG in objects and decode_config(objects[CONFIG]).encrypted
    except FormatError:
        return False


def _whole(store: ObjectStore) -> list[Spare]:
    """The spares that can be read, newest first: their names ascend."""
    found = []
    for info in sorted(store.list(PREFIX), key=lambda info: info.name, reverse=True):
        try:
            if info.size <= _LARGEST:
                store.check(info.name)
                found.append(decode(store.get(info.name)))
        except (*_LOST, InvalidImage):
            continue
    return found


def decode(data: bytes) -> Spare:
    """Raises InvalidImage."""
    try:
        spare = msgspec.json.decode(data, type=Spare)
        opened(spare)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidImage(f"a spare copy is damaged: {error}") from error
    if spare.version != 1:
        raise InvalidImage(f"a spare copy is of version {spare.version}")
    return spare


def opened(spare: Spare) -> dict[str, bytes]:
    """The objects it holds: only such as it may hold."""
    return {
        name: b64decode(text, validate=True)
        for name, text in spare.objects.items()
        if name == CONFIG or name.startswith(KEYS)
    }


# ---------------------------------------------------------------------- writing


def settle(store: ObjectStore) -> None:
    """Before a commit: put originals that are damaged again, and a spare where one is due; ``flush`` is the caller's.

    One is due where there is none, where it holds other keys than the image, and where as much was stored since as
    there was before, or 1 GiB.
    """
    heads = read_heads(store)
    if heads.mended:
        renew(store, heads)
        return
    newest = next(iter(_whole(store)), None)
    stored = _stored(store)
    if newest is None or opened(newest) != heads.objects or stored - newest.stored > min(newest.stored, _APART):
        _put(store, heads, stored)


def renew(store: ObjectStore, heads: Heads | None = None, *, without: str = "") -> None:
    """One fresh spare in the place of all there are; ``flush`` is the caller's, and makes all of it true at once.

    Damaged originals are put again.  ``without`` names a key slot that goes with this flush: no copy of it stays.
    """
    heads = heads or read_heads(store)
    kept = {name: data for name, data in heads.objects.items() if name != without}
    old = [info.name for info in store.list(PREFIX)]
    for name in heads.mended - {without}:
        if name in heads.damaged and any(info.name == name for info in store.list(name)):
            store.delete(name)
        store.put(name, [kept[name]])
    _put(store, Heads(kept), _stored(store))
    for name in old:
        store.delete(name)


def bring_forward(store: ObjectStore) -> bool:
    """Behind a commit: have the originals stand before all packs, so that no lost region takes them and the spare.

    False where that cannot be done now; the next writer does it.  What was committed before is not in danger.
    """
    from ferrotype.repository.packs import PREFIX as PACKS

    names = [CONFIG, *(info.name for info in store.list(KEYS))]
    try:
        return store.bring_forward(names, PACKS)
    except (DeviceError, WriteError):
        return False


def _put(store: ObjectStore, heads: Heads, stored: int) -> None:
    numbers = [int(info.name.removeprefix(PREFIX)[:8], 16) for info in store.list(PREFIX) if _regular(info.name)]
    name = f"{PREFIX}{max(numbers, default=0) + 1 & 0xFFFFFFFF:08x}{os.urandom(4).hex()}"
    objects = {name: b64encode(data).decode("ascii") for name, data in sorted(heads.objects.items())}
    store.put(name, [msgspec.json.encode(Spare(stored=stored, objects=objects))])


def _regular(name: str) -> bool:
    digits = name.removeprefix(PREFIX)
    return len(digits) == 16 and all(digit in "0123456789abcdef" for digit in digits)


def _stored(store: ObjectStore) -> int:
    from ferrotype.repository.packs import PREFIX as PACKS

    return sum(info.size for info in store.list(PACKS))
