"""In every test what a backup leaves out is proven by a second way, as ``--prove-free`` does it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ferrotype.block import Source
from ferrotype.engine import prepare
from ferrotype.engine.prove import prove
from ferrotype.engine.survey import Survey, survey
from ferrotype.job import NullJob

_LARGEST = 1 << 30  # bytes of a disk; tests of scale have made-up ones, and count what is read of them


@dataclass(slots=True)
class Proofs:
    """What was proven so far, and what could not be."""

    wanted: bool = True
    volumes: int = 0
    files: int = 0
    failed: list[str] = field(default_factory=list)

    def install(self) -> None:
        """From now on each disk that is prepared for a backup is proven."""

        def surveyed_and_proven(source: Source, **options: Any) -> Survey:
            surveyed = survey(source, **options)
            if self.wanted and source.size <= _LARGEST:
                self._prove(source, surveyed, exclude_swap_files=options.get("exclude_swap_files", False))
            return surveyed

        vars(prepare)["survey"] = surveyed_and_proven

    def _prove(self, source: Source, surveyed: Survey, *, exclude_swap_files: bool) -> None:
        for proof in prove(source, surveyed, NullJob(), exclude_swap_files=exclude_swap_files):
            self.volumes += proof.proven
            self.files += proof.files
            if not proof.proven:
                self.failed.append(f"{proof.volume.title}, {proof.volume.filesystem}: {proof.as_json()}")

    def check(self) -> None:
        """Nothing was left out since the last check that is not proven."""
        failed, self.failed = self.failed, []
        assert not failed, failed
