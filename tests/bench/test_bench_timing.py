import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evocomp.bench import timing
from evocomp.bench.timing import compare, compare_all, environment, peak_memory, quantiles


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_quantiles_are_numpys(values):
    np.testing.assert_allclose(quantiles(values), np.quantile(values, [0.2, 0.5, 0.8]), rtol=1e-9, atol=1e-9)


class Clock:
    """A clock that advances only when work is done, so that results are exact."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def work(self, name, seconds, answer):
        def run():
            self.now += seconds
            self.log.append(name)
            return answer

        return name, run


def test_row_holds_times_and_their_ratio(monkeypatch):
    clock = Clock(monkeypatch)
    row = compare("b", "N=1", clock.work("slow", 0.6, 1), clock.work("fast", 0.2, 1), lambda a, b: None)
    assert (row["baseline"], row["ours"], row["shape"]) == ("slow", "fast", "N=1")
    assert row["baseline_ms"] == pytest.approx(600) and row["ours_p80_ms"] == pytest.approx(200)
    assert row["ratio"] == pytest.approx(3) and row["ratio_p20"] == pytest.approx(3)
    assert row.items() >= environment("cpu").items()


def test_samples_are_interleaved_and_alternate(monkeypatch):
    clock = Clock(monkeypatch)
    compare("b", "", clock.work("A", 1.0, 1), clock.work("B", 1.0, 1), lambda a, b: None, repeats=4)
    assert "".join(clock.log[-8:]) == "ABBAABBA"
    assert len(clock.log) > 8 + 2  # warm-up before


def test_several_implementations_alternate_with_one_baseline(monkeypatch):
    clock = Clock(monkeypatch)
    baseline, *ways = (clock.work(name, seconds, name) for name, seconds in (("A", 3.0), ("B", 1.0), ("C", 2.0)))
    rows = compare_all("b", "", baseline, ways, lambda a, b: {"answers": a + b}, repeats=2)
    assert "".join(clock.log[-6:]) == "ABCCBA"
    assert [row["answers"] for row in rows] == ["AB", "AC"]
    assert [row["ratio"] for row in rows] == [pytest.approx(3), pytest.approx(1.5)]


def test_a_named_commit_wins_over_that_of_the_checkout(monkeypatch):
    timing._commit.cache_clear()
    monkeypatch.setenv("EVOCOMP_COMMIT", "abc")
    assert environment("cpu")["commit"] == "abc"
    timing._commit.cache_clear()


def test_short_work_is_repeated_inside_the_clock(monkeypatch):
    clock = Clock(monkeypatch)
    row = compare("b", "", clock.work("A", 1e-4, 1), clock.work("B", 1.0, 1), lambda a, b: None, repeats=1)
    assert clock.log[-301:-1] == ["A"] * 300
    assert row["baseline_ms"] == pytest.approx(0.1)


def test_a_wrong_answer_gets_no_time(monkeypatch):
    clock = Clock(monkeypatch)
    with pytest.raises(AssertionError):
        compare("b", "", clock.work("A", 1.0, 1), clock.work("B", 1.0, 2), np.testing.assert_equal)
    assert clock.log == ["A", "B"]


def test_peak_memory_is_what_was_held_at_once():
    held = torch.zeros(10_000)  # noqa: F841 allocated before: not counted

    def work():
        first = torch.zeros(250_000)  # 1 MB
        second = torch.zeros(500_000)
        del first
        third = torch.zeros(125_000)
        return second, third

    assert peak_memory(work) == 3_000_000
