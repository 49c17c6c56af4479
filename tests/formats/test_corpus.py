"""Every disk image of the shared corpus: its recorded truth, or a refusal, by the reader its content asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ferrotype.block import read
from ferrotype.errors import FerrotypeError, FormatError
from tests.formats.corpus import check_virtual_disk
from tests.formats.judges import MiB, opened
from tests.machine import corpus, unpack

NO_DISK = ("raw", "wim", "iso9660")
ENTRIES = [
    pytest.param(entry, id=entry["id"])
    for entry in corpus()
    if entry["format"] not in NO_DISK and (entry["kind"] == "container" or entry["validity"] == "malformed")
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_image_made_elsewhere(tmp_path: Path, entry: dict[str, Any]) -> None:
    path = unpack(entry, tmp_path)
    if str(entry["expect"]).startswith("refuse"):
        refused(path, partly="partial" in entry["expect"])
    elif "virtual_disk" in entry:
        check_virtual_disk(entry, path)
    else:
        opened(path).close()


def refused(path: Path, *, partly: bool) -> None:
    """Opening it is an error; where some of it may be read, reading all of it is one."""
    try:
        image = opened(path)
    except FormatError:
        return
    try:
        assert partly, "it opens"
        with pytest.raises(FerrotypeError):
            for at in range(0, image.source.size, MiB):
                read(image.source, at, min(MiB, image.source.size - at))
    finally:
        image.close()
