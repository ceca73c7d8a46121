"""Credit labels from random masks: questions about an image share masks, and tokens of a group share credits."""

import numpy as np
import pytest

from evocomp.config.schema import GroupingConfig, LabelConfig
from evocomp.grouping.build import Grouper
from evocomp.labels.random_credit import CreditLabels
from evocomp.scoring.scorer import CandidateScorer


@pytest.fixture(scope="module")
def records(nano, questions, encoded):
    """records(grouper): the records of the first two images."""
    pictures = list(dict.fromkeys(one.image_id for one in questions))[:2]
    asked = [one for one in questions if one.image_id in pictures]
    by_id = {one.id: one for one in encoded}

    def make(grouper):
        kind = CreditLabels(asked, CandidateScorer(nano), LabelConfig(credit_masks=8), 0, False, grouper)
        ids = [one.id for one in asked]
        return {record["id"]: record for record in kind.make(0, ids, lambda ids: [by_id[i] for i in ids], {}, None)}

    return make


def test_tokens_of_a_group_share_the_mean_of_their_credits(nano, encoded, records):
    grouper = Grouper(GroupingConfig(), nano.vocabulary)
    single, shared = records(None), records(grouper)
    assert single.keys() == shared.keys() and len(single) > 10
    by_id = {one.id: one for one in encoded}
    for id, record in shared.items():
        groups = grouper(by_id[id].visual)
        assert 1 < groups.count < 144
        own = single[id]["credits"].astype(float)
        expected = np.array([own[groups.of == group].mean() for group in groups.of])
        assert np.allclose(record["credits"], expected, atol=2e-3)
        assert record["best_loss"] == single[id]["best_loss"]
