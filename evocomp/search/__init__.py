"""Search for the visual tokens that an answer needs, from losses of masks. Independent of any model."""

from evocomp.search.cross_entropy import CrossEntropy
from evocomp.search.genome import random_genomes, seed_genomes, stream
from evocomp.search.gradient_seeded import GradientSeeded
from evocomp.search.hill_climb import HillClimb
from evocomp.search.published import Published
from evocomp.search.run import Score, SearchResult, WarmStart, run
from evocomp.search.strategy import State, Strategy
from evocomp.search.uniform_crossover import UniformCrossover

STRATEGIES: dict[str, type[Strategy]] = {
    "published": Published,
    "uniform_crossover": UniformCrossover,
    "cross_entropy": CrossEntropy,
    "hill_climb": HillClimb,
    "gradient_seeded": GradientSeeded,
}
"""Value of `search.strategy` -> strategy."""

__all__ = [
    "STRATEGIES",
    "CrossEntropy",
    "GradientSeeded",
    "HillClimb",
    "Published",
    "Score",
    "SearchResult",
    "State",
    "Strategy",
    "UniformCrossover",
    "WarmStart",
    "random_genomes",
    "run",
    "seed_genomes",
    "stream",
]
