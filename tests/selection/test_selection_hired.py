from dataclasses import replace

import pytest
import torch

from evocomp.log import UserError
from evocomp.selection.hired import HiRED, HiREDNext, hired_budgets, hired_next, region_of


@pytest.mark.parametrize("case", [0, 1])
def test_published_single_image(case, cases, inputs144):
    want = cases("hired")[case]
    keep = int(144 * want["token_budget_rate"])
    assert keep == want["kept_count"]
    assert HiRED()(inputs144, keep).indices.tolist() == want["expected_kept_sorted"]


@pytest.mark.parametrize("case", [2, 3, 4])
def test_published_partitions(case, cases, expected, drawn):
    want = cases("hired")[case]
    last, first = expected["hired/cls_layer22_sum_over_heads"], expected["hired/cls_layer0_sum_over_heads"]
    region = region_of((12, 12), (2, 2))
    kept = hired_next(last, first[0], want["total_budget"], region, want["alpha"])
    assert [len(part) for part in kept] == want["kept_per_partition"]
    assert [part.tolist() for part in kept] == want["expected_kept_per_partition"]
    inputs = drawn(0, 720, grid=(60, 12), cls_attention=last.flatten()[None], cls_attention_first=first.flatten()[None])
    out = HiREDNext(alpha=want["alpha"])(inputs, want["total_budget"])
    assert out.indices.tolist() == [144 * i + j for i, part in enumerate(kept) for j in part.tolist()]
    assert out.extra["budgets"] == want["kept_per_partition"]


def test_stripes_are_runs_and_quadrants_are_what_a_sub_image_shows():
    assert region_of((4, 4), (2, 2)).tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert region_of((4, 4), (2, 2), "quadrants").tolist() == [0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2
    assert region_of((4, 6), (1, 3), "quadrants").tolist() == [0, 0, 1, 1, 2, 2] * 4


def test_budgets_follow_the_full_images_first_layer():
    first = torch.zeros(16)
    first[[0, 1, 2, 8, 9, 12]] = 1
    region = region_of((4, 4), (2, 2))
    assert hired_budgets(first, region, 4, 12, alpha=1 - 6 / 16) == [6, 0, 4, 2]
    assert hired_budgets(first, region, 4, 60, alpha=1 - 6 / 16) == [16, 0, 16, 10]
    assert hired_budgets(first, region, 4, 12, alpha=1.0) == [0, 0, 0, 0]


def test_sub_images_are_ranked_by_themselves(drawn):
    inputs = drawn(3, 5 * 16, grid=(20, 4))
    louder = inputs.cls_attention.clone()
    louder[:, 16:32] *= 50
    assert torch.equal(HiREDNext()(inputs, 30).indices, HiREDNext()(replace(inputs, cls_attention=louder), 30).indices)


def test_quadrants_change_the_budgets(drawn):
    first = torch.zeros(1, 80)
    first[0, [2, 3, 6, 7, 10, 11, 14, 15]] = 1  # right half of the full image
    inputs = drawn(3, 80, grid=(20, 4), cls_attention_first=first)
    assert HiREDNext()(inputs, 32).extra["budgets"] == [16, 4, 4, 4, 4]
    assert HiREDNext(regions="quadrants")(inputs, 32).extra["budgets"] == [16, 0, 8, 0, 8]


def test_a_wrong_number_of_partitions_is_an_error(drawn):
    with pytest.raises(UserError, match="3 stacked partitions"):
        HiREDNext(sub_grid=(1, 2))(drawn(0, 80, grid=(20, 4)), 8)
