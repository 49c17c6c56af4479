"""Finding the objects of a damaged container: at any byte, in any volume, and none of another container."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from ferrotype.errors import InvalidImage, StoreError, UsageError
from ferrotype.job import NullJob
from ferrotype.objects import container as container_module
from ferrotype.objects.container import Container
from ferrotype.objects.damaged import volumes_of
from ferrotype.objects.layout import BLOCK, Kind, RecordHeader, VolumeHeader, checksum
from ferrotype.objects.rescue import RescueStore
from ferrotype.objects.volumes import volume_path


def fill(path: Path, count: int = 12, seed: int = 1) -> dict[str, bytes]:
    rng = random.Random(seed)
    objects = {f"pack/{number:x}": rng.randbytes(rng.randrange(1, 20_000)) for number in range(count)}
    store = Container.create(path)
    for number, (name, data) in enumerate(objects.items()):
        store.put(name, [data])
        if number % 4 == 3:
            store.flush()
    store.flush()
    store.close()
    return objects


def found(path: Path) -> dict[str, bytes]:
    """Every object that is whole."""
    store = RescueStore.open(path, NullJob())
    try:
        return {name: store.get(name) for name, pieces in store.pieces.items() if pieces[0].whole}
    finally:
        store.close()


def test_everything_is_found_without_head_and_catalogs(tmp_path: Path) -> None:
    path = tmp_path / "a.ferro"
    objects = fill(path)
    whole = path.read_bytes()
    for data in (whole, whole[3 * BLOCK :], os.urandom(777) + whole[BLOCK:], whole.replace(b"FERROANC", b"x" * 8)):
        path.write_bytes(data)
        assert found(path) == objects


def test_records_are_found_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.ferro"
    objects = fill(path)
    store = Container.open(path)
    ends = {e.name: (e.offset, e.offset + RecordHeader.SIZE + e.length) for e in store.live()}
    catalogs = store.catalogs()
    store.close()
    whole = bytearray(path.read_bytes())
    for entry in catalogs:  # which would tell where the others stand
        whole[entry.offset : entry.offset + entry.span] = bytes(entry.span)
    rng = random.Random(2)
    for _ in range(60):
        start = rng.randrange(len(whole))
        end = min(len(whole), start + rng.randrange(1, 9000))
        path.write_bytes(whole[:start] + whole[end:])
        left = {name for name, (low, high) in ends.items() if high <= start or low >= end}
        assert found(path) == {name: objects[name] for name in left}


def test_what_was_deleted_is_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.ferro"
    objects = fill(path)
    store = Container.open(path, writable=True)
    for name in ("pack/1", "pack/7"):
        store.delete(name)
    store.flush()
    store.close()
    rescued = RescueStore.open(path, NullJob())
    assert set(rescued.deleted) == {"pack/1", "pack/7"}
    assert set(rescued.pieces) == objects.keys() - rescued.deleted.keys()
    assert rescued.problems == []
    rescued.close()


def test_an_object_without_header_is_offered_where_the_catalog_has_it(tmp_path: Path) -> None:
    path = tmp_path / "a.ferro"
    objects = fill(path)
    store = Container.open(path)
    places = {entry.name: entry.offset for entry in store.live()}
    store.close()
    whole = path.read_bytes()
    for name, offset in places.items():
        for data in (
            whole[:offset] + bytes(RecordHeader.SIZE) + whole[offset + RecordHeader.SIZE :],
            whole[:offset] + whole[offset + RecordHeader.SIZE :],
            whole[BLOCK + 5 : offset] + whole[offset + RecordHeader.SIZE :],
        ):
            path.write_bytes(data)
            rescued = RescueStore.open(path, NullJob())
            assert rescued.damaged == [name]
            assert objects[name] in [rescued.read(piece, 0, piece.length) for piece in rescued.pieces[name]]
            rescued.close()


def test_objects_are_found_by_how_far_others_have_moved(tmp_path: Path) -> None:
    """Three headers in a row are lost, so nothing stands next to the middle one."""
    path = tmp_path / "a.ferro"
    objects = fill(path)
    store = Container.open(path)
    entries = sorted(store.live(), key=lambda entry: entry.offset)
    store.close()
    whole = bytearray(path.read_bytes())
    for entry in entries[4:7]:
        whole[entry.offset : entry.offset + RecordHeader.SIZE] = bytes(RecordHeader.SIZE)
    path.write_bytes(whole[BLOCK + 5 :])
    rescued = RescueStore.open(path, NullJob())
    name = entries[5].name
    assert objects[name] in [rescued.read(piece, 0, piece.length) for piece in rescued.pieces[name]]
    rescued.close()


def test_an_image_inside_an_image_is_left_alone(tmp_path: Path) -> None:
    inner, outer, small = (tmp_path / f"{name}.ferro" for name in ("inner", "outer", "small"))
    fill(inner, 40)
    fill(small, 3)
    store = Container.create(outer)
    store.put("pack/inner", [inner.read_bytes()])
    store.put("config", [b"mine"])
    store.flush()
    store.close()
    assert found(outer).keys() == {"pack/inner", "config"}
    with outer.open("ab") as file:  # and one behind it
        file.write(small.read_bytes())
    rescued = RescueStore.open(outer, NullJob())
    assert rescued.pieces.keys() == {"pack/inner", "config"}
    assert any("another image" in problem for problem in rescued.problems)
    rescued.close()


def test_volumes_are_found_by_any_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_module, "_LEAST_SPLIT", 1)
    path = tmp_path / "a.ferro"
    store = Container.create(path, split=40_000)
    for number in range(10):
        store.put(f"pack/{number}", [os.urandom(15_000)])
    store.flush()
    store.close()
    everything = volumes_of(path)
    assert everything[0] == path
    assert len(everything[1]) > 4
    for number in everything[1]:
        assert volumes_of(volume_path(path, number)) == everything
    path.unlink()
    for named in (path, volume_path(path, 3)):
        assert volumes_of(named) == (path, {n: p for n, p in everything[1].items() if n})
    volume_path(path, 3).write_bytes(bytes(50_000))  # it does not say any more what it is
    assert volumes_of(volume_path(path, 3))[0] == path


def test_a_name_that_ends_like_a_volume_is_no_volume(tmp_path: Path) -> None:
    path = tmp_path / "backup.001"
    fill(path)
    assert volumes_of(path) == (path, {0: path})
    with pytest.raises(UsageError):
        volumes_of(tmp_path / "nothing.ferro")


def test_headers_by_the_thousand_take_no_more_time_than_the_file_is_long(tmp_path: Path) -> None:
    """Each claims the rest of the file, which must not be read for each of them."""
    path = tmp_path / "a.ferro"
    uuid, count = bytes(16), 4000
    headers = [
        RecordHeader.make(Kind.OBJECT, uuid, n + 1, (count - n - 1) * 128, bytes(16), f"pack/{n:x}").pack()
        for n in range(count)
    ]
    path.write_bytes(b"".join(headers))
    store = RescueStore.open(path, NullJob())
    assert len(store.pieces) == count
    assert not any(pieces[0].whole for pieces in store.pieces.values())
    store.close()


def test_what_a_hostile_file_says_ends_in_an_error_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.ferro"
    uuid = bytes(range(16))
    head = VolumeHeader.make(uuid, 0, 0).pack().ljust(3 * BLOCK, b"\0")

    def catalog(payload: bytes) -> bytes:
        header = RecordHeader.make(Kind.CATALOG, uuid, 5, len(payload), checksum(payload), "").pack()
        return (header + payload).ljust(2 * BLOCK, b"\0")

    huge = b"\x93\xc0\x91\x95\xa6config\xcf" + b"\xff" * 8 + b"\xcf" + b"\xff" * 8 + b"\x01\x01\x90"
    for payload in (b"", b"\x93", b"\x91" * 1000, b"\x93\xc0\x90\x90", huge):
        path.write_bytes(head + catalog(payload))
        store = RescueStore.open(path, NullJob())
        for name in store.pieces:
            with pytest.raises(Exception, match="what is left of it is shorter"):
                store.get(name)
        list(store.dark())
        store.close()
    for data in (b"", head, b"FERROREC" * 10_000):
        path.write_bytes(data)
        with pytest.raises(InvalidImage):
            RescueStore.open(path, NullJob())


def test_it_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "a.ferro"
    fill(path)
    path.chmod(0o400)
    store = RescueStore.open(path, NullJob())
    with pytest.raises(StoreError):
        store.put("pack/x", [b""])
    with pytest.raises(StoreError):
        store.delete("pack/1")
    store.close()
