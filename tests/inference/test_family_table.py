"""The table of all registered families is what a run of the tiny models gives."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from tests.inference.family_table import EXACT, FIRST_LAYER, NOT_BUILT, REFUSED, rows

TABLE = Path(__file__).parents[2] / "experiments" / "results" / "families.csv"


def recorded() -> list[tuple[str, ...]]:
    with TABLE.open(newline="") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def test_at_least_35_families_are_exact_and_every_other_one_has_its_reason():
    table = recorded()
    count = Counter(verdict for _, verdict, _ in table)
    assert set(count) <= {EXACT, FIRST_LAYER, REFUSED, NOT_BUILT} and count[EXACT] >= 35
    assert all(reason for _, verdict, reason in table if verdict != EXACT)


@pytest.mark.slow
def test_the_table_is_that_of_the_installed_transformers():
    # what cannot be built depends on the packages of the machine
    made = {kind: verdict for kind, verdict, _ in rows()}
    known = {kind: verdict for kind, verdict, _ in recorded()}
    assert set(made) == set(known)
    changed = {kind: (known[kind], made[kind]) for kind in made if made[kind] != known[kind]}
    assert all(NOT_BUILT in pair for pair in changed.values()), changed
