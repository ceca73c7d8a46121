"""Which visual tokens mean the same: groups of them, of which a candidate mask keeps one token each."""

from evocomp.grouping.groups import Groups
from evocomp.grouping.vocabulary import nearest_words, vocabulary_groups

__all__ = ["Groups", "nearest_words", "vocabulary_groups"]
