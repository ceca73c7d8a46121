"""The round that an epoch is trained on; test_resume.py tests the callback in complete runs."""

import pytest

from evocomp.config.schema import LabelConfig
from evocomp.training.refresh_labels import RefreshLabels


@pytest.mark.parametrize(
    ("settings", "rounds"),
    [
        ({"refresh": "none"}, [0, 0, 0, 0, 0, 0]),
        ({"refresh": "search", "refresh_start": 1}, [0, 1, 2, 3, 4, 5]),
        ({"refresh": "search", "refresh_start": 1, "refresh_every": 2}, [0, 1, 1, 2, 2, 3]),
        ({"refresh": "search", "refresh_start": 3}, [0, 0, 0, 1, 2, 3]),
        ({"refresh": "on_policy", "refresh_start": 2, "refresh_every": 3}, [0, 0, 1, 1, 1, 2]),
    ],
)
def test_the_round_of_an_epoch(settings, rounds):
    refresh = RefreshLabels(None, LabelConfig(**settings), cost=object())
    assert [refresh.round_of(epoch) for epoch in range(6)] == rounds
