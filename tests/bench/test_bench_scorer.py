"""The benchmarks at the sizes of real models, on tiny models: their parts compute what they are meant to time."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from evocomp.bench import prefill, record, scorer, timing
from evocomp.bench.samples import Sample
from evocomp.config.schema import ScorerConfig
from evocomp.log import UserError
from evocomp.mllm import sizes
from evocomp.mllm.hf import FrozenMLLM
from evocomp.scoring.scorer import CandidateScorer

TINY = ("tiny_llava", "tiny_llava_next", "tiny_qwen")


def example(name, device="cpu"):
    shape = sizes.SHAPES[name]
    mllm = FrozenMLLM(sizes.random_model(shape, device).float(), None, name)
    return Sample(mllm, sizes.random_features(mllm, shape), None, scorer.random_groups(shape)), shape


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr(timing, "MIN_SAMPLE_SECONDS", 1e-3)


@pytest.mark.parametrize("name", TINY)
def test_scorer_rows(name):
    rows = list(scorer.at_shape(name, "cpu", 1, quick=True))
    assert [row["bench"] for row in rows[:3]] == ["scorer", "one-flip candidates", "shared scoring"]
    assert all(row["bench"] == "ablation" for row in rows[3:]) and len(rows) >= 8
    assert all(row["largest_difference"] <= 1e-5 < row["spread"] for row in rows)
    assert rows[0]["floor_share"] == pytest.approx(rows[0]["floor_ms"] / rows[0]["ours_ms"])


def test_a_wrong_scorer_gets_no_row(monkeypatch):
    right = CandidateScorer.__call__
    monkeypatch.setattr(CandidateScorer, "__call__", lambda *a, **k: right(*a, **k) + 1e-3)
    with pytest.raises(AssertionError):
        list(scorer.at_shape("tiny_llava", "cpu", 1, quick=True))


@pytest.mark.parametrize("name", TINY[:2])
def test_floor_equals_the_flop_counter_of_torch(name):
    sample, shape = example(name)
    settings = ScorerConfig(onednn=False, first_layer_once=False, shared_prefix="always")
    ours = CandidateScorer(sample.mllm, settings=settings)
    masks = sample.groups.kept(np.zeros((3, shape.groups), np.int32))
    ours(sample.features, masks[:1])  # the text before the image is computed once
    with FlopCounterMode(display=False) as counter:
        ours(sample.features, masks)
    counted = {str(op): flop for op, flop in counter.get_flop_counts()["Global"].items()}
    products = sum(flop for op, flop in counted.items() if "attention" not in op and "bmm" not in op)
    target = scorer.target_of(sample.mllm)
    length = shape.before + shape.groups + shape.after - 1
    pairs = (length**2 - shape.before**2) / 2 * (target.layers - 1) + shape.answer * length
    attention = 3 * 4 * pairs * target.heads * target.head_dim
    assert scorer.scoring_flop(target, shape, masks.shape) - attention == pytest.approx(products, rel=1e-9)


def test_one_flip_masks_differ_in_one_token():
    sample, shape = example("tiny_llava_next")
    masks = scorer.one_flip(sample, 20)
    usual = [np.unique(column, return_counts=True) for column in masks.T]
    most = np.array([values[counts.argmax()] for values, counts in usual])
    assert masks.shape == (20, shape.groups)
    assert all(len(set(row) - set(most)) <= 2 for row in masks)


@pytest.mark.parametrize("name", TINY)
def test_prefill_rows(name):
    rows = list(prefill.at_shape(name, "cpu", 1, batches=(2,)))
    benches = [row["bench"] for row in rows]
    assert benches[:6] == ["prefill"] * 3 + ["compressor's share"] * 2 + ["decode, one token"]
    assert ("tower's share" in benches) == (sizes.SHAPES[name].tiles > 0)


@torch.inference_mode()
def test_stages_are_those_of_the_model():
    model = sizes.random_model(sizes.SHAPES["tiny_llava"], "cpu")
    stages = prefill.Stages(model, sizes.SHAPES["tiny_llava"], 2)
    seen = model.base_model.get_image_features(pixel_values=stages.pixels, return_dict=True).pooler_output
    torch.testing.assert_close(stages.see(), torch.stack(list(seen)))
    logits, _ = stages.compressed()
    torch.testing.assert_close(logits, stages.prefill(stages.choose())[0])
    assert stages.narrow.config.layer_size == 16 and stages.choose_narrow().shape == (2, 4, 64)
    torch.testing.assert_close(stages.compressed_narrow()[0], stages.prefill(stages.choose_narrow())[0])
    assert stages.choose().shape == (2, 4, 64)
    step = stages.decode(stages.visual)
    torch.testing.assert_close(step(), step())


def test_unknown_shapes_and_short_lines(tmp_path):
    with pytest.raises(UserError, match="choose one of llava15_7b"):
        sizes.shape_named("llava")
    row = {"bench": "a", "shape": "N=1", "ours": "o", "device": "d", "torch": "2"}
    record.append(tmp_path / "x.csv", [row | {"ratio": 2.0, "baseline_ms": 2.0, "ours_ms": 1.0, "floor_ms": 0.5}])
    record.append(tmp_path / "x.csv", [row | {"ratio": 3.0, "baseline_mib": 3.0, "ours_mib": 1.0}])
    lines = record.overview([tmp_path / "x.csv"]).splitlines()
    assert "x2.00 floor 0.50" in lines[1] and "3.000" in lines[2] and "x3.00" in lines[2]


@pytest.mark.gpu
@pytest.mark.parametrize("name", TINY)
def test_every_saving_gives_the_same_losses_on_a_gpu(name):
    sample, shape = example(name, "cuda")
    masks = scorer.one_flip(sample, 8)
    expected = sample.removed(masks)
    for label, settings in scorer.ladder(sample):
        got = CandidateScorer(sample.mllm, settings=settings)(sample.features, masks)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=label)
    always = ScorerConfig(prefix_reuse="always")
    reused = CandidateScorer(sample.mllm, settings=always)(sample.features, masks, flips=True)
    np.testing.assert_allclose(reused, expected, rtol=1e-5, atol=1e-5)
