import os

import pytest

from evocomp.bench import label_processes
from evocomp.config.schema import SearchConfig


@pytest.mark.slow
def test_rows():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    small = SearchConfig(population=6, parents=2, generations=1)
    queue, control = label_processes.run(repeats=2, samples=6, search=small)  # compares the labels too
    for row in (queue, control):
        assert 0 < row["ratio"] < 4 and row["wall_per_cpu"] > 0.9 and row["repeats"] == 2
        assert row["baseline_ms"] > 0 and row["cpu_seconds_ratio"] > 0.5 and 0.5 < row["ratio_by_cpu"] < 4
    assert queue["waited_ms"] >= 0 == control["waited_ms"]
