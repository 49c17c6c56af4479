"""A backup checks its own work: what does not read back is not committed, and is not built upon by the next one."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import msgspec
import pytest

from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.errors import WriteError
from ferrotype.job import NullJob
from ferrotype.objects import Bytes
from ferrotype.objects.container import Container
from ferrotype.objects.layout import BLOCK, RECORD_MAGIC, RecordHeader
from ferrotype.objects.volumes import PosixFile
from ferrotype.repository import writer as writer_module
from ferrotype.repository.keys import Secret
from ferrotype.repository.sealing import ChunkId
from ferrotype.repository.selfcheck import check_maps
from ferrotype.repository.snapshots import DiskRecord, Region
from ferrotype.repository.store import Repository
from ferrotype.repository.writer import open_writer
from tests.repository.small import (
    CHUNK,
    SECRET,
    add_disk,
    back_up,
    changed,
    contents,
    create,
    disk_content,
    open_at,
    restored,
    snapshot_of,
)

FIRST = disk_content(40, 1)
SECOND = changed(FIRST, 2)


class Liar(PosixFile):
    """Storage that says it wrote, and did not: from the ``lies``-th write on for ``count`` writes."""

    writes = 0
    lies = -1
    spoil: Callable[[bytes], bytes] = staticmethod(lambda data: bytes(len(data)))

    def write(self, offset: int, parts: Sequence[Bytes], /) -> None:
        data = b"".join(parts)
        if Liar.writes == Liar.lies:
            data = Liar.spoil(data)
        Liar.writes += 1
        super().write(offset, [data])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "laptop.ferro"
    repository = create(Container.create(path))
    back_up(repository, FIRST, "first")
    repository.close()
    return path


def writes_of_a_backup(image: Path) -> int:
    whole = image.read_bytes()
    Liar.writes, Liar.lies = 0, -1
    with open_at(image, writable=True, opener=Liar) as repository:
        Liar.writes = 0
        back_up(repository, SECOND, "second", day=1)
    image.write_bytes(whole)
    return Liar.writes


def lost_start(data: bytes) -> bytes:
    return bytes(BLOCK) + data[BLOCK:]


def lost_middle(data: bytes) -> bytes:
    if not data.startswith(RECORD_MAGIC) or len(data) <= RecordHeader.SIZE:
        return data
    at = RecordHeader.SIZE + RecordHeader.unpack(data).length // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def lost_whole(data: bytes) -> bytes:
    return bytes(len(data))


@pytest.mark.parametrize("spoil", [lost_whole, lost_start])
def test_a_header_that_does_not_read_back_is_never_sealed(image: Path, spoil: Callable[[bytes], bytes]) -> None:
    """Every write of a backup is lost in turn; anchors alone may be, the other one leads to the same."""
    whole = image.read_bytes()
    refused = 0
    total = writes_of_a_backup(image)
    assert total > 8
    for number in range(total):
        image.write_bytes(whole)
        Liar.writes, Liar.lies = -1000, -1
        Liar.spoil = staticmethod(spoil)
        with open_at(image, writable=True, opener=Liar) as repository:
            Liar.writes, Liar.lies = 0, number
            said = ""
            try:
                back_up(repository, SECOND, "second", day=1)
            except WriteError as error:
                said = str(error)
                refused += 1
            Liar.lies = -1
        assert not said or "does not read back" in said or "did not stand the check" in said
        with open_at(image) as repository:
            found = contents(repository)
        assert found["first"] == FIRST
        assert found.get("second", SECOND) == SECOND
        assert said or "second" in found, number
        with open_at(image, writable=True) as repository:
            back_up(repository, SECOND, "again", day=2)
            assert contents(repository)["again"] == SECOND
    assert refused > total // 2


@pytest.mark.parametrize("secret", [None, SECRET], ids=["plain", "encrypted"])
def test_verify_after_finds_any_object_that_was_spoilt(tmp_path: Path, secret: Secret | None) -> None:
    """A bit that flips behind the first block: only a backup that reads everything back knows."""
    image = tmp_path / "laptop.ferro"
    repository = create(Container.create(image), secret)
    back_up(repository, FIRST, "first")
    repository.close()
    whole = image.read_bytes()
    seen: set[str] = set()
    content = random.Random(5).randbytes(30 * CHUNK)
    for number in range(18):
        image.write_bytes(whole)
        Liar.writes, Liar.lies = -1000, -1
        Liar.spoil = staticmethod(lost_middle)
        with open_at(image, secret, writable=True, opener=Liar) as repository:
            Liar.writes, Liar.lies = 0, number
            try:
                with open_writer(repository, from_medium=True) as writer:
                    disk = add_disk(writer, repository, content, checkpoint=11)
                    writer.commit(snapshot_of(disk, name="second", day=1))
                seen.add("ok")
            except WriteError as error:
                seen.add(str(error).split()[0])
            Liar.lies = -1
        with open_at(image, secret) as repository:
            found = {snapshot.name: snapshot for snapshot in repository.snapshots()}
            assert restored(repository, found["first"]) == FIRST
            if "second" in found:
                assert restored(repository, found["second"]) == content
        with open_at(image, secret, writable=True) as repository:
            back_up(repository, content, "again", day=2)
            assert contents(repository)["again"] == content
            assert verify(repository, VerifyOptions(deep=True, workers=1), NullJob()).ok, number
    assert len(seen) >= 2


def test_a_map_that_leads_nowhere_is_not_committed(image: Path) -> None:
    with open_at(image, writable=True) as repository:
        with pytest.raises(WriteError, match="the map of sda"), open_writer(repository) as writer:
            disk = add_disk(writer, repository, SECOND)
            gone = repository.sealer.id_of(os.urandom(CHUNK))
            page = bytearray(repository.sealer.id_of(SECOND[:CHUNK]) * 3 + gone).ljust(32768, b"\0")
            broken = with_map(disk, writer.add_plain(bytes(page)))
            writer.commit(snapshot_of(broken, name="second", day=1))
        assert [snapshot.name for snapshot in repository.snapshots()] == ["first"]
        with pytest.raises(WriteError, match="the map of sda"), open_writer(repository) as writer:
            writer.commit(snapshot_of(with_map(disk, gone), name="second", day=1))
        back_up(repository, SECOND, "second", day=1)
        assert contents(repository) == {"first": FIRST, "second": SECOND}


def with_map(disk: DiskRecord, root: ChunkId) -> DiskRecord:
    """The same disk with another map."""
    region = disk.regions[0]
    return msgspec.structs.replace(disk, regions=(Region(region.start, region.length, root.hex()),))


def test_the_check_of_the_map_follows_the_change(image: Path) -> None:
    """Pages that the parent has in the same places are not read, and ids that it has there are not looked up."""
    with open_at(image, writable=True) as repository:
        content = random.Random(9).randbytes(3000 * CHUNK)
        parent = back_up(repository, content, "parent", day=1)
        fresh = content[: 1500 * CHUNK] + os.urandom(CHUNK) + content[1501 * CHUNK :]
        looked: list[int] = []
        pages: list[bytes] = []

        def counted(repository: Repository, *arguments: object) -> None:
            from ferrotype.repository import selfcheck

            missing, chunk = selfcheck._Stored.missing, selfcheck._Stored.chunk

            def counting_missing(self: selfcheck._Stored, ids: selfcheck.Ids) -> selfcheck.Ids:
                looked.append(len(ids))
                return missing(self, ids)

            def counting_chunk(self: selfcheck._Stored, chunk_id: ChunkId) -> bytes:
                pages.append(chunk_id)
                return chunk(self, chunk_id)

            with (
                mock.patch.object(selfcheck._Stored, "missing", counting_missing),
                mock.patch.object(selfcheck._Stored, "chunk", counting_chunk),
            ):
                check_maps(repository, *arguments)  # type: ignore[arg-type]

        with mock.patch.object(writer_module, "check_maps", counted), open_writer(repository) as writer:
            disk = add_disk(writer, repository, fresh)
            writer.commit(snapshot_of(disk, name="fresh", day=2), {"sda": parent.disk()})
        assert looked == [1]
        assert len(pages) == 2  # the root, and the one page below it that changed
