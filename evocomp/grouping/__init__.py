"""Groups of visual tokens with similar meaning; a candidate mask keeps one token of each group."""

from evocomp.grouping.groups import Groups
from evocomp.grouping.vocabulary import nearest_words, vocabulary_groups

__all__ = ["Groups", "nearest_words", "vocabulary_groups"]
