"""Outputs of several files: how many are open, what goes with them, and what is seen while they replace others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ferrotype import linux
from ferrotype.block.outputs import Outputs, in_a_row
from ferrotype.errors import Refused, WriteError

OLD, NEW = b"old", b"new"


def _old(folder: Path, numbers: range) -> Path:
    """Parts of an older disk; the first."""
    for number in numbers:
        _part(folder, number).write_bytes(OLD)
    return _part(folder, 1)


def _part(folder: Path, number: int) -> Path:
    return folder / f"disk.{number:03}"


def _make(folder: Path, count: int, *, replace: bool = True, spared: tuple[Path, ...] = ()) -> None:
    """A new disk in so many parts."""
    with Outputs(_part(folder, 1), replace=replace, spared=spared) as outputs:
        made = 0
        outputs.supersede(lambda: in_a_row(lambda number: _part(folder, number), made + 1))
        for number in range(1, count + 1):
            file = outputs.create(_part(folder, number), len(NEW))
            made = number
            file.write(0, memoryview(NEW))
            outputs.done(file)
        outputs.commit()


def _joined(folder: Path) -> list[bytes]:
    """What a reader finds: the parts up to the first number that has none."""
    return [path.read_bytes() for path in in_a_row(lambda number: _part(folder, number), 1)]


def _hidden(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


@pytest.mark.parametrize(("before", "now"), [(3, 1), (3, 2), (3, 3), (1, 3), (0, 2), (2, 0)])
def test_nothing_of_the_older_disk_is_left(tmp_path: Path, before: int, now: int) -> None:
    _old(tmp_path, range(1, before + 1))
    (tmp_path / "disk.009").write_bytes(b"mine")  # behind a gap: nobody takes it for a part
    _make(tmp_path, now)
    assert _joined(tmp_path) == [NEW] * now or (now == 0 and _joined(tmp_path) == [OLD] * before)
    assert (tmp_path / "disk.009").read_bytes() == b"mine"
    assert not _hidden(tmp_path)


def test_a_part_that_would_follow_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    _part(tmp_path, 2).write_bytes(OLD)
    with Outputs(_part(tmp_path, 1)) as outputs:
        outputs.create(size=3)
        with pytest.raises(Refused, match=r"disk\.002 exists and would be read as a part of .*disk\.001"):
            outputs.supersede(lambda: in_a_row(lambda number: _part(tmp_path, number), 2))
    assert os.listdir(tmp_path) == ["disk.002"]


def test_a_part_that_would_follow_in_the_end_is_refused_then(tmp_path: Path) -> None:
    _part(tmp_path, 3).write_bytes(OLD)
    with pytest.raises(Refused, match=r"disk\.003 exists"):
        _make(tmp_path, 2, replace=False)
    assert os.listdir(tmp_path) == ["disk.003"]


def test_what_is_read_is_not_removed(tmp_path: Path) -> None:
    _old(tmp_path, range(1, 4))
    with pytest.raises(Refused, match="part of what is being read"):
        _make(tmp_path, 1, spared=(_part(tmp_path, 3),))
    assert _joined(tmp_path) == [OLD] * 3
    assert not _hidden(tmp_path)


def test_a_folder_in_the_row_is_refused(tmp_path: Path) -> None:
    _old(tmp_path, range(1, 2))
    _part(tmp_path, 2).mkdir()
    with pytest.raises(Refused, match="not a regular file"):
        _make(tmp_path, 1)
    assert _part(tmp_path, 1).read_bytes() == OLD


# ---------------------------------------------------------------------- in between


@pytest.fixture
def at_each_step(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Functions that are called before each step which changes what names stand for."""
    heard: list[Callable[[], None]] = []

    def watched(step: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            for one in heard:
                one()
            return step(*args, **kwargs)

        return call

    for module, name in ((os, "rename"), (os, "replace"), (os, "unlink"), (linux, "rename_new")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return heard


@pytest.mark.parametrize(("before", "now"), [(3, 1), (3, 2), (2, 3), (1, 3)])
def test_at_no_moment_old_and_new_parts_pass_for_one_disk(
    tmp_path: Path, before: int, now: int, at_each_step: list[Callable[[], None]]
) -> None:
    _old(tmp_path, range(1, before + 1))
    seen: list[list[bytes]] = []
    at_each_step.append(lambda: seen.append(_joined(tmp_path)))
    _make(tmp_path, now)
    at_each_step.clear()
    assert len(seen) >= before + now
    assert [OLD] * before in seen
    assert [] in seen
    assert all(one in ([OLD] * before, [], [NEW] * now) for one in seen), seen


@pytest.mark.parametrize(("before", "now"), [(3, 1), (3, 2), (1, 2), (0, 3)])
def test_an_error_at_any_step_leaves_all_as_it_was(
    tmp_path: Path, before: int, now: int, at_each_step: list[Callable[[], None]]
) -> None:
    failed = 0
    while True:
        folder = tmp_path / str(failed)
        folder.mkdir()
        _old(folder, range(1, before + 1))
        left = [failed]

        def fail(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise PermissionError(1, "no")

        at_each_step.append(fail)
        try:
            _make(folder, now, replace=before > 0)
        except WriteError:
            at_each_step.clear()
            whole = _joined(folder)
            assert whole in ([OLD] * before, [NEW] * now)
            # only what was to be removed in the end may be left, under its hidden name
            assert whole == [NEW] * now or not _hidden(folder)
            failed += 1
        else:
            at_each_step.clear()
            break
    assert failed >= before + now  # each file is renamed once at least


# ---------------------------------------------------------------------- many


def test_complete_files_do_not_stay_open(tmp_path: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before, most = count(), 0
    with Outputs(_part(tmp_path, 1)) as outputs:
        for number in range(1, 201):
            file = outputs.create(_part(tmp_path, number), len(NEW))
            file.write(0, memoryview(NEW))
            outputs.done(file)
            most = max(most, count() - before)
        assert all(path.name.startswith(".") for path in tmp_path.iterdir())
        outputs.commit()
        assert outputs.stored_bytes() >= 200 * 512
    assert 0 < most < 50
    assert _joined(tmp_path) == [NEW] * 200
    assert not _hidden(tmp_path)
    assert count() == before
