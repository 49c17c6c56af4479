"""Tables as they come out on a terminal of some width."""

from __future__ import annotations

import re

import pytest

from ferrotype.cli.output import lines, shown
from ferrotype.cli.tables import Cell, coloured, table, text_width

COLUMNS = [("name", "left"), ("size", "right")]


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def plain(rows: list[list[Cell]]) -> list[str]:
    """The lines of a table, the titles not bold."""
    head, *body = lines(table(COLUMNS, rows)).split("\n")
    return [re.sub(r"\x1b\[1m|\x1b\[0m", "", head).rstrip(), *body]


def test_columns_stand_under_each_other() -> None:
    assert plain([["a", "8 MiB"], ["longer", "10 GiB"]]) == [
        "name      size",
        "a        8 MiB",
        "longer  10 GiB",
    ]
    assert plain([]) == ["name  size"]


def test_wide_and_combining_characters_take_the_columns_they_take() -> None:
    assert text_width("日本") == 4
    assert text_width("e\u0301") == 1
    assert [text_width(line) for line in plain([["日本", "1"], ["e\u0301", "2"]])] == [10, 10, 10]


def test_what_is_too_wide_goes_on_below_and_the_widest_column_gives_way() -> None:
    rows: list[list[Cell]] = [["x" * 100 + "y", "8 MiB"], ["日" * 40, "1 B"]]
    drawn = plain(rows)
    assert max(map(text_width, drawn)) == 60
    assert drawn[1] == "x" * 53 + "  8 MiB"
    assert drawn[2] == "x" * 47 + "y"
    assert drawn[3] == "日" * 26 + "     1 B"
    assert drawn[4] == "日" * 14


def test_no_name_moves_the_cursor_or_colours_the_screen() -> None:
    drawn = plain([["a\x1b[31mb\x1b[2Jc\rd\te", "1"], ["two\nlines", "2"], ["tur\u202en\u2066", "3"]])
    assert drawn[1:] == [
        r"a\x1b[31mb\x1b[2Jc\rd\te     1",
        r"two\nlines                   2",
        r"tur\u202en\u2066             3",
    ]


def test_what_would_command_a_terminal_is_escaped_and_nothing_else() -> None:
    assert shown("\x00\x07\x7f\x9b31m\u2028\udcff\U000e0041") == r"\x00\x07\x7f\x9b31m\u2028\udcff\U000e0041"
    for text in ("Ünïcode", "日本語", "e\u0301", "👩\u200d💻", "می\u200cخواهم", "שלום", "back\\slash"):
        assert shown(text) == text
    assert lines(["a\nb", "c"]) == "a\\nb\nc"  # a name makes no line of its own


def test_colours_are_for_who_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(coloured("█", "cyan")) == "\x1b[36m█\x1b[0m"
    assert lines("\x1b[36m█") == r"\x1b[36m█"  # that is somebody else's
    assert lines(table([("", "left")], [[("█", "red")]])).endswith("\x1b[31m█\x1b[0m")
    monkeypatch.setenv("NO_COLOR", "1")
    assert coloured("█", "cyan") == "█"
    assert "\x1b" not in lines(table(COLUMNS, [[("█", "red"), "1"]]))
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert coloured("█", bold=True) == "█"
