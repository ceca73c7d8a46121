import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evocomp.grouping import Groups
from evocomp.log import UserError
from evocomp.search import STRATEGIES, Published, random_genomes, run, stream

NAMES = sorted(STRATEGIES)
GROUPS = st.lists(st.integers(0, 8), min_size=1, max_size=30).map(lambda ids: Groups.from_ids(np.array(ids)))


class Landscape:
    """A loss with random additive and pairwise effects of tokens, which records the scored masks."""

    def __init__(self, num_tokens, seed, pairwise=True, sparse=False):
        rng = np.random.default_rng(seed)
        self.effect = rng.normal(size=num_tokens)
        if sparse:
            self.effect *= 3 * (rng.random(num_tokens) < 0.1)
        self.pair = pairwise * rng.normal(size=(num_tokens, num_tokens)) / 4
        self.asked = []

    def __call__(self, kept):
        assert kept.ndim == 2 and (np.diff(kept, axis=1) > 0).all()
        self.asked += [tuple(row) for row in kept.tolist()]
        pairs = self.pair[kept[:, :, None], kept[:, None, :]].sum((1, 2))
        return (self.effect[kept].sum(1) + pairs).astype(np.float32)


def search(name, groups, score, seed=0, generations=4, prior=None, **settings):
    if name == "gradient_seeded" and prior is None:
        prior = np.zeros(groups.num_tokens)
    strategy = STRATEGIES[name](**settings)
    return run(strategy, groups, score, stream(seed, 0, 0), generations, prior=prior)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(groups=GROUPS, seed=st.integers(0, 2**32))
def test_results_of_every_strategy_are_consistent(name, groups, seed):
    score = Landscape(groups.num_tokens, seed)
    result = search(name, groups, score, seed, q=14)
    # no mask is scored twice, and every mask keeps one token of every group
    assert len(set(score.asked)) == len(score.asked) == result.evaluations
    assert result.evaluations + result.saved == 14 * 5
    assert (np.sort(groups.of[np.array(score.asked)], axis=1) == np.arange(groups.count)).all()
    # all scored masks are returned in order, and the label is the best of them
    assert [tuple(row) for row in result.scored_kept.tolist()] == score.asked
    assert result.loss == result.scored_losses.min()
    assert np.array_equal(result.kept, result.scored_kept[result.scored_losses.argmin()])
    assert np.array_equal(groups.kept(result.best), result.kept)
    # the trace
    assert result.trace.shape == (5, 3) and result.trace[-1, 2] == np.float32(result.loss)
    assert (np.diff(result.trace[:, 2]) <= 0).all()
    assert np.array_equal(result.trace[:, 2], np.minimum.accumulate(result.trace[:, 0]))
    assert result.first_best == result.trace[0, 0] and (result.trace[:, 0] <= result.trace[:, 1] + 1e-4).all()
    # losses of the population are those of its masks
    again = Landscape(groups.num_tokens, seed)(groups.kept(result.population))
    assert np.allclose(again, result.losses, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "published"])
def test_with_elites_the_best_of_the_population_never_rises(name):
    groups = Groups.from_ids(np.random.default_rng(0).integers(0, 9, 60))
    score = Landscape(60, 0)
    strategy = STRATEGIES[name](q=10) if name == "hill_climb" else STRATEGIES[name](q=10, p=3)
    state = strategy.start(groups, stream(0, 0, 0), prior=np.zeros(60))
    best = np.inf
    for _ in range(12):
        state, genomes = strategy.ask(state)
        state = strategy.tell(state, score(groups.kept(genomes)))
        assert state.losses.min() <= best
        best = state.losses.min()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_random_numbers_give_the_same_bytes(name):
    groups = Groups.from_ids(np.random.default_rng(1).integers(0, 12, 80))
    a, b, c = (search(name, groups, Landscape(80, 0), seed) for seed in (5, 5, 6))
    for field in ("kept", "trace", "population", "losses", "scored_kept", "scored_losses"):
        assert getattr(a, field).tobytes() == getattr(b, field).tobytes()
    assert a.scored_kept.tobytes() != c.scored_kept.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_states_are_immutable_and_asking_twice_gives_the_same(name):
    groups = Groups.from_ids(np.random.default_rng(2).integers(0, 5, 30))
    strategy = STRATEGIES[name](q=8, **({} if name == "hill_climb" else {"p": 3}))
    state = strategy.start(groups, stream(0, 0, 0), prior=np.zeros(30))
    for _ in range(3):
        after, genomes = strategy.ask(state)
        before = genomes.copy()
        assert np.array_equal(strategy.ask(state)[1], genomes)
        told = strategy.tell(after, Landscape(30, 0)(groups.kept(genomes)))
        strategy.ask(told)
        assert np.array_equal(genomes, before) and np.array_equal(strategy.ask(state)[1], before)
        state = told


