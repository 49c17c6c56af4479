"""Running a scenario: its beginning is made once, its life is recorded or made to fail, its end is checked."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ferrotype.engine import verify
from ferrotype.errors import FerrotypeError, IntegrityError
from ferrotype.objects import container
from ferrotype.objects.volumes import Opener
from ferrotype.repository.keys import Secret
from ferrotype.testing.recording import Files, Recording, read_files, write_files
from tests.faults.promises import Hasty, Promise, Told, check
from tests.faults.scenarios import IMAGE, SCENARIOS, Scenario, Stage
from tests.repository.small import SECRET

SEED = 20_260_101


def casts(*names: str) -> list[Any]:
    """Parameters for a ``theatre``: every scenario, or those named, plain and encrypted."""
    return [
        pytest.param((scenario, encrypted), id=f"{scenario}-{'encrypted' if encrypted else 'plain'}")
        for scenario in SCENARIOS
        if not names or scenario.name in names
        for encrypted in (False, True)
        if encrypted or not scenario.encrypted_only
    ]


@contextmanager
def repeatable(what: str) -> Iterator[None]:
    """Names, salts and nonces are the same in every run of ``what``, and volumes may be small."""
    rng = random.Random(f"{SEED} {what}")
    with (
        mock.patch.object(os, "urandom", rng.randbytes),
        mock.patch.object(container, "_LEAST_SPLIT", 0),
        mock.patch.object(verify, "map_ordered", _without_threads),
    ):
        yield


def _without_threads(function: Callable[[Any], Any], items: Iterable[Any], **_: int) -> Iterator[Any]:
    return map(function, items)


@dataclass(slots=True)
class Points:
    """What was tried and checked so far."""

    points: int = 0
    checked: int = 0
    _seen: dict[bytes, Promise] = field(default_factory=dict)

    def is_new(self, files: Files, promise: Promise) -> bool:
        """Whether these very files were not held against this promise yet."""
        self.points += 1
        digest = hashlib.blake2b(digest_size=16)
        for name, content in sorted(files.items()):
            digest.update(name.encode() + len(content).to_bytes(8, "little"))
            digest.update(content)
        digest.update(repr([sorted(getattr(promise, name)) for name in Promise.__slots__[1:]]).encode())
        key = digest.digest()
        if key in self._seen:
            return False
        self._seen[key] = promise
        self.checked += 1
        return True


@dataclass(slots=True)
class Theatre:
    """One scenario, plain or encrypted, in one folder."""

    scenario: Scenario
    encrypted: bool
    folder: Path
    points: Points = field(default_factory=Points)
    before: Files = field(default_factory=dict)
    promised: Promise = field(default_factory=Promise)

    @property
    def secret(self) -> Secret | None:
        return SECRET if self.encrypted else None

    @property
    def step(self) -> int:
        """Of how many faults one is tried, where each takes a life of its own: encryption changes little then."""
        return 3 if self.encrypted and not self.scenario.encrypted_only else 1

    def prepare(self) -> None:
        """Make what is there when the life begins."""
        place = self.folder / "before"
        place.mkdir()
        told = Told(lambda: 0)
        with repeatable(f"before {self.scenario}"):
            self.scenario.before(Stage(place, self.secret, Hasty, told, self.scenario.split))
        self.before, self.promised = read_files(place), told.until(0)
        shutil.rmtree(place)

    def stage(self, opener: Opener, now: Callable[[], int]) -> Stage:
        """The life may begin: the files are there."""
        place = self.folder / "life"
        write_files(self.before, place)
        return Stage(place, self.secret, opener, Told(now, self.promised), self.scenario.split)

    def record(self, *, held: int = -1) -> tuple[Recording, Told]:
        """The life, with nothing failing."""
        place = self.folder / "life"
        write_files(self.before, place)
        recording = Recording(place, held=held)
        stage = self.stage(recording.opener, lambda: len(recording.operations))
        with repeatable(str(self.scenario)):
            self.scenario.life(stage)
        return recording, stage.told

    def after(self, files: Files, promise: Promise, scenario: Scenario) -> Theatre:
        """Another life, which begins with what was left of this one; its points count here."""
        return replace(self, scenario=scenario, before=files, promised=promise)

    def check(self, files: Files, promise: Promise, what: str) -> None:
        """Hold a state against what was promised, unless that was done already."""
        if not self.points.is_new(files, promise):
            return
        place = self.folder / "after"
        write_files(files, place)
        try:
            with repeatable("check"):
                check(place / IMAGE, self.secret, promise, thorough=self.points.checked % 2 == 0)
        except BaseException as error:
            error.add_note(f"{self.scenario}, {'encrypted' if self.encrypted else 'plain'}: {what}")
            raise


def go_on(stage: Stage) -> None:
    """After an error: more work with the objects that met it, then their end."""
    repository, stage.repository = stage.repository, None
    if repository is None:
        return
    stage.back_up(repository, "fourth", day=60)
    with suppress(IntegrityError):  # not in a repository that has met damage
        stage.prune(repository)
    stage.compact(repository)
    repository.close()


def tidy_up(stage: Stage) -> None:
    """After an error: what the objects in memory take for dead is destroyed, and nothing else is done."""
    repository, stage.repository = stage.repository, None
    if repository is not None:
        repository.store.reclaim()
        repository.close()


def give_up(stage: Stage) -> None:
    """After an error: nothing but what the end of a process does."""
    repository, stage.repository = stage.repository, None
    if repository is not None:
        with suppress(FerrotypeError):
            repository.close()
