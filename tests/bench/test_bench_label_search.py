import numpy as np
import pytest
import torch

from evocomp.bench import label_search, timing
from evocomp.bench.label_search import CandidateScorer, memo_row, run, search_row
from evocomp.bench.samples import middle_sample, nano_samples

EFFORT = {"q": 6, "p": 2, "generations": 2}


@pytest.fixture(scope="module")
def sample():
    return nano_samples(1)[0]


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr(timing, "MIN_SAMPLE_SECONDS", 1e-3)


def test_every_kind_of_row_is_there():
    rows = run(repeats=1, quick=True)
    kinds = [row["bench"] for row in rows]
    assert {"label search", "ablation", "memo", "hill_climb", "growth with q", "best masks"} <= set(kinds)
    timed = [row for row in rows if not row["bench"].startswith(("growth", "best"))]  # slopes vary for such short runs
    assert all(row["ratio"] > 0 for row in timed)
    assert all({"device", "torch", "commit"} <= set(row) for row in rows)
    searches = [row for row in rows if row["bench"] == "label search"]
    assert all(row["same_best_mask"] for row in searches if "bfloat16" not in row["ours"])
    assert [row["largest_difference"] < 1e-2 for row in searches if "bfloat16" in row["ours"]] == [True]
    assert len({row["baseline_ms"] for row in rows if row["bench"] == "ablation"}) == 1, "one baseline for all"
    assert kinds.count("ablation") == len(label_search.LADDER)


def test_the_ladder_ends_with_the_defaults():
    settings = {}
    for _, saving in label_search.LADDER:
        settings |= saving
    defaults = label_search.ScorerConfig()
    assert settings == {name: getattr(defaults, name) for name in settings}
    assert set(vars(defaults)) - set(settings) == {"memo", "prefix_reuse"}


def test_baselines_agree():
    """Dropped tokens removed or masked, from pixels or from features: the same losses."""
    middle = middle_sample(groups=20, answer=3)
    kept = middle.groups.kept(np.zeros((2, middle.groups.count), np.int32))
    kept[1] = np.sort(np.random.default_rng(0).permutation(576)[: middle.groups.count])
    np.testing.assert_allclose(middle.removed(kept), middle.masked(kept), rtol=1e-5, atol=1e-5)
    assert abs(middle.removed(kept[:1]) - middle.removed(kept[1:])) > 1e-4


@pytest.mark.parametrize("bench", [memo_row, lambda *a, **k: search_row(a[0], "removed", *a[1:], **k)])
def test_a_wrong_scorer_gets_no_row(sample, bench, monkeypatch):
    right = CandidateScorer.__call__
    seen = []

    def wrong(self, features, kept, flips=False):
        seen.append(1)
        return right(self, features, kept, flips) + 1e-2 * len(seen)

    monkeypatch.setattr(CandidateScorer, "__call__", wrong)
    with pytest.raises(AssertionError):
        bench(sample, "cpu", 1, **EFFORT)


def test_another_best_mask_is_reported_with_its_loss(sample):
    good = label_search._search(sample, label_search.Published(q=6, p=2), sample.removed, 1)
    kept = np.arange(len(good.kept))
    other = label_search.replace(good, kept=kept, loss=float(sample.removed(kept[None])[0]))
    found = label_search.same_best(sample, good, other)
    apart = pytest.approx(abs(good.loss - other.loss), rel=1e-4)
    assert found == {"same_best_mask": False, "largest_difference": apart}
    assert found["largest_difference"] > 1e-3
    assert label_search.same_best(sample, good, good) == {"same_best_mask": True, "largest_difference": 0}
    with pytest.raises(AssertionError):  # a wrong loss of the mask
        label_search.same_best(sample, good, label_search.replace(good, kept=kept))


