"""The part of Turtle that AFF4 volumes are described in: triples without blank nodes and collections.

    @prefix aff4: <http://aff4.org/Schema#> .
    <aff4://c215...>  a  aff4:ImageStream ;  aff4:size  "3964928"^^xsd:long ;  aff4:hash  "..." , "..." .

Written from the W3C recommendation "RDF 1.1 Turtle" (2014), section 6.5; what it has besides is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from ferrotype.errors import InvalidImage, UnsupportedError

__all__ = ["Graph", "Term", "parse"]

MOST_TRIPLES: Final = 100_000
_TYPE: Final = "http://www.w3.org/1999/02/22-rdf-syntax-ns#type"
_TOKEN: Final = re.compile(
    r"""(?P<space>(?:\s+|\#[^\n]*)+)
      | <(?P<iri>[^<>"{}|^`\\\x00-\x20]*)>
      | (?P<long>\"{3}(?:\"{0,2}(?:[^"\\]|\\.))*\"{3}|'{3}(?:'{0,2}(?:[^'\\]|\\.))*'{3})
      | (?P<text>"(?:[^"\\\r\n]|\\.)*"|'(?:[^'\\\r\n]|\\.)*')
      | (?P<directive>@prefix\b|@base\b|PREFIX\b|BASE\b)
      | (?P<language>@[A-Za-z]+(?:-[A-Za-z0-9]+)*)
      | (?P<typed>\^\^)
      | (?P<name>(?:[^\W\d_](?:[\w.-]*[\w-])?)?:(?:[\w:%/-]|\.(?=[\w:%/-])|\\.)*)
      | (?P<number>[+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?)
      | (?P<word>a\b|true\b|false\b)
      | (?P<mark>[;,.])
      | (?P<other>[\[\]()])""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE: Final = re.compile(r"\\(u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)", re.DOTALL)
_ESCAPED: Final = {"t": "\t", "b": "\b", "n": "\n", "r": "\r", "f": "\f"}


class Term(NamedTuple):
    """An object: another resource (``is_iri``), or a literal, perhaps with the IRI of its type."""

    value: str
    is_iri: bool
    datatype: str = ""


class Graph:
    """Triples, by subject and predicate."""

    def __init__(self, triples: dict[str, dict[str, list[Term]]]) -> None:
        self._triples = triples

    def all(self, subject: str, predicate: str) -> list[Term]:
        return self._triples.get(subject, {}).get(predicate, [])

    def one(self, subject: str, predicate: str) -> Term | None:
        return next(iter(self.all(subject, predicate)), None)

    def types(self, subject: str) -> set[str]:
        return {term.value for term in self.all(subject, _TYPE)}

    def of_type(self, *types: str) -> list[str]:
        """The subjects of any of the types, in the order they appear."""
        return [subject for subject in self._triples if not self.types(subject).isdisjoint(types)]


def parse(text: str) -> Graph:
    """Raises InvalidImage where it is no Turtle, UnsupportedError for what is not read."""
    return Graph(_Parser(text).triples)


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._prefixes: dict[str, str] = {}
        self._count = 0
        self.triples: dict[str, dict[str, list[Term]]] = {}
        for kind, value in self._tokens:
            if kind == "directive":
                self._directive(value)
            else:
                self._statement(self._resource(kind, value))

    def _next(self) -> tuple[str, str]:
        token = next(self._tokens, None)
        if token is None:
            raise InvalidImage("the description ends in the middle of a statement")
        return token

    def _directive(self, word: str) -> None:
        if word.lower().endswith("base"):
            raise UnsupportedError("the description has a base, which is not read")
        (kind, name), (kind_2, iri) = self._next(), self._next()
        if kind != "name" or not name.endswith(":") or kind_2 != "iri":
            raise InvalidImage(f"the prefix {name!r} of the description is none")
        self._prefixes[name[:-1]] = iri
        if word.startswith("@") and self._next() != ("mark", "."):
            raise InvalidImage(f"the prefix {name!r} of the description does not end")

    def _statement(self, subject: str) -> None:
        known = self.triples.setdefault(subject, {})
        kind, value = self._next()
        while True:
            predicate = _TYPE if (kind, value) == ("word", "a") else self._resource(kind, value)
            objects = known.setdefault(predicate, [])
            mark = ","
            while mark == ",":
                term, mark = self._object()
                objects.append(term)
                self._count += 1
                if self._count > MOST_TRIPLES:
                    raise InvalidImage("the description has too many statements")
            while mark == ";":
                kind, value = self._next()
                mark = value if kind == "mark" else ""
            if mark == ".":
                return
            if mark:
                raise InvalidImage(f"the description of {subject!r} has a comma too many")

    def _object(self) -> tuple[Term, str]:
        """An object, and the mark behind it."""
        kind, value = self._next()
        if kind not in ("long", "text"):
            literal = kind in ("number", "word")
            term = Term(value, False) if literal else Term(self._resource(kind, value), True)
            return term, self._mark(*self._next())
        text = _unescaped(value[3:-3] if kind == "long" else value[1:-1])
        kind, value = self._next()
        if kind == "typed":
            datatype = self._resource(*self._next())
            return Term(text, False, datatype), self._mark(*self._next())
        if kind == "language":
            kind, value = self._next()
        return Term(text, False), self._mark(kind, value)

    @staticmethod
    def _mark(kind: str, value: str) -> str:
        if kind != "mark":
            raise InvalidImage(f"the description has {value[:40]!r} where a statement goes on or ends")
        return value

    def _resource(self, kind: str, value: str) -> str:
        if kind == "iri":
            return value
        if kind == "name":
            prefix, _, local = value.partition(":")
            if prefix not in self._prefixes:
                raise InvalidImage(f"the description uses the prefix {prefix!r}, which it does not declare")
            return self._prefixes[prefix] + local.replace("\\", "")
        if kind == "other":
            raise UnsupportedError("the description has blank nodes or collections, which are not read")
        raise InvalidImage(f"the description has {value[:40]!r} where a resource must be")


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise InvalidImage(f"the description is no Turtle: {text[at : at + 40]!r}", offset=at)
        at = match.end()
        if match.lastgroup != "space":
            yield match.lastgroup, match[match.lastgroup]


def _unescaped(text: str) -> str:
    if "\\" not in text:
        return text
    return _ESCAPE.sub(_character, text)


def _character(match: re.Match[str]) -> str:
    code = match[1]
    if code[0] in "uU" and len(code) > 1:
        number = int(code[1:], 16)
        if number > 0x10FFFF:
            raise InvalidImage("the description has a character that does not exist")
        return chr(number)
    return _ESCAPED.get(code, code)
