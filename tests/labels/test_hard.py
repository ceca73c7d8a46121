"""Hard labels: the published search on the nano MLLM improves the loss, and later rounds never make it worse."""

import numpy as np
import pytest

from evocomp.config.schema import GroupingConfig, LabelConfig, SearchConfig
from evocomp.grouping.groups import Groups
from evocomp.labels.hard import HardLabels
from evocomp.scoring.scorer import CandidateScorer

SMALL = SearchConfig(population=16, parents=4, generations=2)


class Watched(CandidateScorer):
    """A scorer that records every mask."""

    def __init__(self, mllm):
        super().__init__(mllm)
        self.round = 0
        self.asked: list[tuple[int, int, np.ndarray, np.ndarray]] = []

    def __call__(self, features, kept, flips=False):
        losses = super().__call__(features, kept, flips)
        self.asked.append((self.round, features.id, kept, losses))
        return losses

    def of(self, id: int, round: int = 0) -> list[tuple]:
        """Masks of a sample that were scored in a round."""
        return [tuple(row) for at, of, kept, _ in self.asked if (at, of) == (round, id) for row in kept.tolist()]


@pytest.fixture
def make(nano, encoded):
    """make(ids, ...) -> (records by id, the scorer)."""
    by_id = {f.id: f for f in encoded}

    def start(ids, search=SMALL, labels=None, grouping=None, seed=0, rounds=1, scores=None):
        scorer = Watched(nano)
        kind = HardLabels(
            ids,
            scorer,
            grouping or GroupingConfig(),
            search,
            labels or LabelConfig(),
            seed,
            nano.processor.tokenizer.all_special_ids,
        )

        def encode(wanted):
            return [by_id[id] for id in wanted]

        history, previous = [], {}
        for round in range(rounds):
            scorer.round = round
            previous = {r["id"]: r for r in kind.make(round, ids, encode, previous, scores)}
            history.append(previous)
        return (history if rounds > 1 else history[0]), scorer

    return start


@pytest.fixture(scope="module")
def ids(encoded):
    return [f.id for f in encoded[::5]]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k], equal_nan=True) for k in a if k != "id")


def test_the_published_search_beats_its_first_population_and_all_tokens(make, encoded):
    """q = 48, p = 12, L = 10, as published."""
    ids = [f.id for f in encoded[::4]]
    records, scorer = make(ids, SearchConfig())
    for id in ids:
        record = records[id]
        masks = [(kept, losses) for _, of, kept, losses in scorer.asked if of == id and kept.shape[1] < 144]
        first, losses = masks[0]
        assert len(first) <= 48 and len(first) + record["saved"] >= 48
        assert record["first_best"] == losses.min()
        assert record["best_loss"] <= losses.min()
        assert record["evaluations"] + record["saved"] == 48 * 11
    mean = {k: np.mean([records[id][k] for id in ids]) for k in ("best_loss", "first_best", "first_mean", "full_loss")}
    assert mean["best_loss"] < mean["full_loss"]
    assert mean["best_loss"] < 0.8 * mean["first_best"] < mean["first_mean"]


def test_a_label_keeps_one_token_of_each_group_and_stores_its_loss(make, ids, nano, encoded):
    records, _ = make(ids)
    by_id = {f.id: f for f in encoded}
    for id, record in records.items():
        groups = Groups(record["groups"])
        kept = record["kept"].astype(int)
        assert len(record["groups"]) == 144 and len(kept) == groups.count
        assert sorted(groups.of[kept].tolist()) == list(range(groups.count))
        assert (np.diff(kept) > 0).all()
        again = CandidateScorer(nano)
        assert again(by_id[id], kept[None])[0] == pytest.approx(record["best_loss"], abs=1e-5)
        assert again.full(by_id[id]) == pytest.approx(record["full_loss"], abs=1e-5)
        assert record["best_loss"] <= record["losses"].min()
        assert record["population"].shape == (16, groups.count) and record["losses"].shape == (16,)


def test_groups_are_nearest_words(make, ids, nano, encoded):
    records, _ = make(ids[:2])
    by_id = {f.id: f for f in encoded}
    for id, record in records.items():
        tokens, words = by_id[id].visual.double(), nano.vocabulary.double()
        cosine = (tokens / tokens.norm(dim=1, keepdim=True)) @ (words / words.norm(dim=1, keepdim=True)).T
        nearest = cosine.argmax(1)
        same_word = nearest[:, None] == nearest[None]
        assert np.array_equal(same_word.numpy(), record["groups"][:, None] == record["groups"][None])


def test_no_mask_is_scored_twice(make, ids):
    history, scorer = make(ids, labels=LabelConfig(generations_per_refresh=2), rounds=3)
    for id in ids:
        stored: set[tuple] = set()
        for round, records in enumerate(history):
            masks = scorer.of(id, round)
            assert len(set(masks)) == len(masks) and not stored & set(masks)
            # all tokens once, in round 0 only
            assert len(masks) == records[id]["evaluations"] + (round == 0) <= 16 * (3, 2, 2)[round] + 1
            groups = Groups(records[id]["groups"])
            stored = {tuple(row) for row in groups.kept(records[id]["population"].astype(int)).tolist()}
            stored.add(tuple(records[id]["kept"].tolist()))
    assert scorer.forwards == sum(len(kept) for _, _, kept, _ in scorer.asked)


