"""Writing behind: one write is under way while the next is made ready, and no error is lost."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import ferrotype
from ferrotype.block import file as file_module
from ferrotype.block.file import FileSink
from ferrotype.block.outputs import Outputs
from ferrotype.errors import WriteError
from ferrotype.formats import raw
from ferrotype.stall import Patience, Storage
from ferrotype.units import MiB
from tests.machine import run


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 1 MiB."""
    where = tmp_path / "small"
    where.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1m", "none", where)
    yield where
    run("umount", where)


def test_an_error_is_an_answer_of_storage(tmp_path: Path) -> None:
    """As of a stick that was pulled out; whether the path is there is not asked."""
    for path in (tmp_path / "not there", tmp_path / ("x" * 300), tmp_path / "a" / "b"):  # the second: ENAMETOOLONG
        Patience().reach(path)


def test_calls_are_made_in_order_and_one_is_under_way(tmp_path: Path) -> None:
    storage = Storage(tmp_path, Patience())
    done: list[int] = []
    gates = [threading.Event() for _ in range(3)]

    def work(number: int) -> None:
        assert gates[number].wait(20)
        done.append(number)

    storage.behind(lambda _: work(0))
    assert done == []  # it returned before the work was done
    gates[0].set()
    storage.behind(lambda _: work(1))
    assert done == [0]  # and the next one when the first was
    gates[1].set()
    gates[2].set()
    storage.behind(lambda _: work(2))
    assert storage.call(lambda _: list(done)) == [0, 1, 2]  # an ordinary call comes after all of them
    storage.release()


def test_what_went_wrong_is_raised_by_the_next_call(tmp_path: Path) -> None:
    def fail(_: object) -> None:
        raise WriteError("no")

    for then in ("behind", "call", "settle"):
        storage = Storage(tmp_path, Patience())
        storage.behind(fail, WriteError)
        with pytest.raises(WriteError, match=r"^no$"):
            storage.settle() if then == "settle" else getattr(storage, then)(lambda _: None)
        storage.settle()  # it is raised once
        assert not storage.lost
        storage.release()


def test_storage_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    storage = Storage(tmp_path, Patience(limit=1.5))
    never, made = threading.Event(), []
    storage.behind(lambda _: (never.wait(120), None)[1], WriteError)
    with pytest.raises(WriteError, match=r"has not answered for 1\.5 s"):
        storage.behind(lambda _: made.append(1), WriteError)
    assert storage.lost
    for call in (storage.behind, storage.call):
        with pytest.raises(WriteError, match="does not answer"):
            call(lambda _: None, WriteError)
    storage.settle()  # nothing is left to wait for
    storage.release()
    never.set()
    assert made == []  # what stood behind the stalled call is never made


def test_a_file_written_behind_has_what_was_written(tmp_path: Path) -> None:
    content = os.urandom(3 * MiB + 17)
    with Outputs(tmp_path / "a", behind=True) as outputs:
        file = outputs.create(size=len(content))
        assert file.behind
        for at in range(0, len(content), 100_001):
            file.write(at, memoryview(content)[at : at + 100_001])
        outputs.commit()
    assert (tmp_path / "a").read_bytes() == content


def test_of_several_files_none_is_written_behind(tmp_path: Path) -> None:
    with Outputs(tmp_path / "a", behind=True) as outputs:
        files = [outputs.create(size=1), outputs.create(tmp_path / "b", 1)]
        assert not any(file.behind for file in files)


@pytest.mark.parametrize("end", ["commit", "close", "resize", "write"])
def test_a_full_file_system_is_told_by_what_comes_next(small: Path, end: str) -> None:
    sink = FileSink.create(small / "a", 8 * MiB)
    sink.behind = True
    sink.write(0, memoryview(os.urandom(4 * MiB)))
    if end != "close":
        acts: dict[str, Callable[[], None]] = {
            "commit": sink.commit,
            "resize": lambda: sink.resize(1),
            "write": lambda: sink.write(0, memoryview(b"a")),
        }
        with pytest.raises(WriteError, match="writing 4194304 bytes at 0 failed: there is no space left"):
            acts[end]()
    sink.close()
    assert os.listdir(small) == []


def test_a_conversion_leaves_alone_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow disk, so that a buffer used again too early would be seen."""
    write_fully = file_module.write_fully

    def slowly(fd: int, offset: int, parts: Sequence[memoryview]) -> None:
        time.sleep(0.02)
        write_fully(fd, offset, parts)

    monkeypatch.setattr(file_module, "write_fully", slowly)
    (tmp_path / "a.raw").write_bytes(os.urandom(48 * MiB))
    for out in ("b.raw", "b.vhdx", "b.qcow2"):
        ferrotype.convert(tmp_path / "a.raw", tmp_path / out)
        with ferrotype.open_disk(tmp_path / out) as disk:
            content = bytearray(48 * MiB)
            disk.read_into(0, memoryview(content))
        assert content == (tmp_path / "a.raw").read_bytes()


def test_a_file_that_gets_company_is_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts made one after the other: the first is alone until the second is made."""
    write_fully, first = file_module.write_fully, [1.0]

    def slowly(fd: int, offset: int, parts: Sequence[memoryview]) -> None:
        time.sleep(first.pop() if first else 0)
        write_fully(fd, offset, parts)

    monkeypatch.setattr(file_module, "write_fully", slowly)
    monkeypatch.setattr(raw, "_AT_ONCE", 2)
    content = os.urandom(48 * MiB)
    (tmp_path / "a.raw").write_bytes(content)
    ferrotype.convert(tmp_path / "a.raw", tmp_path / "b", output_format="raw", options={"split": "1MiB"})
    assert b"".join(part.read_bytes() for part in sorted(tmp_path.glob("b.*"))) == content
