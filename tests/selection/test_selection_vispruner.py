from dataclasses import replace

import pytest
import torch

from evocomp.selection.top_r import top_r
from evocomp.selection.vispruner import VisPruner, vispruner


@pytest.mark.parametrize("case", [0, 1])
def test_published(case, cases, inputs144, arrays):
    want = cases("vispruner")[case]
    inputs = replace(inputs144, cls_attention=arrays["cls_attn_ranked"])
    kept = VisPruner(important_ratio=want["important_ratio"])(inputs, want["r"])
    assert kept.indices.tolist() == want["expected_kept_sorted"]


def thin_by_hand(features, scores, r, ratio):
    """The selection rule with Python lists in fp64."""
    x = torch.nn.functional.normalize(features.double(), dim=1)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))
    kept, rest = order[: int(r * ratio)], order[int(r * ratio) :]
    while len(rest) > r - len(kept):
        surplus = len(rest) - (r - len(kept))
        even, odd = rest[::2], rest[1::2]
        even = sorted(even, key=lambda i: -max(float(x[i] @ x[j]) for j in odd))
        rest = even[min(8, surplus) :] + odd
    return sorted(kept + rest)


@pytest.mark.parametrize("n,r,ratio", [(41, 6, 0.5), (40, 7, 0.5), (33, 1, 0.5), (20, 20, 0.75), (24, 7, 0)])
def test_odd_numbers_left_over(n, r, ratio, generator):
    features = torch.randn(n, 9, generator=generator)
    scores = torch.rand(n, generator=generator)
    assert vispruner(features, scores, r, ratio).tolist() == thin_by_hand(features, scores, r, ratio)


def test_all_important_is_plain_cls_attention(generator):
    scores = torch.rand(30, generator=generator)
    assert torch.equal(vispruner(torch.randn(30, 4, generator=generator), scores, 11, 1.0), top_r(scores, 11))
