import pytest
import torch

from evocomp.selection.visionzip import VisionZip, visionzip, visionzip_split


@pytest.mark.parametrize("case", [0, 1])
def test_published(case, cases, expected, arrays, inputs144):
    want = cases("visionzip")[case]
    dominant, contextual = want["dominant_arg"], want["contextual_arg"]
    assert visionzip_split(want["tokens_out"]) == (dominant, contextual)
    rows, chosen, targets = visionzip(arrays["clip_hidden"], arrays["cls_attn"], arrays["clip_k"], dominant, contextual)
    assert chosen.tolist() == want["expected_dominant_sorted(row 0 = CLS included; patch p is row p+1)"]
    truth = expected["visionzip/" + want["array"].split()[0]]
    assert torch.allclose(rows, truth, atol=1e-4, rtol=0)
    selection = VisionZip()(inputs144, want["tokens_out"])
    assert torch.equal(selection.tokens, rows)
    assert selection.positions.tolist() == [0, *(chosen[1:] - 1).tolist(), *(targets - 1).tolist()]


@pytest.mark.parametrize("keep,split", [(64, (54, 10)), (128, (108, 20)), (192, (162, 30)), (160, (135, 25))])
def test_published_split(keep, split):
    assert visionzip_split(keep) == split


@pytest.mark.parametrize("n,dominant,contextual", [(13, 3, 4), (10, 8, 3), (6, 5, 2), (7, 1, 0)])
def test_merging_by_hand(n, dominant, contextual, drawn):
    inputs = drawn(n, n)
    rows, chosen, targets = visionzip(inputs.clip_hidden, inputs.cls_attention, inputs.clip_keys, dominant, contextual)
    hidden = inputs.clip_hidden.double()
    key = inputs.clip_keys.double().reshape(n + 1, 3, 4).mean(1)
    key = key / key.norm(dim=1, keepdim=True)
    rest = [i for i in range(n + 1) if i not in chosen.tolist()]
    if contextual:
        step = max(1, len(rest) // contextual)
        assert targets.tolist() == rest[::step][:contextual]
    joined = {t: [] for t in targets.tolist()}
    for i in rest:
        if contextual and i not in joined:
            joined[max(joined, key=lambda t: float(key[i] @ key[t]))].append(i)
    want = [hidden[i] for i in chosen.tolist()]
    want += [hidden[t] + (hidden[m].mean(0) if m else 0) for t, m in joined.items()]
    assert torch.allclose(rows.double(), torch.stack(want), atol=1e-5)


def test_rows_go_through_the_projector_once(drawn):
    seen = []
    inputs = drawn(1, 20, project=lambda rows: seen.append(rows.shape) or rows * 2)
    assert VisionZip()(inputs, 9).tokens.shape == (9, 12)
    assert seen == [(9, 12)]
