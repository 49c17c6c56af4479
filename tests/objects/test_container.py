"""The one-file object store: conformance, split volumes, locking, reclaiming, compacting, finding it all again."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ferrotype.errors import DeviceError, FerrotypeError, InvalidImage, Locked, UsageError, WriteError
from ferrotype.objects import container as container_module
from ferrotype.objects.container import Container, is_container
from ferrotype.objects.layout import ANCHORS_AT, BLOCK, RECORDS_AT, Anchor, Place, VolumeHeader
from ferrotype.objects.memory import MemoryStore
from ferrotype.testing.faults import Fault, Faults, PowerCut
from ferrotype.testing.stores import check_store
from ferrotype.units import KiB

Model = dict[str, bytes]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "laptop.ferro"


@pytest.fixture
def tiny_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_module, "_LEAST_SPLIT", 64 * KiB)


def content(store: Container) -> Model:
    return {info.name: store.get(info.name) for info in store.list("")}


def read(path: Path) -> Model:
    store = Container.open(path)
    try:
        return content(store)
    finally:
        store.close()


def fill(store: Container, count: int, size: int, seed: int = 0) -> Model:
    rng = random.Random(seed)
    model = {f"pack/{rng.randbytes(8).hex()}": rng.randbytes(rng.randint(1, size)) for _ in range(count)}
    for name, data in model.items():
        store.put(name, [data])
    return model


def damage(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def destroy_anchors(path: Path) -> None:
    damage(path, BLOCK, b"\xff" * 2 * BLOCK)


# ---------------------------------------------------------------------- conformance


def test_memory_store_conforms() -> None:
    check_store(MemoryStore, rounds=60)


@pytest.mark.parametrize("seed", range(3))
def test_container_conforms(image: Path, seed: int) -> None:
    check_store(lambda: Container.create(image), lambda: Container.open(image, writable=True), seed=seed)


def test_split_container_conforms(image: Path, tiny_volumes: None) -> None:
    check_store(
        lambda: Container.create(image, split=192 * KiB), lambda: Container.open(image, writable=True), rounds=80
    )


# ---------------------------------------------------------------------- creating and opening


def test_a_new_image_has_no_name_before_its_first_flush(image: Path) -> None:
    store = Container.create(image)
    store.put("config", [b"x"])
    assert not image.exists()
    store.close()
    assert list(image.parent.iterdir()) == []


def test_an_existing_file_is_never_replaced(image: Path) -> None:
    image.write_bytes(b"precious")
    with pytest.raises(Locked, match="exists already"):
        Container.create(image)
    assert image.read_bytes() == b"precious"


def test_two_creations_of_one_image_do_not_harm_each_other(image: Path) -> None:
    first = Container.create(image)
    first.put("config", [b"first"])
    with pytest.raises(Locked):
        Container.create(image)
    first.flush()
    first.close()
    assert read(image) == {"config": b"first"}


def test_what_a_cut_creation_left_is_used_again(image: Path) -> None:
    image.with_name(f".{image.name}.new").write_bytes(b"left over" * 10_000)
    store = Container.create(image)
    store.put("config", [b"x"])
    store.flush()
    store.close()
    assert read(image) == {"config": b"x"}


def test_something_else_is_not_an_image(image: Path) -> None:
    for junk in (b"", b"short", bytes(100_000), os.urandom(100_000)):
        image.write_bytes(junk)
        assert not is_container(junk[:80])
        with pytest.raises(InvalidImage):
            Container.open(image)


def test_is_container_knows_a_damaged_header(image: Path) -> None:
    head = VolumeHeader.make(os.urandom(16), 0, 0).pack()
    assert is_container(head)
    assert is_container(head[:40] + b"\xff" + head[41:])
    assert is_container(head[:8] + b"\x63" + head[9:])  # a later version
    assert not is_container(b"\0" + head[1:])


def test_a_second_process_is_told_who_writes(image: Path) -> None:
    store = Container.create(image)
    store.put("config", [b"x"])
    store.flush()
    code = (
        "import sys, pathlib\n"
        "from ferrotype.errors import Locked\n"
        "from ferrotype.objects.container import Container\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "assert Container.open(path).get('config') == b'x'\n"
        "try:\n    Container.open(path, writable=True)\n"
        "except Locked as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, image], capture_output=True, text=True, check=True)
    assert f"process {os.getpid()} (" in done.stdout
    store.close()
    again = Container.open(image, writable=True)
    again.close()


# ---------------------------------------------------------------------- split images


def split_image(image: Path) -> Model:
    store = Container.create(image, split=128 * KiB)
    model = fill(store, 30, 40 * KiB)
    store.flush()
    store.close()
    assert image.with_name(f"{image.name}.002").exists()
    return model


def test_split_volumes_stay_under_their_size_and_read_back(image: Path, tiny_volumes: None) -> None:
    model = split_image(image)
    assert all(path.stat().st_size <= 128 * KiB for path in image.parent.iterdir())
    assert read(image) == model


@pytest.mark.parametrize("missing", [1, 2, -1])
@pytest.mark.parametrize("writable", [False, True])
def test_a_missing_volume_is_named_and_nothing_is_changed(
    image: Path, tiny_volumes: None, missing: int, writable: bool
) -> None:
    split_image(image)
    volumes = sorted(image.parent.iterdir())
    lost = volumes[missing]
    lost.rename(lost.with_name("elsewhere"))
    before = {path.name: path.read_bytes() for path in image.parent.iterdir()}
    with pytest.raises(DeviceError, match=r"missing"):
        Container.open(image, writable=writable)
    assert before == {path.name: path.read_bytes() for path in image.parent.iterdir()}


def test_a_volume_of_another_image_is_refused(image: Path, tiny_volumes: None, tmp_path: Path) -> None:
    split_image(image)
    other = tmp_path / "other" / "laptop.ferro"
    other.parent.mkdir()
    split_image(other)
    other.with_name(f"{other.name}.001").rename(image.with_name(f"{image.name}.001"))
    with pytest.raises(InvalidImage, match="another image"):
        Container.open(image)


def test_the_first_volume_must_be_named(image: Path, tiny_volumes: None) -> None:
    split_image(image)
    with pytest.raises(UsageError, match="name the first"):
        Container.open(image.with_name(f"{image.name}.001"))


def test_a_file_in_the_way_of_a_new_volume_is_not_replaced(image: Path, tiny_volumes: None) -> None:
    stray = image.with_name(f"{image.name}.001")
    stray.write_bytes(b"precious")
    store = Container.create(image, split=64 * KiB)
    with pytest.raises(DeviceError, match="exists already"):
        fill(store, 30, 20 * KiB)
    store.close()
    assert stray.read_bytes() == b"precious"


def test_a_stray_file_does_not_hinder_an_image_that_is_not_split(image: Path) -> None:
    image.with_name(f"{image.name}.001").write_bytes(b"something else")
    store = Container.create(image)
    store.put("config", [b"x"])
    store.flush()
    store.close()
    assert read(image) == {"config": b"x"}


def test_impossible_splits_are_refused(image: Path, tiny_volumes: None) -> None:
    with pytest.raises(UsageError):
        Container.create(image, split=KiB)
    store = Container.create(image, split=64 * KiB)
    with pytest.raises(UsageError, match="does not fit"):
        store.put("pack/large", [bytes(64 * KiB)])
    store.close()


# ---------------------------------------------------------------------- reclaiming and scanning


def test_reclaim_gives_space_back_and_a_scan_still_finds_everything(image: Path) -> None:
    store = Container.create(image)
    model = fill(store, 60, 256 * KiB)
    store.flush()
    for name in sorted(model)[::2]:
        store.delete(name)
        del model[name]
    before = image.stat().st_blocks
    report = store.reclaim()
    after = image.stat().st_blocks
    store.close()
    assert report.dead == 0
    assert report.freed > 30 * 100 * KiB
    assert 0 <= report.freed - (before - after) * 512 <= 2 * BLOCK  # a catalog was written in between
    assert read(image) == model

    destroy_anchors(image)
    found = Container.open(image)
    assert content(found) == model
    assert found.warnings
    found.close()
    writer = Container.open(image, writable=True)
    writer.put("pack/new", [b"new"])
    writer.flush()
    writer.close()
    assert read(image) == model | {"pack/new": b"new"}


def test_a_scan_of_a_split_image_finds_everything(image: Path, tiny_volumes: None) -> None:
    model = split_image(image)
    store = Container.open(image, writable=True)
    for name in sorted(model)[::3]:
        store.delete(name)
        del model[name]
    store.reclaim()
    store.close()
    destroy_anchors(image)
    assert read(image) == model


@pytest.mark.parametrize("slot", [0, 1])
def test_one_anchor_is_enough(image: Path, slot: int) -> None:
    store = Container.create(image)
    model: Model = {}
    for seed in range(4):
        model |= fill(store, 5, 5000, seed)
        store.flush()
    store.close()
    damage(image, ANCHORS_AT[slot], os.urandom(BLOCK))
    found = Container.open(image)
    assert content(found) == model
    assert any("anchor" in warning for warning in found.warnings)
    found.close()


def test_hostile_anchors_and_catalogs_are_refused_or_stepped_over(image: Path) -> None:
    store = Container.create(image)
    model = fill(store, 3, 5000)
    store.flush()
    uuid = store._log.records.uuid
    store.close()
    for volume, offset in ((0, 2**64 - 1), (0, 2**63), (0, 0), (0, RECORDS_AT + 7), (0, 1 << 40)):
        anchor = Anchor.make(uuid, 2**64 - 1, 5, Place(volume, offset)).pack()
        for at in ANCHORS_AT:
            damage(image, at, anchor.ljust(BLOCK, b"\0"))
        assert read(image) == model
    damage(image, ANCHORS_AT[0], Anchor.make(uuid, 2**64 - 1, 5, Place(2**32 - 1, 0)).pack())
    with pytest.raises(DeviceError, match="missing"):
        read(image)


def test_a_reader_sees_what_was_flushed_and_nothing_else(image: Path) -> None:
    store = Container.create(image)
    model = fill(store, 3, 5000)
    store.flush()
    store.put("pack/pending", [b"x"])
    assert read(image) == model
    store.flush()
    assert read(image) == model | {"pack/pending": b"x"}
    store.close()


def test_a_writer_takes_up_whole_records_in_order_only(image: Path) -> None:
    store = Container.create(image)
    model = fill(store, 3, 5000)
    store.flush()
    for name in ("a", "b", "c", "d"):
        store.put(f"pack/{name}", [name.encode() * 9000])
    torn = store._log.entries["pack/c"]
    store.close()
    damage(image, torn.offset + 5000, b"?")
    writer = Container.open(image, writable=True)
    assert content(writer) == model | {"pack/a": b"a" * 9000, "pack/b": b"b" * 9000}
    writer.close()
    # what follows the torn record may refer to it, so it is gone for good
    assert "pack/d" not in read(image)


def test_what_a_flush_covered_survives_the_loss_of_its_catalog(image: Path) -> None:
    store = Container.create(image)
    first = fill(store, 3, 5000, 1)
    store.flush()
    second = fill(store, 3, 5000, 2)
    store.flush()
    catalog = store.catalogs()[-1]
    third = fill(store, 3, 5000, 3)
    store.flush()
    last = store.catalogs()[-1]
    store.close()
    for lost in (catalog, last):
        damage(image, lost.offset + 130, b"\xff\xff\xff")
    for writable in (False, True):
        found = Container.open(image, writable=writable)
        assert content(found) == first | second | third
        assert found.warnings
        found.close()


def test_an_older_state_leaves_out_what_was_overwritten(image: Path) -> None:
    store = Container.create(image)
    model = fill(store, 8, 20_000)
    store.flush()
    gone = sorted(model)[:4]
    for name in gone:
        store.delete(name)
    store.flush()
    last = store.catalogs()[-1]
    store.reclaim()
    store.close()
    damage(image, last.offset + 130, b"\xff\xff\xff")
    assert read(image) == {name: data for name, data in model.items() if name not in gone}


# ---------------------------------------------------------------------- failures


def test_a_full_disk_leaves_everything_usable(image: Path) -> None:
    for number in range(12):
        image.unlink(missing_ok=True)
        faults = Faults()
        store = Container.create(image, opener=faults.opener)
        model = fill(store, 3, 5000)
        store.flush()
        faults._at = faults.operations + number
        faults._how = Fault.SHORT
        for name in ("a", "b", "c"):
            try:
                store.put(f"pack/{name}", [name.encode() * 5000])
            except WriteError:
                continue
            model[f"pack/{name}"] = name.encode() * 5000
        for _ in range(2):
            try:
                store.flush()
            except WriteError:
                continue
        assert content(store) == model
        store.close()
        assert read(image) == model


# ---------------------------------------------------------------------- compacting


def churn(store: Container, model: Model, rng: random.Random, steps: int, size: int) -> None:
    for _ in range(steps):
        what = rng.random()
        if what < 0.45 and model:
            name = rng.choice(sorted(model))
            store.delete(name)
            del model[name]
        elif what < 0.9:
            name = f"pack/{rng.randbytes(8).hex()}"
            model[name] = rng.randbytes(rng.randint(0, size))
            store.put(name, [model[name]])
        elif what < 0.95:
            store.flush()
        else:
            store.reclaim()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("split", [0, 256 * KiB])
def test_compacting_keeps_everything_and_shrinks(image: Path, tiny_volumes: None, seed: int, split: int) -> None:
    rng = random.Random(seed)
    model: Model = {}
    store = Container.create(image, split=split)
    store.put("config", [b"x"])
    store.flush()
    model["config"] = b"x"
    for _ in range(4):
        churn(store, model, rng, 60, rng.choice([3000, 30_000]))
        moved: list[int] = []
        before = store.file_size
        saved = store.compact(moved.append)
        assert content(store) == model
        assert saved == before - store.file_size
        assert store.file_size - store.live_size <= max(store.live_size // 4, 160 * KiB)
        store.close()
        assert read(image) == model
        store = Container.open(image, writable=True)
        assert store.warnings == []
        for name in model:
            store.check(name)
    store.close()


def test_compacting_to_nothing_and_again_changes_nothing(image: Path) -> None:
    store = Container.create(image)
    model = fill(store, 40, 50_000)
    store.flush()
    for name in list(model):
        store.delete(name)
    store.compact(lambda _: None)
    assert store.file_size <= RECORDS_AT + 2 * BLOCK
    sizes = set()
    for _ in range(4):
        store.compact(lambda _: None)
        sizes.add(store.file_size)
    assert max(sizes) <= RECORDS_AT + 2 * BLOCK
    store.close()
    assert read(image) == {}


def sparse_image(path: Path, opener: Faults, split: int) -> tuple[Container, Model]:
    store = Container.create(path, opener=opener.opener, split=split)
    model = fill(store, 24, 20_000)
    store.flush()
    for number, name in enumerate(sorted(model)):
        if number % 3:
            store.delete(name)
            del model[name]
            if number % 4 == 0:
                store.flush()
    store.flush()
    return store, model


@pytest.mark.parametrize("split", [0, 128 * KiB])
@pytest.mark.parametrize("how", [Fault.LOST, Fault.TORN, Fault.DROPPED, Fault.SHORT])
def test_compacting_may_be_cut_anywhere(image: Path, tiny_volumes: None, how: Fault, split: int) -> None:
    number = 0
    while True:
        for path in image.parent.iterdir():
            path.unlink()
        faults = Faults(how=how, seed=number)
        store, model = sparse_image(image, faults, split)
        faults._at = faults.operations + number
        finished = False
        try:
            store.compact(lambda _: None)
            finished = True
        except (PowerCut, WriteError):
            pass
        store.close()
        assert read(image) == model
        if number % 2:
            destroy_anchors(image)
        again = Container.open(image, writable=True)
        assert content(again) == model
        again.put("pack/next", [b"next"])
        again.compact(lambda _: None)
        assert content(again) == model | {"pack/next": b"next"}
        again.close()
        assert read(image) == model | {"pack/next": b"next"}
        if finished:
            break
        number += 1
    assert number > 5


def test_a_cancelled_compaction_loses_nothing(image: Path) -> None:
    class Stop(Exception):
        pass

    def stop(_: int) -> None:
        if not budget:
            raise Stop
        budget.pop()

    budget = [None, None, None]
    store, model = sparse_image(image, Faults(), 0)
    with pytest.raises(Stop):
        store.compact(stop)
    store.reclaim()  # must not touch what the durable catalog names
    assert content(store) == model
    store.close()
    assert read(image) == model


# ---------------------------------------------------------------------- checking


def test_check_finds_a_flip_of_any_byte_of_a_record(image: Path) -> None:
    store = Container.create(image)
    store.put("pack/one", [os.urandom(700)])
    store.put("pack/two", [os.urandom(700)])
    store.flush()
    entry = store._log.entries["pack/one"]
    store.close()
    whole = image.read_bytes()
    for at in [*range(128), *range(128, entry.span, 37), entry.span - 1]:
        offset = entry.offset + at
        damage(image, offset, bytes([whole[offset] ^ 0x10]))
        found = Container.open(image)
        with pytest.raises(FerrotypeError):
            found.check("pack/one")
        found.check("pack/two")
        found.close()
        damage(image, offset, whole[offset : offset + 1])


def test_no_more_is_put_than_a_reader_accepts(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_module, "MAX_ENTRIES", 5)
    store = Container.create(image)
    model = fill(store, 5, 100)
    with pytest.raises(WriteError, match="go on in a new image"):
        store.put("pack/more", [b"x"])
    store.flush()
    store.close()
    assert read(image) == model
