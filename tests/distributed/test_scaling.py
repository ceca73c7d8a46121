"""Two processes label at least 1.7 times as fast as one, where there are two idle cores."""

import os

import pytest


@pytest.mark.slow
def test_two_processes_label_nearly_twice_as_fast(ranks, tmp_path):
    one = ranks(1, "timed_label", folder=str(tmp_path / "one")).succeeded().results
    two = ranks(2, "timed_label", folder=str(tmp_path / "two")).succeeded().results
    speedup = one[0]["wall"] / max(result["wall"] for result in two)
    work = sum(result["cpu"] for result in two) / one[0]["cpu"]
    idle = one[0]["wall"] / one[0]["cpu"], max(result["wall"] / result["cpu"] for result in two)
    print(f"\nspeedup {speedup:.2f}, CPU-seconds {work:.2f} times those of one process; {one} {two}")
    assert sum(result["forwards"] for result in two) == one[0]["forwards"]
    if (os.cpu_count() or 1) < 2 or max(idle) > 1.1:
        pytest.skip(f"no two idle cores: wall time is {max(idle):.1f} times CPU time")
    assert speedup >= 1.7
