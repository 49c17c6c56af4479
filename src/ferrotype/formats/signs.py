"""Signs of formats that are no fixed bytes at a fixed place: the first lines of a text, a trailer before padding.

    | disk ... | trailer | 0 0 0 ... |        uploads in pieces and copies to devices fill the last one up

The registry and the modules of the formats ask here, so that what is recognised is also what can be opened.
"""

from __future__ import annotations

import re
from typing import Final

from ferrotype.block import Source, read
from ferrotype.units import MiB

__all__ = ["TRAILER", "is_vmdk_text", "trailer_place", "unpadded_tail"]

TRAILER: Final = 512  # bytes of the trailers of VHD and DMG, which end in zeros themselves
_MOST_PADDING: Final = 16 * MiB  # bytes looked through: every raw disk that ends in zeros pays for it
_PIECE: Final = MiB

_BOM: Final = b"\xef\xbb\xbf"
_TITLE: Final = re.compile(rb"#[ \t]*disk[ \t]*descriptor[ \t]*file", re.IGNORECASE)
_VERSION: Final = re.compile(rb'version[ \t]*=[ \t]*"?[1-9]"?[ \t]*', re.IGNORECASE)
_CID: Final = re.compile(rb"^[ \t]*(parent)?cid[ \t]*=", re.IGNORECASE | re.MULTILINE)


def is_vmdk_text(head: bytes) -> bool:
    """Whether a file that begins with ``head`` begins as the descriptor of a VMDK.

    VirtualBox goes by the title, in any of its spellings; QEMU takes comments and blank lines, then a version.
    """
    for line in re.split(rb"[\r\n]+", head.removeprefix(_BOM)):
        line = line.strip()
        if _TITLE.match(line):
            return True
        if line and not line.startswith(b"#"):
            return bool(_VERSION.fullmatch(line) and _CID.search(head.replace(b"\r", b"\n")))
    return False


def unpadded_tail(file: Source) -> tuple[int, bytes]:
    """Where the last bytes of a file begin that may hold a trailer, zeros behind it put aside, and these bytes."""
    end, least = file.size, max(0, file.size - _MOST_PADDING)
    while end > least:
        start = max(least, end - _PIECE)
        if kept := read(file, start, end - start).rstrip(b"\0"):
            last = start + len(kept)
            start = max(0, last - TRAILER)
            return start, read(file, start, min(TRAILER + last, file.size) - start)
        end = start
    return file.size, b""


def trailer_place(file: Source, cookie: bytes) -> int | None:
    """Where a trailer that begins with ``cookie`` stands whole before the padding of a file, if it does."""
    start, tail = unpadded_tail(file)
    at = tail.rfind(cookie)
    return start + at if at >= 0 and start + at + TRAILER <= file.size else None
