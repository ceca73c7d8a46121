"""A compressor with `hedge`: the panel and the compressed model keep the same tokens."""

import pytest
import torch
from PIL import Image

from evocomp.compressor.keep import budget
from evocomp.compressor.model import EvoCompCompressor
from evocomp.data.scenes import scene_examples
from evocomp.evaluation.panel import Panel
from evocomp.inference.generate import question
from evocomp.inference.hooks import compress
from evocomp.log import UserError
from evocomp.mllm.reader import as_array
from evocomp.selection.priority import priority_order
from evocomp.selection.top_r import top_r
from tests.inference.tiny_models import build

KEPT = 16


@pytest.fixture(scope="module")
def examples():
    return [scene_examples(seed=11, start=i, count=1)[0] for i in range(4)]


def hedged(nano, **settings):
    torch.manual_seed(0)
    return EvoCompCompressor.from_mllm(nano.model, hedge=0.5, budget_input=True, **settings).eval()


@pytest.mark.parametrize("sharp", [0.0, 0.25])
@pytest.mark.parametrize("name", ["cls_attention", "divprune", "uniform_stride"])
def test_panel_and_compress_keep_the_same_tokens(nano, examples, name, sharp):
    compressor = hedged(nano, hedge_by=name, sharp=sharp)
    expected = Panel(nano, examples).compressor_tokens(compressor, KEPT)
    with compress(nano.model, compressor, keep=KEPT) as handle:
        for example, kept in zip(examples, expected, strict=True):
            inputs = question(nano.processor, Image.fromarray(as_array(example.image)), example.prompt)
            nano.model.generate(**inputs, max_new_tokens=1)
            assert handle.last.indices[0][0].tolist() == kept.places.tolist()


def test_half_is_scored_and_half_the_best_of_the_rest(nano, examples):
    compressor = hedged(nano, hedge_by="cls_attention")
    scored, filled, _ = budget(KEPT, 144, compressor.config)
    assert (scored, filled) == (8, 8)
    example = examples[0]
    features = nano.features([example])[0]
    with torch.no_grad():
        logits = compressor(
            features.visual[None], nano.prompt_embeds(features)[None], budget=torch.tensor([float(scored)])
        ).logits[0]
    best = set(top_r(logits, scored).tolist())
    attention = Panel(nano, [example]).probes.gather(example, features, {"cls_attention"})["cls_attention"]
    rest = [t for t in priority_order("cls_attention", features.visual, attention).tolist() if t not in best]
    kept = Panel(nano, [example]).compressor_tokens(compressor, KEPT)[0].places.tolist()
    assert kept == sorted([*best, *rest[:filled]])


def test_a_tower_without_a_class_token_is_refused_before_the_model_runs():
    model = build("qwen2_5_vl")
    compressor = EvoCompCompressor.from_mllm(model, hedge=0.5, hedge_by="cls_attention")
    with pytest.raises(UserError, match=r"hedge needs a CLIP vision tower .*set hedge_by"):
        compress(model, compressor, keep=4)
    compressor.config.hedge_by = "divprune"
    with compress(model, compressor, keep=4):
        pass
