"""experiments/README.md lists all experiments, and all files that it names exist."""

import csv
import re
from pathlib import Path

import pytest

from experiments.tables import RESULTS, TABLES, filled

ROOT = Path(__file__).resolve().parent.parent
INDEX = (ROOT / "experiments" / "README.md").read_text()


def test_every_config_is_in_the_index():
    configs = {path.relative_to(ROOT / "experiments").as_posix() for path in (ROOT / "experiments").rglob("*.yaml")}
    configs -= {"launch/kubernetes.yaml"}  # a job, not an experiment
    listed = set(re.findall(r"^\| \[([^\]]+)\]", INDEX, re.MULTILINE))
    assert configs == {name for name in listed if name.endswith(".yaml")}


def test_what_the_index_links_to_and_runs_exists():
    for target in re.findall(r"\]\(([^)]+)\)", INDEX):
        assert (ROOT / "experiments" / target).exists(), target
    for script in re.findall(r"(?:--config |python )(experiments/\S+?)[`\s]", INDEX):
        assert (ROOT / script).is_file(), script


def test_each_config_begins_with_what_it_shows_its_cost_and_its_command():
    for path in (ROOT / "experiments").rglob("*.yaml"):
        if path.parent.name == "launch":
            continue
        head = path.read_text().split("\n")
        head = "\n".join(line for i, line in enumerate(head) if all(x.startswith("#") for x in head[: i + 1]))
        assert len(head) > 100 and re.search(r"evocomp|python", head), f"{path.name} begins without a word on itself"


@pytest.mark.parametrize("table", ["panel_nano", "panel_nano576"])
def test_a_run_has_one_row_for_each_kept_count(table):
    rows = list(csv.DictReader((ROOT / "experiments" / "results" / f"{table}.csv").read_text().splitlines()))
    keys = [(row["name"], row["seed"], row["kept"]) for row in rows]
    assert keys and sorted(keys) == sorted(set(keys))
    # no run has two names
    told = ("kept", "accuracy", "relation", "labelling_cpu_s", "training_cpu_s")
    trained = [tuple(row[name] for name in told) for row in rows if row["labelled"]]
    assert len(trained) == len(set(trained))


def test_tables_of_the_results_agree_with_the_rows():
    text = RESULTS.read_text()
    assert len(re.findall(r"<!-- table \w+ -->", text)) == len(TABLES)
    assert filled(text) == text
