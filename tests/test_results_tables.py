"""The tables of experiments/RESULTS.md are those of the rows that programs wrote."""

from experiments import tables


def test_the_tables_agree_with_the_rows():
    text = tables.RESULTS.read_text()
    assert tables.filled(text) == text, "run: python experiments/tables.py"


def test_every_table_is_printed():
    for name in tables.TABLES:
        assert f"<!-- table {name} -->" in tables.RESULTS.read_text()


def test_the_highest_value_of_a_group_is_bold_and_ties_alike():
    groups = [("references", {"full": "all"}), ("others", {"a": "A", "b": "B", "c": "C"})]
    values = {"full": {9: 0.9}, "a": {4: 0.5004, 2: 0.1}, "b": {4: 0.5, 2: 0.2}, "c": {4: 0.4}}
    lines = tables.grouped(groups, values, (4, 2))
    assert lines[2:] == [
        "| *references* | | |",
        "| all | 0.900 | |",
        "| *others* | | |",
        "| A | **0.500** | 0.100 |",
        "| B | **0.500** | **0.200** |",
        "| C | 0.400 |  |",
    ]
