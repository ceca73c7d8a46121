"""Credits from the masks that a search has scored, for every strategy, against the definition."""

import numpy as np
import pytest

from evocomp.config.schema import GroupingConfig, LabelConfig, SearchConfig
from evocomp.labels.hard import HardLabels
from evocomp.labels.searched_credit import SearchedCredits
from evocomp.scoring.scorer import CandidateScorer
from evocomp.search import STRATEGIES


def build(nano, ids, strategy, probabilities=False):
    search = SearchConfig(strategy=strategy, population=16, parents=4, generations=2)
    labels = LabelConfig(target="credit", credit_masks_from="search")
    hard = HardLabels(ids, CandidateScorer(nano), GroupingConfig(), search, labels, 0)
    return SearchedCredits(hard, probabilities)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_credits(nano, encoded, strategy):
    samples = encoded[:3]
    kind = build(nano, [f.id for f in samples], strategy)
    records = list(kind.make(0, kind.search.ids, lambda ids: samples, {}, None))
    assert [record["id"] for record in records] == [f.id for f in samples]
    for features, record in zip(samples, records, strict=True):
        groups, result = kind.search.search_first(features)
        assert record["best_loss"] == np.float32(result.loss)
        gains = np.minimum(result.scored_losses.astype(np.float64), 6.0)
        gains = (gains.mean() - gains) / (gains.std(ddof=1) + 0.1)
        for token in range(len(features.visual)):  # one by one, by definition
            holds = (result.scored_kept == token).any(axis=1)
            expected = gains[holds].mean() if holds.any() else 0.0
            assert record["credits"][token] == pytest.approx(expected, abs=2e-3)
        alone = [token for token in range(144) if groups.sizes[groups.of[token]] == 1]
        assert np.abs(record["credits"][alone].astype(float)).max(initial=0) < 1e-3


def test_probability_targets(nano, encoded):
    kind = build(nano, [encoded[0].id], "published", probabilities=True)
    (record,) = kind.make(0, kind.search.ids, lambda ids: encoded[:1], {}, None)
    assert 0 < record["credits"].min() and record["credits"].max() < 1


def test_a_gradient_finds_better_masks_than_the_first_population_of_others(nano, encoded):
    """The first population is drawn from the gradient of the loss."""
    first = {}
    for strategy in ("uniform_crossover", "gradient_seeded"):
        kind = build(nano, [], strategy)
        first[strategy] = np.mean([kind.search.search_first(f)[1].trace[0, 1] for f in encoded[:12]])
    assert first["gradient_seeded"] < first["uniform_crossover"]
