import pytest
import torch

from evocomp.selection.schedule import Stage, layer_average
from evocomp.selection.sparsevlm import (
    KEPT,
    LAYERS,
    SparseVLM,
    cluster_and_merge,
    recycled_count,
    sparsevlm_scores,
    sparsevlm_stage,
    sparsevlm_stages,
    text_raters,
)


def causal_attention(rows: torch.Tensor) -> torch.Tensor:
    heads = rows.unflatten(1, (4, 16)).transpose(0, 1)
    scores = heads @ heads.transpose(1, 2) / 4
    hidden = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def test_published_stages(cases, expected, arrays):
    """A decoder of identity layers, whose attention is the causal softmax of the states' dot products."""
    want = cases("sparsevlm")[0]
    hidden = arrays["llm_hidden"]
    prefix, visual, text = hidden[:5], hidden[5:149], hidden[149:]
    raters = text_raters(visual, text)
    assert raters.tolist() == want["text_raters(text-relative; from official rule)"]
    original = list(range(144))
    for keep, truth in zip(want["per_layer_list"], want["stages"], strict=True):
        attention = causal_attention(torch.cat([prefix, visual, text]))
        scores = sparsevlm_scores(attention[:, -19:, 5 : 5 + len(visual)], raters)
        kept, merged = sparsevlm_stage(visual, scores, keep)
        visual = torch.cat([visual[kept], merged])
        original = [original[i] for i in kept.tolist()] + [None] * len(merged)
        assert [i for i in original if i is not None] == truth["kept_original(image-relative, order)"]
        assert len(merged) == truth["merged_tokens_appended_after_them"]
        array = expected[f"sparsevlm/n144_r48_after{truth['after_layer']}"]
        assert visual.shape == array.shape
        if truth["merged_rows_same_for_9_seeds"]:
            assert torch.allclose(visual, array, atol=1e-4, rtol=0)
        else:  # here the published noise determines the centres; only kept rows are compared
            assert torch.allclose(visual[: len(kept)], array[: len(kept)], atol=1e-4, rtol=0)
    visual_rows = [144] + [stage["visual_tokens_now"] for stage in want["stages"]]
    stages = sparsevlm_stages(144, tuple(want["per_layer_list"]))
    assert [stage.visual for stage in stages] == visual_rows[1:]
    # the authors' counter uses the shorter length for the pruning layer, which runs on the longer sequence
    counter = layer_average(144, [Stage(s.before_layer - 1, s.visual) for s in stages], layers=18)
    assert counter == pytest.approx(want["average_visual_tokens_over_18_layers"], abs=1e-4)


def test_published_clusters(cases, expected, arrays):
    want = cases("sparsevlm")[1]
    merged = cluster_and_merge(arrays["tokens"], want["cluster_num"])
    assert torch.allclose(merged, expected["sparsevlm/cluster_n144_k12"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "budget,rows,average", [(192, [309, 204, 113], 206), (128, [312, 117, 39], 145), (64, [82, 32, 18], 82)]
)
def test_layer_averages_of_the_published_lists(budget, rows, average):
    stages = sparsevlm_stages(kept=KEPT[budget])
    assert [stage.visual for stage in stages] == rows
    assert int(layer_average(576, stages)) == average
    assert [stage.before_layer for stage in stages] == [layer + 1 for layer in LAYERS]


def clusters_by_hand(tokens: torch.Tensor, clusters: int) -> torch.Tensor:
    x = tokens.double()
    m = len(x)
    d = [[float((x[i] - x[j]).norm()) / x.shape[1] ** 0.5 for j in range(m)] for i in range(m)]
    density = [-sum(v * v for v in sorted(d[i])[:clusters]) / clusters for i in range(m)]
    gap = []
    for i in range(m):
        denser = [j for j in range(m) if density[j] > density[i]]
        gap.append(min(d[i][j] for j in denser) if denser else max(map(max, d)))
    score = [float(torch.tensor(density[i], dtype=torch.float64).exp()) * gap[i] for i in range(m)]
    centres = sorted(range(m), key=lambda i: -score[i])[:clusters]
    groups = {c: [] for c in centres}
    for i in range(m):
        groups[i if i in groups else min(centres, key=lambda c: d[i][c])].append(i)
    return torch.stack([x[members].sum(0) / (len(members) + 1e-6) for members in groups.values()])


@pytest.mark.parametrize("m,clusters", [(1, 1), (13, 4), (30, 5)])
def test_clusters_by_hand(m, clusters, generator):
    tokens = torch.randn(m, 6, generator=generator)
    merged = cluster_and_merge(tokens, clusters)
    assert torch.allclose(merged.double(), clusters_by_hand(tokens, clusters), atol=1e-5)


def test_equally_dense_neighbours_are_not_both_centres():
    # two close pairs of equal density: without a tie rule both tokens of a pair would become centres
    tokens = torch.tensor([[0.0, 0.0], [0.5, 0.0], [8.0, 0.0], [8.5, 0.0]])
    merged = cluster_and_merge(tokens, 2)
    assert torch.allclose(merged, torch.tensor([[0.25, 0.0], [8.25, 0.0]]), atol=1e-4)


def test_duplicates_leave_no_cluster_empty():
    assert torch.allclose(cluster_and_merge(torch.ones(4, 3), 2), torch.ones(2, 3), atol=1e-4)


def test_recycled_counts():
    assert [recycled_count(d) for d in (0, 1, 3, 30, 276)] == [(0, 0), (1, 1), (1, 1), (10, 2), (83, 9)]


def test_all_words_are_raters_if_relevance_is_equal(generator):
    visual = torch.randn(6, 4, generator=generator)
    assert text_raters(visual, torch.ones(1, 4)).tolist() == [0]
    words = torch.stack([torch.zeros(4), visual.mean(0) * 9, torch.zeros(4)])
    truth = (visual.double() @ words.double().T).softmax(1).mean(0)
    assert text_raters(visual, words).tolist() == (truth > truth.mean()).nonzero()[:, 0].tolist()


def test_selector_ranks_by_rater_rows_only(drawn):
    text = torch.zeros(3, 10)
    text[1] = 5
    attention = torch.zeros(2, 3, 12)
    attention[:, 1, 4 + 3], attention[:, 0, 4 + 1], attention[:, 2, 4 + 2] = 1, 9, 9
    inputs = drawn(0, 5, text=3, llm_attention={2: attention}, tokens=torch.ones(5, 10))
    object.__setattr__(inputs, "text", text)
    out = SparseVLM()(inputs, 1)
    assert out.extra["raters"].tolist() == [1]
    assert out.indices.tolist() == [3]
