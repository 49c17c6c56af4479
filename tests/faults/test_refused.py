"""Storage refuses any operation: once, half done, from then on, or a sync that the kernel does not repeat.

pytest tests/faults/test_refused.py -k 'for_a_while and compact-front-plain' -s
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ferrotype.errors import FerrotypeError
from ferrotype.testing.faults import Fault, Faults
from ferrotype.testing.recording import read_files
from tests.faults.promises import Told
from tests.faults.runs import Theatre, casts, give_up, go_on, repeatable, tidy_up
from tests.faults.scenarios import IMAGE, Stage


def play(theatre: Theatre, faults: Faults, then: Callable[[Stage], None]) -> Told:
    """The life until an error, if there is one, and what comes then; what was promised."""
    stage = theatre.stage(faults.opener, lambda: faults.operations)
    with repeatable(str(theatre.scenario)):
        try:
            theatre.scenario.life(stage)
        except FerrotypeError:
            faults.relieve()
            then(stage)
    return stage.told


def counted(theatre: Theatre) -> Faults:
    """The life with nothing failing: how many operations and reads it takes."""
    faults = Faults()
    play(theatre, faults, give_up)
    return faults


def hold(theatre: Theatre, told: Told, what: str) -> None:
    """What the life left behind keeps its promises, and there is nothing else in the folder."""
    files = read_files(theatre.folder / "life")
    strangers = [name for name in files if not name.startswith(IMAGE) and not name.startswith("source")]
    assert not strangers, f"{theatre.scenario}, {what}: {strangers} are left behind"
    theatre.check(files, told.until(1 << 30), what)


@pytest.mark.parametrize("theatre", casts(), indirect=True)
@pytest.mark.parametrize("how", [Fault.REFUSED, Fault.SHORT, Fault.FULL])
def test_refused_for_a_while(theatre: Theatre, how: Fault) -> None:
    """A full disk, then room again.  The same objects go on, with what they took to be stored or not."""
    hit = {Fault.SHORT: ("write",), Fault.FULL: ("write", "create")}
    for number, kind in list(enumerate(counted(theatre).kinds))[:: theatre.step]:
        if kind not in hit.get(how, (kind,)):
            continue
        faults = Faults(at=number, how=how)
        told = play(theatre, faults, tidy_up if how is Fault.FULL else go_on)
        assert faults.struck
        hold(theatre, told, f"operation {number}, a {kind}, {how.value}")


@pytest.mark.parametrize("theatre", casts(), indirect=True)
def test_gone_from_then_on(theatre: Theatre) -> None:
    """A stick is pulled out; what it holds is looked at afterwards."""
    for number, kind in list(enumerate(counted(theatre).kinds))[:: theatre.step]:
        told = play(theatre, Faults(at=number, how=Fault.GONE), give_up)
        hold(theatre, told, f"operation {number}, a {kind}, and all later ones refused")


@pytest.mark.parametrize("theatre", casts(), indirect=True)
def test_a_sync_that_failed_is_not_believed_later(theatre: Theatre) -> None:
    """The kernel tells of lost writes once, and shows them from memory until that is needed for something else."""
    for number, kind in enumerate(counted(theatre).kinds):
        if kind != "sync":
            continue
        faults = Faults(at=number, how=Fault.UNSYNCED)
        told = play(theatre, faults, give_up)
        next_day = Stage(theatre.folder / "life", theatre.secret, faults.opener, told)
        if next_day.path.exists():
            with repeatable("the next day"), next_day.open() as repository:
                next_day.back_up(repository, "fourth", day=60)
        faults.power_off()
        hold(theatre, told, f"operation {number}, a sync, failed and was not made up for")
