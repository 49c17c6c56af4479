"""The files one output consists of, which all appear at once or not at all.

    disk.vmdk        the main file, named by the user         committed last
    disk-flat.vmdk   what it refers to                        committed before

Every file stands under a hidden temporary name until ``commit``; leaving the block without one removes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from ferrotype.block.file import FileSink
from ferrotype.block.inventory import same_storage
from ferrotype.errors import Refused
from ferrotype.stall import Patience

__all__ = ["Outputs"]


class Outputs:
    """Makes the files of one output.  ``path`` is the name the user gave."""

    def __init__(
        self, path: Path, *, replace: bool = False, spared: Sequence[Path] = (), patience: Patience | None = None
    ) -> None:
        """With ``replace`` files that exist are replaced, when the new ones are complete; never those ``spared``."""
        self.path = path
        self._replace = replace
        self._spared = spared
        self._patience = patience
        self._files: list[FileSink] = []

    def create(self, path: Path | None = None, size: int = 0, sector_size: int = 512) -> FileSink:
        """A new file of ``size`` zero bytes, which ``FileSink.resize`` may change; the main one without a ``path``.

        Raises Refused where the file exists and may not be replaced.
        """
        target = self.path if path is None else path
        if any(file.path == target for file in self._files):
            raise Refused(f"{target} would be written twice by one output")
        if any(same_storage(target, one) for one in self._spared):
            raise Refused(f"{target} is part of what is being read; nothing was overwritten")
        file = FileSink.create(
            target, size, sector_size, replace=self._replace and target.exists(), patience=self._patience
        )
        self._files.append(file)
        return file

    def commit(self) -> None:
        """Make all files durable, then give them their names, the last made first: the main one is made first."""
        for file in self._files:
            file.flush()
        for file in reversed(self._files):
            file.commit()

    def stored_bytes(self) -> int:
        """Bytes that the files take up on their medium."""
        return sum(file.stored_bytes() for file in self._files)

    def close(self) -> None:
        """Close all files; those that were not committed are removed."""
        with ExitStack() as stack:
            for file in self._files:
                stack.callback(file.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
