"""The disks in an archive: one is opened directly, of several each by its name (``vm.ova::disk2.vmdk``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from ferrotype.block import Source, Traits
from ferrotype.block.views import Slice, Unavailable
from ferrotype.errors import FormatError, UnsupportedError, UsageError
from ferrotype.formats import Image
from ferrotype.formats.registry import FORMATS
from ferrotype.formats.related import Related
from ferrotype.formats.wrapping import open_inner, wrapped_image
from ferrotype.job import Job

__all__ = ["Entry", "archive_image", "disks_among"]

_TOLD: Final = 8  # names in a sentence


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in an archive."""

    name: str
    content: Callable[[Related], Source]  # opened, or unpacked; whoever calls closes it


def disks_among(names: Sequence[str]) -> list[str]:
    """Those that are called like disks; a file that is alone is meant whatever it is called."""
    return list(names) if len(names) == 1 else [name for name in names if _is_disk(name)]


def _is_disk(name: str) -> bool:
    path = PurePosixPath(name)
    packed, plain = _suffixes(wraps=True), _suffixes(wraps=False)
    if path.name.startswith(".") or "__MACOSX" in path.parts:
        return False
    return path.suffix.lower() in plain or path.suffix.lower() in packed


def _suffixes(*, wraps: bool) -> set[str]:
    return {suffix for row in FORMATS.values() if row.wraps == wraps and not row.tree for suffix in row.suffixes}


def archive_image(
    format: str,
    file: Source,
    related: Related,
    entries: Sequence[Entry],
    *,
    warnings: tuple[str, ...] = (),
    check: Callable[[Job], list[str]] | None = None,
) -> Image:
    """The archive as an image of its disks; it owns ``file``."""
    if not entries:
        raise UnsupportedError(f"the {format} archive holds no disk image: take out of it what is meant")
    if len(entries) == 1:
        (entry,) = entries
        row: Mapping[str, object] = {"format": format, "member": entry.name, "packed_bytes": file.size}
        return wrapped_image(_opened(entry, file, related), row, close=file.close, warnings=warnings, check=check)
    opened = ExitStack()

    def disk(entry: Entry) -> Source:
        image = _opened(entry, file, related)
        opened.callback(image.close)
        if image.missing is not None:
            raise image.missing
        for warning in image.warnings:
            related.job.warn(f"{entry.name}: {warning}")
        return Slice(image.source, 0, image.source.size)

    names = [entry.name for entry in entries]
    told = ", ".join(names[:_TOLD]) + (" ..." if len(names) > _TOLD else "")
    which = UsageError(f"{related.called or 'the archive'} holds several disks: name one as in FILE::NAME, of {told}")

    def close() -> None:
        try:
            opened.close()
        finally:
            file.close()

    return Image(
        format,
        Unavailable(1, Traits(), which),
        facts={"wrapped": [{"format": format, "packed_bytes": file.size}]},
        disks={entry.name: (lambda entry=entry: disk(entry)) for entry in entries},  # type: ignore[misc]
        warnings=warnings,
        check=check,
        close=close,
    )


def _opened(entry: Entry, file: Source, related: Related) -> Image:
    name = PurePosixPath(entry.name).name
    within = related.within(None, packed=file.size, called=name)
    content = entry.content(within)
    try:
        return open_inner(content, name, within)
    except FormatError as error:
        content.close()
        raise error.of(entry.name) from None
    except BaseException:
        content.close()
        raise
