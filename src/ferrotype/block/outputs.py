"""The files one output consists of, which all appear at once or not at all.

    disk.vmdk        the main file, named by the user         committed last
    disk-flat.vmdk   what it refers to                        committed before

Every file stands under a hidden temporary name until ``commit``; leaving the block without one removes them.

One file takes the place of another in one step.  Several cannot, and old and new ones side by side could pass for one
disk.  So what several replace steps aside first:

    durable      all new files, under hidden names
    aside        the old ones, the main one first, get hidden names        from here on a crash leaves no such image:
    in place     the new ones get their names, the main one last           old and new files under hidden names
    gone         the old ones are removed

The first file stays open, and so locked, until all have their names: those that are closed before are not taken for
leftovers then.  The old ones aside never are.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, takewhile
from pathlib import Path
from typing import Final, Self

from ferrotype.block.file import PROMISE, FileSink, sync_folder
from ferrotype.block.inventory import same_storage, uses
from ferrotype.errors import Refused, WriteError
from ferrotype.fresh import aside_name, true_name
from ferrotype.stall import Patience, Storage
from ferrotype.trouble import why

__all__ = ["Outputs", "in_a_row"]

_OPEN: Final = 32  # complete files that stay open: by the time one is flushed, the kernel has stored most of it


class Outputs:
    """Makes the files of one output.  ``path`` is the name the user gave."""

    def __init__(
        self,
        path: Path,
        *,
        replace: bool = False,
        spared: Sequence[Path] = (),
        patience: Patience | None = None,
        behind: bool = False,
        mode: int = 0o666,
    ) -> None:
        """With ``replace`` files that exist are replaced, when the new ones are complete; never those ``spared``.

        With ``behind`` a single file is written behind (``FileSink.write``); several are not, since a write into one
        says nothing about the last one into another.  ``mode``: permissions of the files, less what the umask takes.
        """
        self.path = path
        self._replace = replace
        self._spared = spared
        self._patience = patience
        self._files: dict[Path, FileSink] = {}  # by their true names, in the order they were made
        self._complete: deque[FileSink] = deque()  # and still open
        self._others: Callable[[], Iterable[Path]] = tuple
        self._behind = behind
        self._mode = mode
        self._sign: str | None = None  # of all hidden names, once there is one

    def create(self, path: Path | None = None, size: int = 0, sector_size: int = 512) -> FileSink:
        """A new file of ``size`` zero bytes, which ``FileSink.resize`` may change; the main one without a ``path``.

        Raises Refused where the file exists and may not be replaced.
        """
        target = self.path if path is None else path
        if true_name(target) in self._files:
            raise Refused(f"{target} would be written twice by one output")
        self._check_spared(target)
        if len(self._files) == 1:  # it is no longer alone
            (first,) = self._files.values()
            first.settle()
            first.behind = False
        file = FileSink.create(
            target,
            size,
            sector_size,
            replace=self._replace and target.exists(),
            mode=self._mode,
            sign=self._sign,
            patience=self._patience,
        )
        self._sign = self._sign or file.sign
        file.behind = self._behind and not self._files
        self._files[file.path] = file
        return file

    def done(self, file: FileSink) -> None:
        """Nothing more is written to a file: it is closed before the others are, where there are many."""
        if len(self._files) > 1:
            self._complete.append(file)
        if len(self._complete) > _OPEN:
            self._complete.popleft().complete()

    def supersede(self, others: Callable[[], Iterable[Path]]) -> None:
        """Say which further files go with the main one: those that readers would join to it, or that it names.

        ``others`` gives those that exist; ``commit`` asks again, and removes what was not made anew.  Raises Refused
        where there are any and nothing may be replaced, or one is being read.
        """
        self._others = others
        self._stale()

    def commit(self) -> None:
        """Make all files durable, then give them their names, the last made first: the main one is made first.

        What they replace, and what goes with that, is removed; it is back where the last step fails.  Raises Refused
        as ``supersede`` does, and WriteError.
        """
        files = list(self._files.values())
        for file in files:
            if not file.closed:
                file.flush()
        stale = self._stale() if files else []
        if len(files) == 1 and not stale:
            files[0].commit()
            return
        replaced = [path for path in self._files if self._replace and os.path.lexists(path)]
        with self._aside([*replaced, *stale]):
            for file in reversed(files):
                file.commit()

    @property
    def alone(self) -> bool:
        """Whether the output is a single file, which can be read under its hidden name as under its own."""
        return len(self._files) == 1

    def durable(self) -> list[Path]:
        """Make all that was written durable; where the files stand, the main one first."""
        for file in self._files.values():
            if not file.closed:
                file.flush()
        return [file.place for file in self._files.values()]

    def stored_bytes(self) -> int:
        """Bytes that the files take up on their medium."""
        return sum(file.stored_bytes() for file in self._files.values())

    def close(self) -> None:
        """Close all files; those that were not committed are removed."""
        with ExitStack() as stack:
            for file in self._files.values():
                stack.callback(file.close)

    # ------------------------------------------------------------------ what was there before

    def _check_spared(self, path: Path) -> None:
        if any(same_storage(path, one) for one in self._spared):
            raise Refused(f"{path} is part of what is being read; nothing was overwritten")
        if os.path.lexists(path) and (reasons := uses(path)):
            raise Refused(f"{path} is in use: {'; '.join(reasons)}; nothing was overwritten")

    def _stale(self) -> list[Path]:
        """Files of an older output that the new one does not replace."""
        stale = [path for path in self._others() if Path(os.path.realpath(path)) not in self._files]
        for path in stale:
            if not self._replace:
                raise Refused(
                    f"{path} exists and would be read as a part of {self.path}; remove it, or allow it to be replaced"
                )
            if not path.is_file():
                raise Refused(f"{path} exists and is not a regular file; choose another name")
            self._check_spared(path)
        return stale

    @contextmanager
    def _aside(self, paths: Sequence[Path]) -> Iterator[None]:
        """Meanwhile the files have hidden names; when the block ends well they are gone, and else they are back."""
        storage = Storage(self.path, self._patience or Patience(), PROMISE)
        hidden: list[tuple[Path, Path]] = []
        try:
            for path in paths:
                away = aside_name(path)
                _rename(storage, path, away)
                hidden.append((path, away))
            for folder in dict.fromkeys(path.parent for path in paths):
                _sync(storage, folder)
            yield
        except BaseException:
            with suppress(WriteError):  # the first error is the one to be told
                self._put_back(storage, hidden)
            raise
        else:
            with ExitStack() as stack:
                for _, away in hidden:
                    stack.callback(_remove, storage, away)
        finally:
            storage.release()

    def _put_back(self, storage: Storage, hidden: Sequence[tuple[Path, Path]]) -> None:
        """As it was before: no new file has its name, and then the old ones have theirs, the main one last."""
        for file in self._files.values():
            if file.committed:
                _remove(storage, file.path)
        for path, away in reversed(hidden):
            _rename(storage, away, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def in_a_row(named: Callable[[int], Path | None], first: int) -> Iterator[Path]:
    """The numbered files that exist from number ``first`` on, up to the first that does not."""
    paths = takewhile(lambda path: path is not None and os.path.lexists(path), map(named, count(first)))
    return (path for path in paths if path is not None)


def _rename(storage: Storage, old: Path, new: Path) -> None:
    try:
        storage.call(lambda _: os.rename(old, new), WriteError)
    except OSError as error:
        raise WriteError(f"{old} cannot be renamed: {why(error)}") from error


def _remove(storage: Storage, path: Path) -> None:
    try:
        storage.call(lambda _: path.unlink(missing_ok=True), WriteError)
    except OSError as error:
        raise WriteError(f"{path} cannot be removed: {why(error)}") from error


def _sync(storage: Storage, folder: Path) -> None:
    storage.call(lambda _: sync_folder(folder), WriteError)
