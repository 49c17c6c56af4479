"""``ferrotype key add | remove | list``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import click

from ferrotype.cli.frame import IMAGE, Frame, options
from ferrotype.errors import FormatError, UsageError


@contextmanager
def about(image: Path) -> Iterator[None]:
    """What is wrong is told with the image's name."""
    try:
        yield
    except (FormatError, UsageError) as error:
        raise error.of(str(image)) from None


@click.group("key")
def command() -> None:
    """Passphrases and key files of an encrypted image."""


@command.command("list")
@click.argument("image", type=IMAGE)
@options
def list_(frame: Frame, image: Path) -> None:
    """The key slots of IMAGE; needs no key."""
    with frame.run() as job:
        from ferrotype.cli.tables import table
        from ferrotype.engine.opening import open_container
        from ferrotype.repository.slots import listed_slots

        with closing(open_container(image, opener=frame.opener)) as container, about(image):
            slots = listed_slots(container, job.warn)
        for warning in container.warnings:
            job.warn(warning)
        documents: list[dict[str, object]] = [
            {"id": s.id, "kind": s.kind, "label": s.label, "created": s.created.isoformat().replace("+00:00", "Z")}
            for s in slots
        ]
        rows = [[s.id, s.kind, s.label, s.created.astimezone().strftime("%Y-%m-%d %H:%M:%S")] for s in slots]
        columns = [("slot", "left"), ("kind", "left"), ("label", "left"), ("added", "left")]
        frame.answer({"keys": documents}, table(columns, rows) if rows else f"{image} is not encrypted")


@command.command("add")
@click.argument("image", type=IMAGE)
@click.option("--new-password-file", type=IMAGE, help="Read the new passphrase from the first line of a file.")
@click.option("--new-key-file", type=IMAGE, help="The new key is a file's content.")
@click.option("--label", default="", help="Words to know the slot by.")
@options
def add(frame: Frame, image: Path, new_password_file: Path | None, new_key_file: Path | None, label: str) -> None:
    """Add a passphrase or key file that opens IMAGE; one that opens it already is asked for first."""
    with frame.run() as job:
        if new_password_file and new_key_file:
            raise UsageError("give a new passphrase or a new key file, not both")
        with frame.open_image(image, job, writable=True) as repository:
            fresh = Frame(password_file=new_password_file, key_file=new_key_file)
            if not (new_password_file or new_key_file) and not frame.interactive:
                raise UsageError("give --new-password-file or --new-key-file")
            secret = fresh.new_secret(image, ask=not (new_password_file or new_key_file))
            with about(image):
                slot = repository.add_key(secret, label)
        frame.show({"id": slot.id, "kind": slot.kind, "label": slot.label}, f"key slot {slot.id} was added")


@command.command("remove")
@click.argument("image", type=IMAGE)
@click.argument("slot")
@options
def remove(frame: Frame, image: Path, slot: str) -> None:
    """Remove a key SLOT (an id, or its beginning); the last one stays."""
    with frame.run() as job:
        with frame.open_image(image, job, writable=True) as repository, about(image):
            gone, report = repository.remove_key(slot)
        text = f"key slot {gone.id} was removed; whoever knew its key may have kept the master key"
        if report.readers:
            text += "; the image is being read, so the slot's bytes stay in it until the next `ferrotype prune`"
        frame.show({"id": gone.id, "overwritten": not report.readers}, text)
