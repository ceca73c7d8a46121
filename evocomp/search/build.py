"""From the settings to a strategy."""

from dataclasses import fields

from evocomp.config.schema import SearchConfig
from evocomp.search import STRATEGIES
from evocomp.search.strategy import Strategy

# the settings' plain words -> the letters of the papers that the strategies use
_NAMES = {"population": "q", "parents": "p", "crossover": "crossover", "mutation": "mutation"}


def build_strategy(config: SearchConfig) -> Strategy:
    """The strategy that the settings name; settings that it has no use for are left aside."""
    strategy = STRATEGIES[config.strategy]
    known = {field.name for field in fields(strategy)}
    options = {letter: getattr(config, word) for word, letter in _NAMES.items() if letter in known}
    return strategy(**options)
