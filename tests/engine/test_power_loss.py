"""The power goes while a file system, through the kernel, holds what no fsync has covered: files, lengths and names.

``FERROTYPE_CUTS=5000 pytest tests/engine/test_power_loss.py`` tries it 5000 times; ``FERROTYPE_SEED`` names another
beginning.
"""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

import pytest

from ferrotype.errors import FerrotypeError
from ferrotype.objects import container as container_module
from ferrotype.objects.volumes import PosixFile
from ferrotype.units import KiB, MiB
from tests.cli.program import attempt, ferrotype
from tests.engine.images import bytes_of, is_sound, opened
from tests.faults.promises import Told, check
from tests.faults.scenarios import SCENARIOS, Scenario, Stage
from tests.repository.small import SECRET
from tests.troubled import Trouble, troubled

CUTS = int(os.environ.get("FERROTYPE_CUTS", "42"))
SEED = int(os.environ.get("FERROTYPE_SEED", "1"))


class Cutting:
    """Lives of images on one mount, each in a folder of its own, cut at an operation that chance names."""

    def __init__(self, disk: Trouble) -> None:
        self._disk = disk
        self._lengths: dict[tuple[str, bool], int] = {}  # operations of a life that is not cut

    def length(self, scenario: Scenario, *, encrypted: bool) -> int:
        """How many operations the life of a scenario has, which differs by a few from time to time."""
        key = scenario.name, encrypted
        if key not in self._lengths:
            self._live("calm", scenario, encrypted=encrypted, cut_at=-1, seed=0)
            self._lengths[key] = self._disk.operations()
        return self._lengths[key]

    def cut(self, number: int, scenario: Scenario, *, encrypted: bool) -> bool:
        """One life that is cut, and what is left of it; False where it came to its end."""
        rng = random.Random(f"{SEED} {number}")
        cut_at = rng.randrange(self.length(scenario, encrypted=encrypted))
        stage = self._live(f"{number}", scenario, encrypted=encrypted, cut_at=cut_at, seed=rng.randrange(1 << 30))
        was_cut = self._disk.is_cut()
        left = self._disk.backing / stage.folder.name
        try:
            check(left / stage.path.name, stage.secret, stage.told.until(0))
        except BaseException as error:
            error.add_note(f"round {number}: {scenario}, encrypted {encrypted}, cut at operation {cut_at}")
            raise
        _remove(left)
        return was_cut

    def _live(self, name: str, scenario: Scenario, *, encrypted: bool, cut_at: int, seed: int) -> Stage:
        folder = f"{scenario.name}-{encrypted}-{name}"
        (self._disk.backing / folder).mkdir()
        self._disk.behave()
        told = Told(lambda: 0)
        secret = SECRET if encrypted else None
        stage = Stage(self._disk.path / folder, secret, PosixFile, told, scenario.split)
        scenario.before(stage)
        self._disk.behave(lossy=True, cut_at=cut_at, seed=seed)
        with contextlib.suppress(FerrotypeError, OSError):
            scenario.life(stage)
        if stage.repository is not None:
            with contextlib.suppress(FerrotypeError, OSError):
                stage.repository.close()
        return stage


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_the_power_goes_at_any_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_module, "_LEAST_SPLIT", 4 * KiB)
    cut = 0
    with troubled(tmp_path) as disk:
        lives = Cutting(disk)
        for number in range(CUTS):
            scenario = SCENARIOS[number % len(SCENARIOS)]
            encrypted = scenario.encrypted_only or number // len(SCENARIOS) % 2 == 1
            cut += lives.cut(number, scenario, encrypted=encrypted)
    assert cut > CUTS * 0.8


def test_the_power_goes_while_the_program_runs(tmp_path: Path) -> None:
    """One image through the program itself: what it said is committed is there, and the next run goes on."""
    rng = random.Random(SEED)
    source = tmp_path / "disk.img"
    contents: dict[str, bytes] = {}
    with troubled(tmp_path) as disk:
        image, left = disk.path / "a.ferro", disk.backing / "a.ferro"
        before = rng.randbytes(MiB)
        source.write_bytes(before)
        ferrotype("backup", source, image, "--pack-size", "1MiB", "--name", "0", "-q")
        contents["0"] = before
        for number in range(1, 4):
            content = before[: MiB // 2] + rng.randbytes(MiB // 2)
            source.write_bytes(content)
            disk.behave(lossy=True, cut_at=rng.randrange(4, 20), seed=rng.randrange(1 << 30))
            done = attempt("backup", source, image, "--name", f"{number}", "-q")
            assert done.code == 6 or (done.code == 0 and not done.err), done
            disk.behave()
            with opened(left) as repository:
                names = {snapshot.name for snapshot in repository.snapshots()}
            assert set(contents) <= names
            assert done.code == 6 or f"{number}" in names
            if f"{number}" in names:
                contents[f"{number}"] = content
            is_sound(left)
            for name, expected in contents.items():
                assert bytes_of(f"{left}::{name}") == expected
