import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evocomp.selection.cls_attention import ClsAttention
from evocomp.selection.random_tokens import RandomTokens, random_tokens
from evocomp.selection.uniform_stride import UniformStride, uniform_stride


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 3000), data=st.data())
def test_stride_is_the_floor_of_the_exact_fraction(n, data):
    r = data.draw(st.integers(1, n))
    stride = uniform_stride(n, r).tolist()
    assert stride == [((2 * i + 1) * n) // (2 * r) for i in range(r)]
    assert len(set(stride)) == r and stride[-1] < n


def test_stride_of_two_rows_stands_in_the_middle_of_each_half(drawn):
    assert UniformStride()(drawn(0, 24), 2).indices.tolist() == [6, 18]


def test_random_draws_follow_the_seed_and_reach_every_token():
    def draw(seed):
        return random_tokens(10, 4, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3), draw(3))
    counts = torch.bincount(torch.cat([draw(seed) for seed in range(500)]), minlength=10)
    assert counts.sum() == 2000
    assert counts.min() > 140 and counts.max() < 260  # 200 expected, standard deviation 11


def test_random_selector_takes_the_samples_generator(drawn):
    inputs = drawn(5, 30)
    inputs.generator.manual_seed(9)
    kept = RandomTokens()(inputs, 7).indices
    assert torch.equal(kept, random_tokens(30, 7, torch.Generator().manual_seed(9)))


def test_cls_attention_averages_heads(drawn):
    attention = torch.tensor([[0.1, 0.5, 0.0, 0.3], [0.3, 0.0, 0.1, 0.3]])
    kept = ClsAttention()(drawn(0, 4, cls_attention=attention), 2)
    assert kept.indices.tolist() == [1, 3]