def test_a_refresh_never_loses_the_best(make, ids):
    history, _ = make(ids, labels=LabelConfig(generations_per_refresh=1), rounds=4)
    improved = 0
    for before, after in zip(history, history[1:], strict=False):
        for id in ids:
            assert after[id]["best_loss"] <= before[id]["best_loss"]
            assert after[id]["full_loss"] == before[id]["full_loss"]
            assert after[id]["first_best"] == before[id]["first_best"]
            assert np.array_equal(after[id]["groups"], before[id]["groups"])
            if after[id]["best_loss"] == before[id]["best_loss"]:
                assert np.array_equal(after[id]["kept"], before[id]["kept"])
            improved += after[id]["best_loss"] < before[id]["best_loss"]
    assert improved > 3


def test_scores_seed_a_refresh_and_never_make_the_best_worse(make, ids):
    seen = []

    def scores(features, budgets):
        assert budgets is None
        seen.append([f.id for f in features])
        # a compressor with one very high score: the first token of the image's second half
        return [np.where(np.arange(144) == 72, 50.0, 0.0).astype(np.float32) for _ in features]

    labels = LabelConfig(warm_start="scores")
    history, scorer = make(ids, labels=labels, rounds=2, scores=scores)
    assert seen == [ids]  # called once for all samples, and not in round 0
    for id in ids:
        assert history[1][id]["best_loss"] <= history[0][id]["best_loss"]
        # half of the 16 candidates were drawn from the scores
        assert sum(72 in row for row in scorer.of(id, round=1)) >= 5
    plain, _ = make(ids, labels=LabelConfig(), rounds=2, scores=scores)
    assert seen == [ids] and any(not same(plain[1][id], history[1][id]) for id in ids)


def test_a_record_depends_on_seed_and_sample_alone(make, ids):
    all_of_them, scorer = make(ids)
    # two questions about an image have the same groups but different masks
    alike = [id for id in ids if np.array_equal(all_of_them[id]["groups"], all_of_them[ids[0]]["groups"])]
    assert len(alike) > 1 and scorer.of(alike[0])[1:9] != scorer.of(alike[1])[1:9]
    for order in (ids[::-1], ids[3:5]):
        some, _ = make(order)
        assert all(same(some[id], all_of_them[id]) for id in order)
    other, _ = make(ids, seed=1)
    assert not all(same(other[id], all_of_them[id]) for id in ids)


def test_random_labels_are_the_control_without_information(make, ids):
    history, scorer = make(ids, labels=LabelConfig(target="random"), rounds=2)
    assert all(kept.shape[1] == 144 for _, _, kept, _ in scorer.asked)  # only the loss of all tokens is computed
    for id in ids:
        record = history[0][id]
        groups = Groups(record["groups"])
        assert sorted(groups.of[record["kept"].astype(int)].tolist()) == list(range(groups.count))
        assert np.isnan(record["best_loss"]) and record["evaluations"] == 0
        assert same(history[1][id], record)


@pytest.mark.parametrize(
    ("grouping", "count"),
    [
        (GroupingConfig(count=9), 9),
        (GroupingConfig(count=40), 40),
        (GroupingConfig(method="dpc_knn", count=12), 12),
    ],
)
def test_number_of_groups_can_be_set(make, ids, grouping, count):
    records, _ = make(ids[:3], grouping=grouping)
    assert all(Groups(r["groups"]).count == count == len(r["kept"]) for r in records.values())


def test_centring_makes_more_groups(make, ids):
    counts = [
        np.mean([record["groups"].max() for record in make(ids, grouping=GroupingConfig(centre=centre))[0].values()])
        for centre in (False, True)
    ]
    assert counts[1] > 1.2 * counts[0]


@pytest.mark.parametrize("mask", [True, False])
def test_special_words_are_left_out_only_if_asked(nano, encoded, mask):
    """Declare the word that most tokens are nearest to as special."""
    tokens, words = encoded[0].visual.double(), nano.vocabulary.double()
    cosine = (tokens / tokens.norm(dim=1, keepdim=True)) @ (words / words.norm(dim=1, keepdim=True)).T
    favourite = int(cosine.argmax(1).mode().values)
    grouping = GroupingConfig(mask_special=mask)
    labels = HardLabels([], CandidateScorer(nano), grouping, SMALL, LabelConfig(), 0, [favourite])
    if mask:
        cosine[:, favourite] = -2
    nearest = cosine.argmax(1).numpy()
    of = labels.groups(encoded[0]).of
    assert np.array_equal(of[:, None] == of[None], nearest[:, None] == nearest[None])
