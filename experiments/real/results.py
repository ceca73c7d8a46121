"""Print reports as one short table, and write them as rows for experiments/results.

python -m experiments.real.results --report runs/real_gpu/judged/*/report.json --out rows.csv
"""

import argparse
import csv
import json
import sys
from pathlib import Path

from evocomp.log import exit_code

COLUMNS = (
    "method,kept,accuracy,low,high,relative,loyalty,difference_vs_evocomp,difference_vs_evocomp_low,"
    "difference_vs_evocomp_high,p_vs_evocomp,n,needs_llm,seeds"
).split(",")


def write_rows(rows: list[dict], path: Path) -> None:
    """Write one line per method and number of kept tokens, with accuracies by question type; floats with 4 digits."""
    kinds = sorted({kind for row in rows for kind in row["by_kind"]})
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, *kinds, "not_applicable"])
        for row in rows:
            values = [*(row[c] for c in COLUMNS), *(row["by_kind"].get(kind) for kind in kinds), row["not_applicable"]]
            writer.writerow([f"{value:.4f}" if isinstance(value, float) else value for value in values])


def short_table(rows: list[dict]) -> str:
    """Accuracy by method and number of kept tokens, with the paired p value against this run's compressor."""
    kept = sorted({row["kept"] for row in rows if row["method"] == "evocomp"}, reverse=True)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [f"{'':18s}" + "".join(f"{count:>15d}" for count in kept)]
    for method in methods:
        own = {row["kept"]: row for row in rows if row["method"] == method}
        found = [own.get(count, next(iter(own.values())) if len(own) == 1 else None) for count in kept]
        lines.append(f"{method:18s}" + "".join(f"{_cell(row):>15s}" for row in found))
    return "\n".join(lines)


def _cell(row: dict | None) -> str:
    if row is None or row["accuracy"] is None:
        return "-"
    p = row["p_vs_evocomp"]
    return f"{row['accuracy']:.3f}" + (f" p={p:.3f}" if p is not None else "")


def joined(reports: list[list[dict]]) -> list[dict]:
    """Rows of several reports on the same questions; rows that are in several reports appear once."""
    rows: dict[tuple[str, int], dict] = {}
    for row in (row for report in reports for row in report):
        rows.setdefault((row["method"], row["kept"]), row)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    rows = joined([json.loads(path.read_text()) for path in args.report])
    if args.out is not None:
        write_rows(rows, args.out)
    print(short_table(rows))


if __name__ == "__main__":
    sys.exit(exit_code(main, "results"))
