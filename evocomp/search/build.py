"""Builds the search strategy that the settings name."""

from dataclasses import fields

from evocomp.config.schema import SearchConfig
from evocomp.search import STRATEGIES
from evocomp.search.strategy import Strategy

# name of the setting -> name of the strategy's field, after the notation of the papers
_NAMES = {"population": "q", "parents": "p", "crossover": "crossover", "mutation": "mutation"}


def build_strategy(config: SearchConfig) -> Strategy:
    """The strategy that the settings name; settings that it does not have are ignored."""
    strategy = STRATEGIES[config.strategy]
    known = {field.name for field in fields(strategy)}
    options = {letter: getattr(config, word) for word, letter in _NAMES.items() if letter in known}
    return strategy(**options)
