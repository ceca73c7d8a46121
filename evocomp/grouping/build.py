"""Groups the visual tokens of an image according to the settings."""

from collections.abc import Sequence

from torch import Tensor

from evocomp.config.schema import GroupingConfig
from evocomp.grouping.budget import fit_groups
from evocomp.grouping.dpc_knn import dpc_knn_groups
from evocomp.grouping.groups import Groups
from evocomp.grouping.vocabulary import vocabulary_groups


class Grouper:
    """Groups the visual tokens [N, D] of an image.

    Args:
        config: settings: method and number of groups.
        table: the LLM's input embeddings [V, D].
        special_ids: rows of the table that are excluded if `config.mask_special`.
    """

    def __init__(self, config: GroupingConfig, table: Tensor, special_ids: Sequence[int] = ()):
        self.config = config
        self.table = table
        self.words = table.new_ones(len(table), dtype=bool)
        if config.mask_special:
            self.words[list(special_ids)] = False

    def __call__(self, visual: Tensor) -> Groups:
        config = self.config
        if config.method == "dpc_knn":
            return dpc_knn_groups(visual, config.count)
        groups = vocabulary_groups(visual, self.table, self.words, config.centre, config.whiten)
        return fit_groups(visual, groups, config.count) if config.count else groups
