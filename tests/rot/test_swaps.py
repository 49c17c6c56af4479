"""Valid bytes in the wrong place: records swapped, taken from other images and older states, blocks lost or doubled.

Each such record is whole in itself.  What gives it away is that it is not the one that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations, product
from pathlib import Path

import pytest

from ferrotype.engine.verify import verify
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.objects.layout import ANCHORS_AT, BLOCK, RECORDS_AT, Anchor, RecordHeader
from tests.repository.small import back_up, open_at
from tests.rot.small_image import ALL, FORKED, QUICK, Live, SmallImage, make, opened, outcome

HEAD = RecordHeader.SIZE


def part(whole: bytes, live: Live, low: int, high: int) -> bytes:
    return whole[live.offset + low : live.offset + high]


def put(image: SmallImage, offset: int, data: bytes) -> bytearray:
    content = bytearray(image.whole)
    content[offset : offset + len(data)] = data
    return content


def pieces(live: Live) -> Iterator[tuple[int, int]]:
    """A record: all of it, its header, what follows."""
    yield from ((0, live.span), (0, HEAD), (HEAD, live.span))


def test_records_swapped_whole_or_in_part_are_told(image: SmallImage) -> None:
    """Every record with, and in the place of, every other one, of its kind and of others."""
    swaps = 0
    assert {record.span for record in image.records} == {BLOCK}
    for one, other in permutations(image.records, 2):
        for low, high in pieces(one):
            content = put(image, one.offset + low, part(image.whole, other, low, high))
            where = f"{other.what} at {other.offset} in the place of {one.what} at {one.offset}, {low} to {high}"
            assert outcome(content, image, one.needed_by) != "ok", where
            swaps += 1
            if one.offset < other.offset:
                content[other.offset + low : other.offset + high] = part(image.whole, one, low, high)
                hit = one.needed_by | other.needed_by
                assert outcome(content, image, hit) != "ok", f"{where}, and the other way round"
                swaps += 1
    assert swaps > 900
    print(f"{swaps} swaps, all told")  # noqa: T201


# ---------------------------------------------------------------------- other images


def fork(image: SmallImage, path: Path) -> SmallImage:
    """A copy of the file that lived on in another way: the same keys, uuid, places and sequence numbers."""
    path.write_bytes(image.states[-1])
    with open_at(path, image.secret, writable=True) as repository:
        back_up(repository, FORKED, "forked", day=2)
    return seen(path, image)


def copied(image: SmallImage, path: Path) -> SmallImage:
    """The same objects, and so the same keys, in a container of its own."""
    store = Container.create(path)
    with opened(image.whole, image.secret) as repository:
        for info in repository.store.list(""):
            store.put(info.name, [repository.store.get(info.name)])
            store.flush()
    store.close()
    return seen(path, image)


def stranger(image: SmallImage, path: Path) -> SmallImage:
    """Another image made in the same way."""
    return make(path, image.secret)


def seen(path: Path, image: SmallImage) -> SmallImage:
    """An image in a file, with its records by where they stand."""
    store = Container.open(path)
    entries = [*store.live(), *store.catalogs()]
    store.close()
    live = tuple(Live(e.name or "catalog", e.offset, HEAD + e.length, e.span) for e in entries)
    whole = path.read_bytes()
    path.unlink()
    return SmallImage(whole, image.secret, live, {})


@pytest.mark.parametrize("other", [fork, copied, stranger])
def test_records_of_another_image_are_told(image: SmallImage, tmp_path: Path, other: object) -> None:
    assert callable(other)
    foreign: SmallImage = other(image, tmp_path / "other.ferro")
    told = 0
    for one, two in product(image.records, foreign.records):
        for low, high in ((0, one.span), (HEAD, one.span))[: 2 if image.secret is None else 1]:
            content = put(image, one.offset + low, part(foreign.whole, two, low, high))
            if content != image.whole:
                where = f"{two.what} of another image in the place of {one.what} at {one.offset}, {low} to {high}"
                forked = (
                    other is fork and one.what == two.what == "catalog"
                )  # it may lead to the other life's objects
                assert outcome(content, image, ALL if forked else one.needed_by) != "ok", where
                told += 1
    assert told > 180
    for at in (0, *ANCHORS_AT):
        content = put(image, at, foreign.whole[at : at + BLOCK])
        if content != image.whole and other is not fork:
            assert outcome(content, image, frozenset() if at else ALL) != "ok", f"the block at {at} of another image"


# ---------------------------------------------------------------------- older states


def test_blocks_of_an_older_state_are_told(image: SmallImage) -> None:
    """But for the two that may be so after any power cut: an older anchor, from which the newest state is found."""
    silent = 0
    for state in image.states:
        for at in range(0, min(len(state), len(image.whole)), BLOCK):
            content = put(image, at, state[at : at + BLOCK])
            if content == image.whole:
                continue
            hit = frozenset().union(*(live.needed_by for live in image.live if live.offset == at))
            said = outcome(content, image, hit)
            if at in ANCHORS_AT or any(start <= at < end for start, end in image.meaningless):
                silent += said == "ok"
            else:
                assert said != "ok", f"the block at {at} of an older state"
    assert silent


def test_older_anchors_lead_to_the_newest_state(image: SmallImage) -> None:
    for state in image.states:
        content = bytearray(image.whole)
        content[BLOCK:RECORDS_AT] = state[BLOCK:RECORDS_AT]
        assert outcome(content, image, frozenset()) in ("ok", "told")
    first, second = (image.whole[at : at + BLOCK] for at in ANCHORS_AT)
    assert outcome(put(image, BLOCK, second + first), image, frozenset()) == "ok"
    assert outcome(put(image, BLOCK, second + second), image, frozenset()) == "ok"
    assert outcome(put(image, BLOCK, bytes(2 * BLOCK)), image, frozenset()) == "told"


def test_a_whole_older_file_is_an_older_image(image: SmallImage) -> None:
    """What cannot be told, and format.md says so: all of it is as it was."""
    for number, state in enumerate(image.states):
        with opened(state, image.secret) as repository:
            assert verify(repository, QUICK, NullJob()).ok, number
            names = {snapshot.name for snapshot in repository.snapshots()}
        assert names == [set(), {"gone"}, {"gone", "second"}, {"gone", "second"}, {"second"}][number]


def test_an_older_end_behind_a_newer_beginning_is_told(image: SmallImage) -> None:
    for state in image.states:
        for at in range(RECORDS_AT, max(len(state), len(image.whole)), BLOCK):
            content = image.whole[:at] + state[at:]
            if content != image.whole:
                assert outcome(content, image) != "ok", at


# ---------------------------------------------------------------------- blocks


def test_blocks_in_the_place_of_others_are_told(image: SmallImage) -> None:
    places = range(0, len(image.whole), BLOCK)
    for at, other in permutations(places, 2):
        content = put(image, at, image.whole[other : other + BLOCK])
        dead = any(start <= at < end for start, end in image.meaningless)
        expected = dead or (at in ANCHORS_AT and other in ANCHORS_AT)
        hit = frozenset().union(*(live.needed_by for live in image.live if live.offset == at))
        if any(start == other for start, _ in image.meaningless):
            hit = ALL  # a filler says how much of what follows is dead, and a search believes it
        assert (outcome(content, image, hit) == "ok") == expected, f"block {other} at {at}"


def test_blocks_dropped_or_doubled_are_told(image: SmallImage) -> None:
    for at in range(0, len(image.whole), BLOCK):
        dropped = image.whole[:at] + image.whole[at + BLOCK :]
        doubled = image.whole[: at + BLOCK] + image.whole[at:]
        assert outcome(dropped, image) != "ok", at
        if at + BLOCK < len(image.whole):
            assert outcome(doubled, image) != "ok", at


def test_an_anchor_in_the_wrong_place_is_none(image: SmallImage) -> None:
    """One that points at a record that is no catalog, or at a catalog by a wrong number."""
    uuid = image.whole[16:32]
    newest = max((Anchor.unpack(image.whole, at) for at in ANCHORS_AT), key=lambda anchor: anchor.generation)
    for record in image.records:
        header = RecordHeader.unpack(image.whole, record.offset)
        if record.what == "catalog" and header.sequence <= newest.sequence:
            continue
        forged = Anchor(newest.magic, newest.generation + 1, uuid, header.sequence, record.offset, 0, 0, 0, bytes(16))
        content = put(image, ANCHORS_AT[(newest.generation + 1) % 2], forged.pack())
        assert outcome(content, image, frozenset()) != "ok", record
