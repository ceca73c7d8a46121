import pytest
import torch

from evocomp.log import UserError
from evocomp.selection.llm_attention import at_layer, last_query_attention, visual_columns, visual_start


def test_last_row_of_causal_attention(generator):
    query, keys = torch.randn(4, 8, generator=generator), torch.randn(4, 11, 8, generator=generator)
    queries = torch.cat([torch.randn(4, 10, 8, generator=generator), query[:, None]], dim=1)
    values = torch.eye(11).expand(4, 11, 11)
    full = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    assert torch.allclose(last_query_attention(query, keys), full[:, -1], atol=1e-6)


def test_grouped_queries_share_keys_in_runs(generator):
    query, keys = torch.randn(4, 8, generator=generator), torch.randn(2, 11, 8, generator=generator)
    rows = [torch.softmax(query[h].double() @ keys[h // 2].double().T / 8**0.5, 0) for h in range(4)]
    assert torch.allclose(last_query_attention(query, keys).double(), torch.stack(rows), atol=1e-6)


def test_columns_of_the_visual_tokens(drawn):
    inputs = drawn(0, 6, text=3)  # prefix of 4
    marked = torch.arange(13.0).expand(2, 5, 13) + torch.arange(5.0)[:, None] * 100
    inputs = drawn(0, 6, text=3, llm_attention=lambda layer: marked + 1000 * layer)
    got = visual_columns(inputs, 2, 2)
    assert got.shape == (2, 2, 6)
    assert got[0, 1].tolist() == [2400 + i for i in range(4, 10)]
    assert visual_start(inputs, 9) == 0


def test_errors_name_the_missing_layer_or_tokens(drawn):
    with pytest.raises(UserError, match="layer 3 was not recorded, only layers \\[1\\]"):
        at_layer({1: torch.ones(1)}, 3)
    with pytest.raises(UserError, match="cannot hold 6 visual and 3 text"):
        visual_start(drawn(0, 6, text=3), 8)
    with pytest.raises(UserError, match="at least the last 5 queries"):
        visual_columns(drawn(0, 6, text=3), 0, 5)