@pytest.mark.parametrize("name", NAMES)
def test_all_strategies_begin_with_the_same_random_population(name):
    groups = Groups.from_ids(np.random.default_rng(2).integers(0, 5, 30))
    population = np.empty((0, groups.count))  # the gradient is not used when a population is given
    first = STRATEGIES[name]().start(groups, stream(3, 1, 0), population)
    reference = Published().start(groups, stream(3, 1, 0))
    assert np.array_equal(STRATEGIES[name]().ask(first)[1], Published().ask(reference)[1])


LANDSCAPES = {
    "sparse": {"pairwise": False, "sparse": True},
    "dense": {"pairwise": False},
    "pairwise": {"pairwise": True},
}


@pytest.mark.parametrize("kind", LANDSCAPES)
def test_every_search_beats_random_masks_at_equal_evaluations(kind):
    losses = {name: [] for name in ["random", *NAMES]}
    for seed in range(8):
        groups = Groups.from_ids(np.random.default_rng(seed).integers(0, 30, 144))
        landscape = Landscape(144, seed, **LANDSCAPES[kind])
        noise = np.random.default_rng(seed).normal(size=144) * landscape.effect.std()
        for name in NAMES:
            # a prior that correlates with the effects at about 0.5, as a gradient would
            prior = -landscape.effect + 1.7 * noise if name == "gradient_seeded" else None
            losses[name].append(search(name, groups, landscape, seed, 10, prior).loss)
        masks = groups.kept(random_genomes(groups.sizes, stream(seed, 1, 0), 528))
        losses["random"].append(landscape(masks).min())
    mean = {name: np.mean(values) for name, values in losses.items()}
    spread = np.std(losses["random"]) / np.sqrt(8)
    for name in NAMES:
        assert mean[name] < mean["random"] - 2 * spread, mean


def test_the_default_run_costs_528_forwards():
    groups = Groups(np.repeat(np.arange(150), 4))
    result = run(Published(), groups, Landscape(600, 0, False), stream(0, 0, 0), 10)
    assert result.evaluations + result.saved == 528


def test_a_memo_hit_is_counted_and_not_scored():
    groups = Groups(np.array([0, 0, 1]))  # two masks exist
    score = Landscape(3, 0)
    result = run(Published(), groups, score, stream(0, 0, 0), 10)
    assert result.evaluations == 2 and result.saved == 526 and sorted(score.asked) == [(0, 2), (1, 2)]


def test_groups_with_a_single_possible_mask():
    groups = Groups(np.arange(4))
    for name in NAMES:
        result = search(name, groups, Landscape(4, 0))
        assert result.kept.tolist() == [0, 1, 2, 3] and result.evaluations == 1


def test_a_warm_start_continues_from_the_stored_population():
    groups = Groups.from_ids(np.random.default_rng(0).integers(0, 10, 60))
    score = Landscape(60, 0)
    first = run(Published(q=10, p=4), groups, score, stream(0, 0, 0), 3)
    # without crossover and mutation the next generation is made of copies of the stored population's best
    copying = Published(q=10, p=4, crossover=0, mutation=0)
    score.asked.clear()
    second = run(copying, groups, score, stream(0, 0, 1), 1, first.warm_start)
    assert score.asked == [] and second.evaluations == 0 and second.saved == 10
    parents = first.population[np.argsort(first.losses, kind="stable")[:4]].tolist()
    assert all(genome in parents for genome in second.population.tolist())
    # the trace begins with the stored population, and the label is never lost
    assert second.trace.shape == (2, 3)
    assert second.trace[0, 0] == first.losses.min() and second.trace[0, 2] == np.float32(first.loss)
    assert second.loss == first.loss and np.array_equal(second.kept, first.kept)


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_start_scores_nothing_known_and_never_gets_worse(name):
    groups = Groups.from_ids(np.random.default_rng(0).integers(0, 6, 60))
    score = Landscape(60, 0)
    first = search(name, groups, score, generations=2)
    known = {tuple(row) for row in groups.kept(first.population).tolist()} | {tuple(first.kept.tolist())}
    score.asked.clear()
    second = run(STRATEGIES[name](), groups, score, stream(0, 0, 1), 2, first.warm_start)
    assert not known & set(score.asked)
    assert second.loss <= first.loss and second.evaluations == len(score.asked)
    third = run(STRATEGIES[name](), groups, score, stream(0, 0, 2), 0, second.warm_start)
    assert third.evaluations == 0 and np.array_equal(third.kept, second.kept)


