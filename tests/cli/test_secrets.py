"""Passphrases and key files: where they come from, who is let in, and that they stay secret."""

from __future__ import annotations

import os
import termios
import time
from pathlib import Path

import pytest

from tests.cli.conftest import PASSPHRASE
from tests.cli.program import answered, ferrotype, terminal, tree


def test_every_way_to_give_a_passphrase(locked: Path, password: Path) -> None:
    assert ferrotype("list", locked, "--password-file", password).out
    assert ferrotype("list", locked, "--password-command", f"cat '{password}'").out
    assert ferrotype("list", locked, env={"FERROTYPE_PASSWORD": PASSPHRASE}).out
    screen = answered([("Passphrase of", PASSPHRASE)], "list", locked)
    assert "snapshot" in screen
    assert PASSPHRASE not in screen


def test_5_wrong_or_missing(locked: Path, image: Path, password: Path, tmp_path: Path) -> None:
    missing = ferrotype("list", locked, code=5)
    for way in ("--password-file", "--password-command", "--key-file", "FERROTYPE_PASSWORD"):
        assert way in missing.err
    wrong = {"FERROTYPE_PASSWORD": PASSPHRASE[:-1]}
    assert PASSPHRASE[:-1] not in ferrotype("list", locked, env=wrong, code=5).err
    ferrotype("checksum", locked, "--key-file", password, code=5)  # the right words in the wrong place
    ferrotype("list", locked, "--password-file", tmp_path / "nowhere", code=5)
    ferrotype("list", locked, "--password-command", "exit 3", code=5)
    answered([("Passphrase of", "wrong")], "verify", locked, code=5)
    for words in (("list", image), ("info", image), ("verify", image)):
        assert "not encrypted" in ferrotype(*words, "--password-file", password, code=5).err
    ferrotype("backup", locked, tmp_path / "new.ferro", code=5)
    assert not (tmp_path / "new.ferro").exists()
    assert ferrotype("key", "list", locked, "--json").document["keys"]  # who may enter is no secret


def test_a_passphrase_for_a_plain_image_stops_a_backup(copy: Path, disk: Path, password: Path) -> None:
    before = copy.read_bytes()
    ferrotype("backup", disk, copy, "--password-file", password, code=5)
    assert copy.read_bytes() == before


def test_a_plain_backup_is_read_into_an_encrypted_image(image: Path, password: Path, tmp_path: Path) -> None:
    ferrotype("backup", f"{image}#ESP", tmp_path / "new.ferro", "--password-file", password)
    ferrotype("list", tmp_path / "new.ferro", code=5)


def test_a_new_image_asks_twice(disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.ferro"
    dialogue = [("New passphrase of", PASSPHRASE), ("Repeat for confirmation", PASSPHRASE)]
    screen = answered(dialogue, "backup", "--encrypt", f"{disk}#1", path)
    assert PASSPHRASE not in screen
    assert PASSPHRASE.encode() not in path.read_bytes()
    ferrotype("list", path, env={"FERROTYPE_PASSWORD": PASSPHRASE})
    ferrotype("backup", "--encrypt", f"{disk}#1", tmp_path / "other.ferro", code=5)
    ferrotype("backup", f"{disk}#1", tmp_path / "other.ferro", env={"FERROTYPE_PASSWORD": ""}, code=2)
    assert sorted(tree(tmp_path)) == ["new.ferro"]


def test_a_command_that_asks_is_run_once(disk: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    ferrotype(
        "backup", f"{disk}#1", tmp_path / "a.ferro", "--password-command", f"echo x >>'{asked}'; echo {PASSPHRASE}"
    )
    assert asked.read_text() == "x\n"


def test_ctrl_c_ends_a_prompt(locked: Path) -> None:
    with terminal("list", locked) as at:
        at.expect("Passphrase of")
        time.sleep(0.1)
        assert not termios.tcgetattr(at.fd)[3] & termios.ECHO
        began = time.monotonic()
        os.write(at.fd, b"\x03")
        at.end(130)
        assert time.monotonic() - began < 2
    with terminal("list", locked) as at:
        at.expect("Passphrase of")
        os.write(at.fd, b"\x04")  # the end of the input
        at.end(130)


def test_key_slots(disk: Path, password: Path, tmp_path: Path) -> None:
    path, key_file, other = tmp_path / "a.ferro", tmp_path / "key", tmp_path / "other"
    key_file.write_bytes(os.urandom(64))
    other.write_text("another passphrase")
    ferrotype("backup", f"{disk}#1", path, "--password-file", password)
    by_file = ("--password-file", password)
    added = ferrotype(
        "key", "add", path, *by_file, "--new-key-file", key_file, "--label", "[vault]", "--json"
    ).document
    assert (added["kind"], added["label"]) == ("keyfile", "[vault]")
    ferrotype("list", path, "--key-file", key_file)
    listed = ferrotype("key", "list", path, "--json").document["keys"]
    assert [slot["kind"] for slot in listed] == ["passphrase", "keyfile"]
    text = ferrotype("key", "list", path).out
    assert added["id"] in text
    assert "[vault]" in text
    ferrotype("key", "remove", path, listed[0]["id"][:6], "--key-file", key_file)
    ferrotype("list", path, *by_file, code=5)
    assert "last" in ferrotype("key", "remove", path, added["id"], "--key-file", key_file, code=2).err
    ferrotype("key", "add", path, "--key-file", key_file, "--new-password-file", other)
    ferrotype("list", path, "--password-file", other)
    for words in ((), ("--new-key-file", key_file, "--new-password-file", other)):
        ferrotype("key", "add", path, "--key-file", key_file, *words, code=2)
    dialogue = [("New passphrase of", "third words"), ("Repeat for confirmation", "third words")]
    answered(dialogue, "key", "add", path, "--key-file", key_file)
    ferrotype("list", path, env={"FERROTYPE_PASSWORD": "third words"})
    assert len(ferrotype("key", "list", path, "--json").document["keys"]) == 3


def test_a_plain_image_has_no_keys(copy: Path, password: Path) -> None:
    assert "not encrypted" in ferrotype("key", "list", copy).out
    assert ferrotype("key", "list", copy, "--json").document["keys"] == []
    assert "not encrypted" in ferrotype("key", "add", copy, "--new-password-file", password, code=2).err


@pytest.mark.parametrize("verb", ["backup", "list", "restore", "verify"])
def test_there_is_no_way_to_name_a_passphrase_among_the_arguments(verb: str) -> None:
    words = ferrotype(verb, "--help").out.split()
    assert {word for word in words if word.startswith("--pass")} == {"--password-file", "--password-command"}
