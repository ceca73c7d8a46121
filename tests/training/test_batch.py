"""Encoded samples joined with records of each kind."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from evocomp.training.batch import compressor_input, has_label, train_batch


@pytest.fixture(scope="module")
def uneven(encoded):
    """Three samples with 144, 100 and 50 visual tokens and prompts of different length."""
    lengths = sorted({len(f.text_at) for f in encoded})
    picked = [next(f for f in encoded if len(f.text_at) == length) for length in lengths]
    assert len(picked) >= 3
    return [replace(f, visual=f.visual[:count]) for f, count in zip(picked[:3], (144, 100, 50), strict=True)]


def test_inputs_are_padded_and_marked(nano, uneven):
    inputs = compressor_input(nano, uneven)
    assert inputs.visual.shape[:2] == (3, 144) and inputs.visual_mask.sum(1).tolist() == [144, 100, 50]
    assert inputs.prompt_mask.sum(1).tolist() == [len(f.text_at) for f in uneven]
    for row, features in enumerate(uneven):
        assert torch.equal(inputs.visual[row, : len(features.visual)], features.visual)
        assert torch.equal(inputs.prompt[row, : len(features.text_at)], nano.prompt_embeds(features))


def test_nothing_is_marked_where_nothing_is_padded(nano, encoded):
    same = [f for f in encoded if len(f.text_at) == len(encoded[0].text_at)][:3]
    inputs = compressor_input(nano, same)
    assert inputs.visual_mask is None and inputs.prompt_mask is None


def test_hard_labels_become_ones(nano, uneven):
    kept = [np.array([0, 143]), np.array([99]), np.array([3, 4, 49])]
    records = [{"id": f.id, "kept": own.astype(np.uint16)} for f, own in zip(uneven, kept, strict=True)]
    batch = train_batch(nano, uneven, records, round=4)
    assert (batch.round, batch.ids) == (4, [f.id for f in uneven])
    assert [row.nonzero()[:, 0].tolist() for row in batch.targets] == [own.tolist() for own in kept]
    assert batch.targets.shape == (3, 144) and batch.budget is None and batch.populations == []


def test_credits_are_taken_as_they_are(nano, uneven):
    credits = [np.linspace(-1, 1, len(f.visual)).astype(np.float16) for f in uneven]
    records = [{"id": f.id, "credits": own} for f, own in zip(uneven, credits, strict=True)]
    batch = train_batch(nano, uneven, records, round=0)
    for row, own in zip(batch.targets, credits, strict=True):
        assert torch.equal(row[: len(own)], torch.from_numpy(own.astype(np.float32))) and not row[len(own) :].any()


def test_populations_are_grouped_by_size(nano, uneven):
    rng = np.random.default_rng(0)
    records = [
        {
            "id": f.id,
            "draws": np.stack([rng.permutation(50)[:size] for _ in range(5)]).astype(np.uint16),
            "advantages": rng.normal(size=5).astype(np.float32),
            "log_prob": rng.normal(size=5).astype(np.float32),
        }
        for f, size in zip(uneven, (8, 4, 8), strict=True)
    ]
    batch = train_batch(nano, uneven, records, round=1)
    assert batch.targets is None and batch.budget.tolist() == [8.0, 4.0, 8.0]
    by_size = {p.draws.shape[-1]: p for p in batch.populations}
    assert by_size[8].rows.tolist() == [0, 2] and by_size[4].rows.tolist() == [1]
    assert np.array_equal(by_size[8].draws[1].numpy(), records[2]["draws"])
    assert np.array_equal(by_size[4].advantages[0].numpy(), records[1]["advantages"])
    assert np.array_equal(by_size[8].old_log_prob[0].numpy(), records[0]["log_prob"])


def test_samples_without_a_spread_have_no_label():
    assert has_label({"id": 1, "kept": np.zeros(3)})
    assert has_label({"id": 1, "draws": np.zeros((2, 3))})
    assert not has_label({"id": 1, "draws": np.zeros((0, 0))})