def with_losses(monkeypatch, change):
    """Replace the scorer's losses by `change(kept, losses)`."""
    right = CandidateScorer.__call__

    def changed(self, features, kept, flips=False):
        return change(kept, right(self, features, kept, flips)).astype(np.float32)

    monkeypatch.setattr(CandidateScorer, "__call__", changed)


def noise(kept, size):
    """Deterministic noise of each mask, up to `size` either way."""
    return size * np.sin(kept.astype(float) @ np.arange(1, kept.shape[1] + 1) ** 2)


def test_searches_with_another_result_are_counted(sample, monkeypatch):
    row = label_search.best_masks([sample], "cpu", **EFFORT)
    assert row["ratio"] == row["equal_loss"] == 1 and row["largest_difference"] == 0
    assert row["largest_error"] <= 1e-5
    # other rounding: ties are broken differently, and the search ends in another mask
    with_losses(monkeypatch, lambda kept, losses: losses + noise(kept, 4e-6))
    row = label_search.best_masks(nano_samples(2)[1:], "cpu", q=12, p=4, generations=3)
    assert row["ratio"] == 0 and row["largest_difference"] > 0
    assert 1e-6 < row["largest_error"] <= 1e-5 and 0 < row["largest_tie"] <= 2e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda kept, losses: losses + noise(kept, 1e-3),
        lambda kept, losses: -losses,
        lambda kept, losses: np.where(losses == losses.min(), losses + 1e-3, losses),
    ],
    ids=["noise above the tolerance", "upside down", "one of them"],
)
def test_a_search_misled_by_more_than_ties_gets_no_row(sample, monkeypatch, change):
    with_losses(monkeypatch, change)
    with pytest.raises(AssertionError):
        label_search.best_masks([sample], "cpu", **EFFORT)


def test_searches_diverge_at_ties_only(sample):
    """Masks with known losses: where two implementations may rank them differently, and where not."""
    result = label_search._search(sample, label_search.Published(q=6, p=2), sample.removed, 1)

    def scored(losses, order=(0, 1, 2)):
        kept = result.scored_kept[list(order)]
        return label_search.replace(result, scored_kept=kept, scored_losses=np.array(losses, np.float32))

    true = scored([1.0, 1.00001, 2.0])
    assert label_search.ranked_alike(true, true, torch.float32) == 0
    tie = label_search.ranked_alike(true, scored([1.00001, 1.0, 5.0], (0, 1, 3)), torch.float32)
    assert tie == pytest.approx(1e-5, rel=0.1)
    with pytest.raises(AssertionError, match="rank all masks equally"):
        label_search.ranked_alike(true, scored([1.0, 1.00001, 5.0], (0, 1, 3)), torch.float32)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        label_search.ranked_alike(true, scored([1.0, 1.1, 2.0]), torch.float32)
    with pytest.raises(AssertionError, match="do not tie"):
        monstrous = label_search.ERROR | {torch.float32: 1.0}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(label_search, "ERROR", monstrous)
            label_search.ranked_alike(true, scored([2.5, 1.0, 2.0]), torch.float32)


def test_labels_are_made_three_times_faster(sample):
    row = search_row(sample, "removed", "cpu", 3, q=48, p=12, generations=2)
    assert row["ratio"] >= 3 and row["clock"] == "process"


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_rows_of_a_format_are_scored_in_it(sample, monkeypatch, dtype):
    seen = set()

    class Watched(CandidateScorer):
        def __call__(self, features, kept, flips=False):
            seen.add(self.losses.dtype)
            return super().__call__(features, kept, flips)

    monkeypatch.setattr(label_search, "CandidateScorer", Watched)
    for bench in (
        lambda: search_row(sample, "removed", "cpu", 1, **EFFORT, dtype=dtype),
        lambda: label_search.best_masks([sample], "cpu", **EFFORT, dtype=dtype),
    ):
        seen.clear()
        row = bench()
        assert seen == {torch.bfloat16 if dtype else torch.float32}
        assert ("bfloat16" in row["ours"]) == (dtype is not None)
