"""One AFF4 volume: a zip file, the name that it has in the world, and what it says of what is in it.

    container.description     its URN, such as aff4://685e15cc-d0fb-4dbc-ba47-48117fc77044
    version.txt               major=1  minor=0  tool=...
    information.turtle        the description
    aff4%3A%2F%2Fc215.../00000000        members of what is called aff4://c215...

Written from "AFF4 Standard v1.0a" (2022), sections 1 and 5, and the images that were published with it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Final
from urllib.parse import unquote

from ferrotype.block import Source
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats.aff4.turtle import Graph, parse
from ferrotype.formats.zipfile import Member, ZipFile
from ferrotype.units import KiB, MiB

__all__ = ["AFF4", "DESCRIPTION", "Volume"]

AFF4: Final = "http://aff4.org/Schema#"
DESCRIPTION: Final = b"information.turtle"
MOST_TURTLE: Final = 8 * MiB
_SCHEME: Final = "aff4://"


class Volume:
    """An opened volume.  It does not own its file."""

    def __init__(self, file: Source) -> None:
        """Raises InvalidImage where the file is no volume, UnsupportedError where it is of another version."""
        self.file = file
        self.zip = ZipFile(file)
        turtle = self.zip.find(DESCRIPTION)
        if turtle is None:
            raise InvalidImage("the zip file is no AFF4 volume: it has no information.turtle")
        self.version, self.tool = self._version()
        name = self._text(b"container.description") or self.zip.comment.decode("utf-8", "replace")
        self.urn = name.strip("\0\r\n ")
        self.graph: Graph = parse(_decoded(self.zip.content(turtle, MOST_TURTLE)))

    def find(self, urn: str) -> Member | None:
        """The member of a URN: of the name that the description says, or of its own, however escaped."""
        stated = self.graph.one(urn, f"{AFF4}fileName")
        names = [stated.value.removeprefix("/")] if stated is not None and not stated.is_iri else []
        if urn.startswith(f"{self.urn}/"):
            names.append(urn[len(self.urn) + 1 :])
        names.append(f"aff4%3A%2F%2F{urn.removeprefix(_SCHEME)}")
        for name in names:
            member = self.zip.find(name.encode("utf-8", "surrogatepass"))
            if member is not None:
                return member
        meant = self._meant.get(urn) or self._meant.get(unquote(urn))
        return None if meant is None else self.zip.find(meant)

    @cached_property
    def _meant(self) -> dict[str, bytes]:
        """Members' names by the URNs that they are when nothing is escaped: programs escape more, or less."""
        found: dict[str, bytes] = {}
        for name in self.zip.names():
            plain = unquote(name.decode("utf-8", "replace")).removeprefix("/")
            found.setdefault(plain if plain.startswith(_SCHEME) else f"{self.urn}/{plain}", name)
        return found

    def content(self, urn: str, most: int) -> bytes | None:
        """All of a small member, or None where there is none."""
        member = self.find(urn)
        return None if member is None else self.zip.content(member, most)

    def number(self, subject: str, name: str) -> int | None:
        """A number of the description, or None where it says none.  Raises InvalidImage."""
        term = self.graph.one(subject, AFF4 + name)
        if term is None:
            return None
        if not term.value.isascii() or not term.value.isdigit() or len(term.value) > 19:
            raise InvalidImage(f"the description says {term.value[:40]!r}, which is no number", field=name)
        return int(term.value)

    def _text(self, name: bytes) -> str:
        member = self.zip.find(name)
        return "" if member is None else _decoded(self.zip.content(member, 64 * KiB))

    def _version(self) -> tuple[str, str]:
        lines = self._text(b"version.txt").splitlines()
        said = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines[:100])}
        major = said.get("major", "1")
        if major != "1":
            raise UnsupportedError(f"version {major[:20]} of AFF4 is not known", field="major")
        return f"{major}.{said.get('minor', '0')}"[:20], said.get("tool", "")[:200]


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidImage(f"a text of the volume is no UTF-8: {error}") from None