def test_a_prior_fills_half_of_the_first_population():
    groups = Groups(np.repeat(np.arange(5), 8))
    prior = np.zeros(40)
    prior[::8] = 100.0  # the first token of every group
    state = Published(q=20).start(groups, stream(0, 0, 0), prior=prior)
    _, genomes = Published(q=20).ask(state)
    assert (genomes[:10] == 0).all() and len(np.unique(genomes[10:], axis=0)) == 10


def test_a_good_prior_helps_and_the_gradient_is_standardised():
    groups = Groups.from_ids(np.random.default_rng(3).integers(0, 20, 144))
    score = Landscape(144, 3, pairwise=False)
    best = score(groups.kept(np.array([score.effect[m[m >= 0]].argmin() for m in groups.members]))[None])[0]
    seeded = search("gradient_seeded", groups, score, generations=1, prior=-score.effect)
    blind = search("uniform_crossover", groups, score, generations=1)
    assert best <= seeded.loss < blind.loss
    scaled = search("gradient_seeded", groups, score, generations=1, prior=-1e-6 * score.effect + 3)
    assert np.array_equal(scaled.scored_kept, seeded.scored_kept)


def test_gradient_seeded_needs_a_gradient():
    assert [name for name in NAMES if not STRATEGIES[name].forward_only] == ["gradient_seeded"]
    strategy = STRATEGIES["gradient_seeded"]
    with pytest.raises(UserError, match="choose a strategy without gradients"):
        run(strategy(), Groups(np.zeros(3, dtype=int)), Landscape(3, 0), stream(0, 0, 0), 1)


def test_hill_climb_tries_every_neighbour_once_until_one_is_better():
    groups = Groups.from_ids(np.random.default_rng(0).integers(0, 6, 40))
    strategy = STRATEGIES["hill_climb"](q=12)
    state = strategy.start(groups, stream(0, 0, 0))
    state, genomes = strategy.ask(state)
    state = strategy.tell(state, np.arange(12.0))
    best = state.best
    flips = []
    for _ in range(5):  # 34 neighbours at 8 a step
        state, genomes = strategy.ask(state)
        assert np.array_equal(genomes[0], best)
        changed = (genomes != best).sum(1)
        flips += genomes[changed == 1].tolist()
        state = strategy.tell(state, np.full(12, 50.0))
        if len(flips) < 34:
            assert (changed == 1).sum() >= 8
    every = [
        best.tolist()[:g] + [place] + best.tolist()[g + 1 :]
        for g, size in enumerate(groups.sizes)
        for place in range(size)
        if place != best[g]
    ]
    assert {tuple(flip) for flip in flips} == {tuple(flip) for flip in every} and len(every) == 34


def test_hill_climb_combines_improvements():
    groups = Groups(np.repeat(np.arange(12), 2))
    effect = np.tile([1.0, 0.0], 12)  # the second token of each group is better
    strategy = STRATEGIES["hill_climb"](q=16)
    population = np.zeros((1, 12), dtype=int)
    state = strategy.start(groups, stream(0, 0, 0), population, np.array([12.0]))
    state, genomes = strategy.ask(state)
    state = strategy.tell(state, effect[groups.kept(genomes)].sum(1))
    state, genomes = strategy.ask(state)
    assert effect[groups.kept(genomes)].sum(1).min() == 0.0


def test_bad_losses_and_settings_are_refused():
    groups = Groups(np.array([0, 0, 1]))
    with pytest.raises(UserError, match="loss of a mask is NaN"):
        run(Published(), groups, lambda kept: np.full(len(kept), np.nan), stream(0, 0, 0), 1)
    with pytest.raises(AssertionError, match="score gave"):
        run(Published(), groups, lambda kept: np.zeros(1 + len(kept)), stream(0, 0, 0), 1)
    with pytest.raises(UserError, match="generations"):
        run(Published(), groups, Landscape(3, 0), stream(0, 0, 0), -1)
    result = run(Published(), groups, lambda kept: np.full(len(kept), np.inf), stream(0, 0, 0), 1)
    assert result.loss == np.inf and len(result.kept) == 2
    for name in NAMES:
        for setting in ({"q": 0}, {"temperature": 0}, {"p": 0}, {"rate": 0}, {"floor": 1}, {"resampled": 0}):
            if setting.keys() <= STRATEGIES[name].__dataclass_fields__.keys():
                with pytest.raises(UserError):
                    STRATEGIES[name](**setting)


