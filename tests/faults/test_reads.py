"""Any read fails: once, or all of them from then on.  Nothing may be lost, or deleted, because of it.

pytest tests/faults/test_reads.py -k 'prune-plain' -s
"""

from __future__ import annotations

import pytest

from ferrotype.testing.faults import Fault, Faults
from tests.faults.runs import Theatre, casts, give_up, go_on
from tests.faults.test_refused import counted, hold, play

_BLIND = 3  # of so many reads one is where all later ones begin to fail


@pytest.mark.parametrize("theatre", casts(), indirect=True)
def test_unreadable_once(theatre: Theatre) -> None:
    for number in range(0, counted(theatre).reads, theatre.step):
        faults = Faults(at=number, how=Fault.UNREADABLE)
        told = play(theatre, faults, go_on)
        assert faults.struck
        hold(theatre, told, f"read {number} failed")


@pytest.mark.parametrize("theatre", casts(), indirect=True)
def test_a_bad_place(theatre: Theatre) -> None:
    """What was read there cannot be read again; the writer must not take it for never written."""
    for number in range(0, counted(theatre).reads, theatre.step):
        told = play(theatre, Faults(at=number, how=Fault.BAD), give_up)
        hold(theatre, told, f"what read {number} was for cannot be read")


@pytest.mark.parametrize("theatre", casts(), indirect=True)
def test_unreadable_from_then_on(theatre: Theatre) -> None:
    for number in range(0, counted(theatre).reads, _BLIND):
        told = play(theatre, Faults(at=number, how=Fault.BLIND), give_up)
        hold(theatre, told, f"read {number} and all later ones failed")
