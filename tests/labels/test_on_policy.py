"""On-policy rounds on known losses: draws, advantages, samples without differences, and copied priorities."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evocomp.config.schema import LabelConfig
from evocomp.labels.on_policy import CAP, FLOOR, OnPolicyRounds
from evocomp.log import UserError
from evocomp.losses import plackett_luce_log_prob

N = 20
LOGITS = np.linspace(-1, 1, N).astype(np.float32)


class Landscape:
    """Losses of masks: id / 40 for each kept token below N / 2, so that all losses of sample 0 are equal."""

    def __init__(self):
        self.masks = 0
        self.asked = set()

    def each(self, features, kept, context):
        self.asked.add((kept.shape[-1], context))
        assert (np.diff(kept, axis=-1) > 0).all(), "ascending, distinct"
        self.masks += kept.shape[0] * kept.shape[1]
        hard = np.array([one.id for one in features])[:, None] / 40
        return (hard * (kept < N // 2).sum(-1)).astype(np.float32)


class First:
    """Round 0 of another kind of label."""

    def chunks(self, round, previous):
        return [[0, 1]]

    def make(self, round, ids, encode, previous, scores):
        yield from ({"id": id, "credits": np.zeros(N, np.float16)} for id in ids)


def build(ids=range(40), seed=0, sharp=0.0, hedge=0.0, **settings):
    scorer = Landscape()
    defaults = {"proposal_sizes": (4, 8), "samples_per_refresh": 16, "chunk_size": 5, "proposals": 16, "probes": 0}
    labels = LabelConfig(**(defaults | settings))
    return OnPolicyRounds(First(), list(ids), scorer, labels, seed, sharp, hedge), scorer


def encode(ids):
    return [SimpleNamespace(id=id, visual=torch.zeros(N, 2), priority=torch.arange(N)) for id in ids]


def scores(features, budgets):
    assert len(budgets) == len(features)
    return [LOGITS for _ in features]


def make(rounds, round, previous, order=1):
    """All records of a round by id; `order` -1 makes its chunks in reverse order."""
    found = {}
    for ids in rounds.chunks(round, previous)[::order]:
        found |= {record["id"]: record for record in rounds.make(round, ids, encode, previous, scores)}
    return found


def drawn(records):
    return {id for id, record in records.items() if record["draws"].size}


def test_records_contain_proposals_and_advantages():
    rounds, _ = build()
    records = make(rounds, 1, {})
    assert records.keys() == set(range(40))
    for id in drawn(records):
        record = records[id]
        draws = record["draws"].astype(int)
        assert draws.shape[0] == 16 and draws.shape[1] in (4, 8)
        losses = np.minimum(id / 40 * (draws < N // 2).sum(1), 6.0)
        assert record["spread"] == pytest.approx(losses.std(ddof=1), rel=1e-5)
        expected = (losses.mean() - losses) / (losses.std(ddof=1) + 0.1)
        assert np.allclose(record["advantages"], expected, atol=1e-5)
        old = plackett_luce_log_prob(torch.from_numpy(LOGITS)[None], torch.from_numpy(draws)[None])[0]
        assert np.allclose(record["log_prob"], old, atol=1e-5)


def test_a_chunk_depends_on_its_arguments_only():
    """A record depends neither on earlier calls nor on the other samples of its chunk."""
    first = make(build()[0], 1, {})
    for round, previous in ((1, {}), (2, first)):
        rounds, _ = build()
        expected = make(rounds, round, previous)
        chunks = rounds.chunks(round, previous)
        mixed = [chunks[0][0], chunks[-1][0], chunks[1][0]]
        for ids in (*chunks, mixed):
            alone, _ = build()
            later, _ = build()
            later.chunks(5, first)
            for one in (alone, later):
                for record in one.make(round, ids, encode, previous, scores):
                    wanted = expected[record["id"]]
                    assert all(np.array_equal(record[name], wanted[name]) for name in wanted)
        assert drawn(expected), "some of them are proposals"


def test_proposals_follow_the_scores():
    rounds, _ = build(samples_per_refresh=40)
    kept = np.concatenate([make(rounds, 1, {})[id]["draws"][:, :4].ravel() for id in (1, 2, 3, 4, 5, 6, 7, 8)])
    high, low = (kept >= N // 2).mean(), (kept < N // 2).mean()
    odds = np.exp(LOGITS)
    assert high > low and high > 0.9 * odds[N // 2 :].sum() / odds.sum()


@pytest.mark.parametrize("probes", [0, 4])
def test_samples_with_equal_losses_are_dropped_and_lose_priority(probes):
    rounds, scorer = build(samples_per_refresh=40, probes=probes)
    records = make(rounds, 1, {})
    assert 0 not in drawn(records) and records[0]["spread"] == 0
    # four probes may have equal losses by chance when sixteen proposals do not
    assert len(set(range(10, 40)) - drawn(records)) <= (3 if probes else 0)
    assert all(record["spread"] > 0.1 for id, record in records.items() if id in drawn(records))
    # from the next round on their weight is 0.03, that of others up to 1.53
    again, count = 0, 0
    for round in range(2, 60):
        some = rounds.draw(round, records)
        again, count = again + (0 in some), count + len(some)
    assert count == 58 * 40, "with as many places as samples all come up"
    rounds.labels = LabelConfig(samples_per_refresh=8, proposal_sizes=(4, 8))
    shares = {id: sum(id in rounds.draw(round, records) for round in range(2, 402)) / 400 for id in (0, 39)}
    assert shares[0] < 0.05 < 0.2 < shares[39]


def test_probes_save_masks_of_samples_with_equal_losses():
    whole, all_masks = build(ids=[0, 1, 30], samples_per_refresh=3)
    make(whole, 1, {})
    probed, few_masks = build(ids=[0, 1, 30], samples_per_refresh=3, probes=4)
    records = make(probed, 1, {})
    assert all_masks.masks == 3 * 16
    assert few_masks.masks == 3 * 4 + 12 * len(drawn(records))
    # scoring in two parts gives the same records as scoring at once
    again = make(whole, 1, {})
    for id in drawn(records):
        assert np.array_equal(records[id]["draws"], again[id]["draws"])
        assert np.allclose(records[id]["advantages"], again[id]["advantages"], atol=1e-6)


def test_the_first_round_draws_evenly_and_later_ones_by_priority():
    rounds, _ = build()
    previous = {id: {"spread": 0.0 if id < 20 else 5.0} for id in range(40)}
    first = [sum(id in rounds.draw(1, {}) for id in range(20)) for _ in range(1)]
    assert 0 < first[0] < 16
    low = np.mean([sum(id < 20 for id in rounds.draw(round, previous)) for round in range(2, 200)])
    # 16 of 40 without replacement, weights 0.03 and CAP + 0.03: nearly all are of the second kind
    assert low < 16 * FLOOR / (FLOOR + CAP) * 5


def test_a_round_does_not_depend_on_order_or_interruptions():
    previous = make(build()[0], 1, {})
    forward, backward = make(build()[0], 2, previous), make(build()[0], 2, previous, order=-1)
    for id in range(40):
        assert all(np.array_equal(forward[id][name], backward[id][name]) for name in forward[id])
    other = make(build(seed=1)[0], 2, previous)
    assert drawn(other) != drawn(forward)


def test_samples_that_were_not_drawn_keep_their_priority():
    rounds, _ = build()
    previous = make(rounds, 1, {})
    later = make(rounds, 2, previous)
    idle = set(range(40)) - set(rounds.draw(2, previous))
    assert idle and all(later[id]["spread"] == min(CAP, previous[id]["spread"]) for id in idle)


def test_round_0_is_another_kind_and_later_rounds_need_a_compressor():
    rounds, _ = build()
    assert rounds.chunks(0, {}) == [[0, 1]]
    assert [r["id"] for r in rounds.make(0, [0, 1], encode, {}, None)] == [0, 1]
    ids = rounds.chunks(1, {})[0]
    with pytest.raises(UserError, match="needs the compressor of a training run"):
        list(rounds.make(1, ids, encode, {}, None))


@pytest.mark.parametrize("probes", [0, 4])
def test_tokens_that_are_not_drawn_are_context_tokens(probes):
    """The compressor's budget is the number of drawn tokens, as at inference; the rest of a mask are context tokens."""
    rounds, scorer = build(sharp=12, proposal_sizes=(4, 8), probes=probes)
    told = set()

    def scores(features, budgets):
        told.update(budgets)
        return [LOGITS for _ in features]

    for ids in rounds.chunks(1, {}):
        for record in rounds.make(1, ids, encode, {}, scores):
            assert record["draws"].shape[-1] in (0, 3, 5)
    assert told == {3.0, 5.0} and scorer.asked == {(3, 1), (5, 3)}


def test_hedged_masks_are_filled_in_priority_order():
    rounds, scorer = build(hedge=0.5)
    seen = []

    def each(features, kept, context):
        seen.append(kept)
        return Landscape.each(scorer, features, kept, context)

    rounds.scorer = SimpleNamespace(each=each)
    records = make(rounds, 1, {})
    assert scorer.asked == {(4, 0), (8, 0)}
    assert {record["draws"].shape[1] for record in records.values() if record["draws"].size} == {2, 4}
    masks = {tuple(mask) for kept in seen for row in kept for mask in row.tolist()}
    for record in records.values():
        for draws in record["draws"].astype(int).tolist():
            rest = [token for token in range(N) if token not in draws]
            assert tuple(sorted([*draws, *rest[: len(draws)]])) in masks
