"""Algorithm 1 against a case worked by hand and against a plain loop."""

import numpy as np
import pytest

from evocomp.grouping import Groups
from evocomp.log import UserError
from evocomp.search import Published, State, stream


class Scripted:
    """A stub of `Generator` that returns prepared numbers and checks the requested shapes."""

    def __init__(self, *draws):
        self.draws = [np.array(d) for d in draws]

    def random(self, shape):
        draw = self.draws.pop(0)
        assert draw.shape == tuple(np.atleast_1d(shape))
        return draw


def test_one_generation_by_hand():
    groups = Groups(np.array([0, 0, 0, 1, 2, 2, 3, 3, 3, 3]))  # sizes 3 1 2 4
    population = np.array([[0, 0, 0, 0], [2, 0, 1, 3], [1, 0, 0, 2], [0, 0, 1, 1]])
    losses = np.array([5.0, 1.0, 7.0, 2.0], dtype=np.float32)
    strategy = Published(q=4, p=2, crossover=0.9, mutation=0.2)
    # parents: A = [2 0 1 3] (loss 1), B = [0 0 1 1] (loss 2)
    rng = Scripted(
        [[0.1, 0.6, 0.2, 0.99], [0.5, 0.5, 0.5, 0.5]],  # first parents A B A B, so the other ones B A B A
        [[0.89], [0.91], [0.0], [0.5]],  # the second child has one parent
        [
            [0.5, 0.5, 0.5, 0.5],  # A|B = 2 0 1 1, no mutation
            [0.05, 0.05, 0.05, 0.05],  # B = 0 0 1 1, all one left: 0 clipped, 0 clipped, 0, 0
            [0.15, 0.15, 0.15, 0.15],  # A|B = 2 0 1 1, all one right: 2 clipped, 0 clipped, 1 clipped, 2
            [0.15, 0.2, 0.05, 0.05],  # B|A = 0 0 1 3: 1, 0, 0, 2
        ],
    )
    state = State(groups, (0, 0), step=1, population=population, losses=losses)
    children = strategy.propose(state, rng)
    assert children.tolist() == [[2, 0, 1, 1], [0, 0, 0, 0], [2, 0, 1, 2], [1, 0, 0, 2]]
    assert not rng.draws


def algorithm_1(population, losses, sizes, p, crossover, mutation, draws):
    """One generation by plain loops over genes, with the same random numbers."""
    q, half = len(population), len(sizes) // 2
    parents = [population[i] for i in sorted(range(q), key=lambda i: losses[i])[:p]]
    pair, cross, mutate = draws
    children = []
    for c in range(q):
        one = int(pair[0][c] * p)
        two = (one + 1 + int(pair[1][c] * (p - 1))) % p
        child = [
            parents[two][g] if cross[c][0] < crossover and g >= half else parents[one][g] for g in range(len(sizes))
        ]
        for g, size in enumerate(sizes):
            if mutate[c][g] < mutation / 2:
                child[g] = max(0, child[g] - 1)
            elif mutate[c][g] < mutation:
                child[g] = min(size - 1, child[g] + 1)
        children.append([int(gene) for gene in child])
    return children


@pytest.mark.parametrize("seed", range(5))
def test_generations_equal_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    groups = Groups.from_ids(rng.integers(0, 7, 40))
    strategy = Published(q=9, p=4)
    state = strategy.start(groups, stream(seed, 0, 0))
    state, genomes = strategy.ask(state)
    for _ in range(4):
        losses = rng.random(9).astype(np.float32)
        state = strategy.tell(state, losses)
        draws = state.rng()
        shapes = ((2, 9), (9, 1), (9, groups.count))
        expected = algorithm_1(genomes, losses, groups.sizes, 4, 0.9, 0.2, [draws.random(shape) for shape in shapes])
        state, genomes = strategy.ask(state)
        assert genomes.tolist() == expected


def test_the_children_replace_the_population_and_the_best_is_kept():
    groups = Groups(np.repeat(np.arange(6), 3))
    strategy = Published(q=5, p=2)
    state = strategy.start(groups, stream(0, 0, 0))
    state, first = strategy.ask(state)
    state = strategy.tell(state, np.array([3, 0.5, 2, 4, 1]))
    state, second = strategy.ask(state)
    state = strategy.tell(state, np.full(5, 9.0))
    assert np.array_equal(state.population, second) and (state.losses == 9).all()
    assert np.array_equal(state.best, first[1]) and state.best_loss == 0.5


@pytest.mark.parametrize(
    "setting", [{"p": 48}, {"p": 0}, {"q": 0, "p": 0}, {"crossover": 1.1}, {"mutation": -0.1}, {"seeded": 2}]
)
def test_impossible_settings_are_refused(setting):
    with pytest.raises(UserError):
        Published(**setting)


def test_defaults_are_the_papers():
    published = Published()
    assert (published.q, published.p, published.crossover, published.mutation) == (48, 12, 0.9, 0.2)
    assert published.forward_only
