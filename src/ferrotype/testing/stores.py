"""What every ObjectStore must do, as a function a test calls.

    def test_my_store(tmp_path) -> None:
        check_store(lambda: MyStore.create(tmp_path / "new"), lambda: MyStore.open(tmp_path / "new"))

A failed check raises AssertionError; the same ``seed`` does the same things.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from ferrotype.errors import CorruptObject, ObjectExists, ObjectMissing
from ferrotype.objects import ObjectInfo, ObjectStore
from ferrotype.testing.claims import must_raise, require

__all__ = ["check_store"]

_KINDS = ("pack", "index", "snapshot", "key")


def check_store(
    create: Callable[[], ObjectStore],
    reopen: Callable[[], ObjectStore] | None = None,
    *,
    rounds: int = 120,
    seed: int = 0,
) -> None:
    """Hold a store against a dict: put, get, list, delete, reclaim, and what an opening finds after a flush.

    ``create`` gives an empty store, ``reopen`` the same one again after ``close``; None where it does not last.
    """
    rng = random.Random(seed)  # noqa: S311  repeatable
    store = create()
    try:
        _check_names(store)
        model: dict[str, bytes] = {}
        for _ in range(rounds):
            _one_step(store, model, rng)
            if reopen is not None and rng.random() < 0.1:
                store.flush()
                store.close()
                store = reopen()
            _check_same(store, model, rng)
        _check_undone(store)
        store.flush()
        if reopen is not None:
            store.close()
            store = reopen()
            _check_same(store, model, rng)
    finally:
        store.close()


def _check_names(store: ObjectStore) -> None:
    require(list(store.list("")) == [], "a new store is not empty")
    for call in (store.get, store.size, store.delete, store.check):
        must_raise(ObjectMissing, lambda call=call: call("pack/none"), f"{call.__name__} of nothing")  # type: ignore[misc]
    longest = "n" * 48
    store.put(longest, [b"x"])
    must_raise(ObjectExists, lambda: store.put(longest, [b"y"]), "putting a name twice")
    require(store.get(longest) == b"x", "an object was overwritten")
    store.delete(longest)
    must_raise(ObjectMissing, lambda: store.get(longest), "getting a deleted object")


def _one_step(store: ObjectStore, model: dict[str, bytes], rng: random.Random) -> None:
    what = rng.random()
    if model and what < 0.3:
        name = rng.choice(sorted(model))
        store.delete(name)
        del model[name]
    elif what < 0.4:
        store.flush()
    elif what < 0.45:
        report = store.reclaim()
        require(report.freed >= 0 and report.dead >= 0, f"reclaim: {report}")
    else:
        name = f"{rng.choice(_KINDS)}/{rng.randbytes(16).hex()}"
        parts = [rng.randbytes(rng.choice([0, 1, 100, 4096, 50_000])) for _ in range(rng.randrange(4))]
        store.put(name, [memoryview(part) for part in parts])
        model[name] = b"".join(parts)


def _check_same(store: ObjectStore, model: dict[str, bytes], rng: random.Random) -> None:
    expected = [ObjectInfo(name, len(model[name])) for name in sorted(model)]
    require(list(store.list("")) == expected, "the list is not what was put")
    kind = rng.choice(_KINDS) + "/"
    require(list(store.list(kind)) == [i for i in expected if i.name.startswith(kind)], f"the list of {kind}")
    for name in rng.sample(sorted(model), min(4, len(model))):
        data = model[name]
        require(store.size(name) == len(data), f"the size of {name}")
        require(store.get(name) == data, f"the content of {name}")
        start = rng.randint(0, len(data))
        length = rng.randint(0, len(data) - start)
        require(store.get(name, start, length) == data[start : start + length], f"{length} at {start} of {name}")
        require(store.get(name, start) == data[start:], f"{name} from {start} on")
        _check_outside(store, name, len(data))
        store.check(name)


def _check_outside(store: ObjectStore, name: str, size: int) -> None:
    for offset, length in ((0, size + 1), (size, 1), (size + 1, 0), (-1, 1)):
        must_raise(
            CorruptObject,
            lambda offset=offset, length=length: store.get(name, offset, length),  # type: ignore[misc]
            f"{length} at {offset} of the {size} bytes of {name}",
        )


def _check_undone(store: ObjectStore) -> None:
    """What was put and deleted between two flushes must not come back; a listing survives what is done meanwhile."""
    store.flush()
    store.put("pack/undone", [b"x"])
    store.delete("pack/undone")
    store.flush()
    for name in ("pack/a", "pack/b"):
        store.put(name, [b"x"])
    listing = store.list("pack/")
    store.delete("pack/a")
    store.delete("pack/b")
    names = [info.name for info in listing]
    require(names == sorted(names), "a listing is not in order")