def test_a_population_of_another_grouping_is_refused():
    result = run(Published(), Groups(np.array([0, 0, 1, 1])), Landscape(4, 0), stream(0, 0, 0), 1)
    for other in ([0, 0, 1, 2], [0, 1, 1, 1]):
        with pytest.raises(UserError, match="another grouping"):
            run(Published(), Groups(np.array(other)), Landscape(4, 0), stream(0, 0, 1), 1, result.warm_start)
    broken = replace(result.warm_start, population=result.population - 1)
    with pytest.raises(UserError, match="another grouping"):
        run(Published(), Groups(np.array([0, 0, 1, 1])), Landscape(4, 0), stream(0, 0, 1), 1, broken)


def least(action, times: int = 20) -> float:
    """The minimum CPU time of several calls [s], because other processes may use the machine."""
    taken = []
    for _ in range(times):
        started = time.process_time()
        action()
        taken.append(time.process_time() - started)
    return min(taken)


@pytest.mark.parametrize("name", NAMES)
def test_overhead_of_a_generation_is_small(name):
    groups = Groups.from_ids(np.random.default_rng(0).integers(0, 15, 144))
    effect = np.random.default_rng(1).normal(size=144).astype(np.float32)
    losses = np.random.default_rng(2).random(48).astype(np.float32)
    # reference time in the same process: 200 calls take about 0.3 ms on an idle core, twice that on a busy one
    yardstick = least(lambda: [np.argsort(losses, kind="stable") for _ in range(200)])
    took = least(lambda: search(name, groups, lambda kept: effect[kept].sum(1), generations=10))
    assert took / 11 < yardstick


def test_in_a_warm_start_seeds_replace_the_worst():
    groups = Groups.from_ids(np.random.default_rng(0).integers(0, 6, 60))
    score = Landscape(60, 0)
    first = run(Published(q=10, p=4), groups, score, stream(0, 0, 0), 2)
    prior = np.full(60, -100.0)
    prior[groups.members[:, 0]] = 0.0  # one mask has probability 1
    strategy = Published(q=10, p=4)
    known = {tuple(row) for row in groups.kept(first.population).tolist()}
    score.asked.clear()
    second = run(strategy, groups, score, stream(0, 0, 1), 0, first.warm_start, prior)
    seed = tuple(np.sort(groups.members[:, 0]).tolist())
    assert set(score.asked) == {seed} - known
    best = first.population[np.argsort(first.losses, kind="stable")[:5]]
    assert second.population[:5].tolist() == best.tolist() and (second.population[5:] == 0).all()
    assert second.loss == min(first.loss, *Landscape(60, 0)(np.array([seed])).tolist())
    third = run(strategy, groups, score, stream(0, 0, 1), 2, first.warm_start, prior)
    assert third.trace.shape == (3, 3)


def test_survivors_of_uniform_crossover_are_the_best_distinct_ever():
    groups = Groups(np.array([0, 0, 0, 1, 1]))  # six masks, so that children repeat
    strategy = STRATEGIES["uniform_crossover"](q=10, p=4)
    score = Landscape(5, 0)
    state = strategy.start(groups, stream(0, 0, 0))
    told = {}
    for _ in range(4):
        state, genomes = strategy.ask(state)
        losses = score(groups.kept(genomes))
        told |= {tuple(genome): loss for genome, loss in zip(genomes.tolist(), losses, strict=True)}
        state = strategy.tell(state, losses)
        best = sorted(told, key=told.get)[:4]
        assert [tuple(genome) for genome in state.population.tolist()] == best
        assert state.losses.tolist() == [told[genome] for genome in best]


def test_patience_stops_a_search_without_improvement():
    groups = Groups.from_ids(np.arange(40) // 4)
    flat = lambda kept: np.ones(len(kept), np.float32)  # noqa: E731
    whole = run(Published(), groups, flat, stream(0, 0, 0), 10)
    short = run(Published(), groups, flat, stream(0, 0, 0), 10, patience=3)
    assert len(whole.trace) == 11 and len(short.trace) == 4
    # a search that keeps improving is not stopped
    score = Landscape(40, 0)
    gaining = run(Published(), groups, score, stream(0, 0, 0), 10, patience=3)
    assert len(gaining.trace) > 4
    assert np.array_equal(
        gaining.trace, run(Published(), groups, Landscape(40, 0), stream(0, 0, 0), 10).trace[: len(gaining.trace)]
    )


def test_without_memo_all_masks_are_scored_and_the_result_is_the_same():
    groups = Groups.from_ids(np.arange(12) // 4)  # 64 masks, so that candidates repeat
    known, anew = Landscape(12, 0), Landscape(12, 0)
    first = run(Published(), groups, known, stream(0, 0, 0), 10)
    second = run(Published(), groups, anew, stream(0, 0, 0), 10, remember=False)
    assert len(known.asked) < len(anew.asked) == 528 and second.saved == 0
    assert np.array_equal(first.kept, second.kept) and np.array_equal(first.trace, second.trace)
