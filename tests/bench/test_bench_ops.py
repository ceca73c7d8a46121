from collections import Counter

import pytest
import torch

from evocomp.bench import ops, timing
from evocomp.bench.ops import Shape, bench_grouping, bench_separation, run

TINY = Shape(B=2, N=40, D=8, V=300, R=6)


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr(timing, "MIN_SAMPLE_SECONDS", 1e-3)


def test_every_op_has_a_row_with_its_ratio():
    rows = list(run(repeats=1, shapes=[TINY]))
    expected = {"cosine separation": 2, "head and separation": 2, "grouping": 2, "GHM-C": 1, "top-r compaction": 1}
    expected["context clusters"] = 1
    assert Counter(row["bench"].split(",")[0] for row in rows) == expected
    for row in rows:
        assert row["ratio"] > 0 and row["torch"] == torch.__version__ and "reference" in row["ours"]


OPS = ["cosine_separation", "score_separation", "ghm_bce", "vocabulary_argmax", "context_clusters"]


@pytest.mark.parametrize("name", OPS)
def test_a_wrong_op_gets_no_row(name, monkeypatch):
    right = getattr(ops, name)

    def wrong(*arguments, **options):
        answer = right(*arguments, **options)
        return ((answer[0] + 1) % TINY.V, answer[1]) if isinstance(answer, tuple) else answer * 1.01 + 1e-3

    monkeypatch.setattr(ops, name, wrong)
    with pytest.raises(AssertionError):
        list(run(repeats=1, shapes=[TINY]))


def test_chunks_need_at_most_a_quarter_of_the_memory():
    _, memory = bench_grouping(Shape(B=1, N=64, D=8, V=32_000, R=1), "cpu", repeats=1)
    assert memory["baseline_mib"] > 64 * 32_000 * 4 / 2**20
    assert memory["ratio"] >= 4


def test_factorised_separation_is_five_times_faster_at_2880_tokens():
    for row in bench_separation(Shape(B=1, N=2880, D=64, V=0, R=500), "cpu", repeats=3):
        assert row["ratio"] >= 5, row


@pytest.mark.gpu
def test_gains_on_a_gpu():
    # minimum gains: factors of speed or memory
    gates = {"cosine": 3, "head": 3, "grouping, peak memory": 4, "top-r compaction": 2}
    gates |= {"GHM-C, forward + backward, queued": 5}  # time of the GPU; launch overhead adds the same to both
    for row in run("cuda"):
        for bench, gate in gates.items():
            if row["bench"].startswith(bench):
                assert row["ratio"] >= gate, row
        if row["bench"] == "grouping, peak memory" and "kernel" in row["ours"]:
            assert row["ratio"] >= 100, row
        assert row.get("ours_waits", 0) == 0, row
