"""Search for the visual tokens that an answer needs: losses of masks in, labels out. Knows no model."""

from evocomp.search.genome import random_genomes, seed_genomes, stream
from evocomp.search.published import Published
from evocomp.search.run import Score, SearchResult, WarmStart, run
from evocomp.search.strategy import State, Strategy

STRATEGIES: dict[str, type[Strategy]] = {
    "published": Published,
}
"""Name in the configuration -> strategy."""

__all__ = [
    "STRATEGIES",
    "Published",
    "Score",
    "SearchResult",
    "State",
    "Strategy",
    "WarmStart",
    "random_genomes",
    "run",
    "seed_genomes",
    "stream",
]
