"""Context tokens in a compressed model, against means and weights in a loop over layers, in all families."""

import copy

import pytest
import torch
from torch.testing import assert_close

from evocomp.compressor.model import EvoCompCompressor
from evocomp.evaluation.panel import Panel
from evocomp.inference.hooks import compress
from evocomp.inference.rewrite import compress_inputs
from evocomp.inference.selectors import Pick
from evocomp.log import UserError
from evocomp.mllm.context import owners
from tests.inference.layer_loop import assert_by_hand, expected_logits
from tests.inference.test_hooks import answer, jumble, sizes
from tests.inference.tiny_models import FAMILIES, build, prompts

# the reference counts an image's tokens, and these families have separators between them
WITH_SEPARATORS = ("llava_next", "llava_onevision")
every_family = pytest.mark.parametrize("family", [name for name in FAMILIES if name not in WITH_SEPARATORS])
layers = pytest.mark.parametrize("layer", [0, 2])


class Merging:
    """Keeps the highest scores of `jumble`; dropped tokens are assigned to the last three kept ones in turn."""

    def __init__(self):
        self.owners = []

    def pick(self, visual, text, keep):
        picks = []
        for v, t, r in zip(visual, text, keep, strict=True):
            best = jumble(v, t, r).argsort(descending=True)[:r]
            kept = best.sort().values
            owner = torch.arange(len(v))
            dropped = [i for i in range(len(v)) if i not in kept.tolist()]
            for turn, token in enumerate(dropped):
                owner[token] = best[-3:][turn % 3]
            picks.append(Pick(kept, None, owner))
        self.owners = [pick.owner for pick in picks]
        return picks


def by_row(owners):
    """The test bed has a row of one image and a row of two."""
    return [owners[:1], owners[1:]]


@every_family
@layers
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_means_and_weights_against_a_loop_over_layers(family, layer, attention):
    model, inputs, picker = build(family, attention), prompts(family), Merging()
    with compress(model, picker, keep=0.4, layer=layer) as handle:
        out = answer(model, inputs)
    given = by_row(picker.owners)
    expected = expected_logits(model, inputs, sizes(family), handle.last, out.sequences, layer, given)
    assert_by_hand(out, expected)
    for of_row, counted, kept in zip(given, handle.last.sizes, handle.last.indices, strict=True):
        for owner, count, index in zip(of_row, counted, kept, strict=True):
            assert count.tolist() == [int((owner == place).sum()) for place in index]
    with compress(model, jumble, keep=0.4, layer=layer):
        dropped = answer(model, inputs)
    assert not torch.allclose(dropped.logits[0], out.logits[0], atol=1e-3)


@every_family
@layers
def test_with_and_without_cache_and_with_beams(family, layer):
    model, inputs = build(family), prompts(family)
    with compress(model, Merging(), keep=0.4, layer=layer):
        for beams in (1, 3):
            cached = answer(model, inputs, num_beams=beams)
            bare = answer(model, inputs, num_beams=beams, use_cache=False)
            assert torch.equal(cached.sequences, bare.sequences)
            assert_close(cached.logits[0], bare.logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in (*WITH_SEPARATORS, "paligemma2")])
@layers
def test_a_static_cache_agrees(family, layer):
    model, inputs = build(family), prompts(family)
    with compress(model, Merging(), keep=0.4, layer=layer):
        dynamic = answer(model, inputs)
        static = answer(model, inputs, cache_implementation="static", disable_compile=True)
    for a, b in zip(dynamic.logits, static.logits, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", WITH_SEPARATORS)
@pytest.mark.parametrize("newline", ["keep", "drop"])
def test_separators_are_never_merged(family, newline):
    model, inputs, picker = build(family), prompts(family), Merging()
    with compress(model, picker, keep=5, newline=newline) as handle:
        answer(model, inputs, max_new_tokens=1)
    counted = [image for row in handle.last.sizes for image in row]
    assert [len(image) for image in counted] == [len(image) for row in handle.last.indices for image in row]
    for owner, count in zip(picker.owners, counted, strict=True):
        assert count.sum() == len(owner) + len(count) - 5, "tokens, and a one for every separator"
        assert sorted(count.tolist())[-3:] == sorted(owner.bincount().tolist())[-3:]


@layers
def test_a_compressor_with_context(layer):
    """The selected tokens, and the others merged as by `evocomp.mllm.context`."""
    model, inputs = build("llava"), prompts("llava")
    torch.manual_seed(0)
    compressor = EvoCompCompressor.from_mllm(model, sharp=6).eval()
    with compress(model, compressor, keep=6, layer=layer) as handle:
        answer(model, inputs, max_new_tokens=1)
    assert handle.last.after == [6, 12]
    for row, scored, counted in zip(handle.last.indices, handle.last.scores, handle.last.sizes, strict=True):
        for index, scores, count in zip(row, scored, counted, strict=True):
            best = scores.topk(3).indices
            assert set(best.tolist()) <= set(index.tolist()) and count.sum() == len(scores)
            assert (count[torch.isin(index, best)] == 1).all()


def test_context_tokens_are_means_within_their_own_image():
    model, inputs = build("llava"), prompts("llava")
    torch.manual_seed(0)
    compressor = EvoCompCompressor.from_mllm(model, sharp=6).eval()
    seen = []
    whole = model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    with compress(model, compressor, keep=6) as handle:
        answer(model, inputs, max_new_tokens=1)
    chosen = sum(handle.last.indices, []), sum(handle.last.scores, [])
    for visual, index, scores in zip(whole, *chosen, strict=True):
        best = scores.topk(3).indices.sort().values
        seen.append(torch.equal(torch.cat([best, owners(visual, best[None], 3)[0][0]]).sort().values, index))
    assert all(seen)


def test_a_compressed_model_answers_as_in_the_panel(nano, questions):
    """The same tokens, sizes and first logits; the budget input is the number of selected tokens."""
    torch.manual_seed(0)
    compressor = EvoCompCompressor.from_mllm(nano.model, budget_input=True, sharp=1 / 6)
    with torch.no_grad():
        for weight in compressor.budget.parameters():
            weight.normal_(0, 20)
    panel = Panel(nano, questions[:5])
    expected = panel.compressor_tokens(compressor.eval(), 16)
    prompts = [(asked.features, *shown) for asked, shown in zip(panel.asked, expected, strict=True)]
    _, logits = nano.answer(prompts, max_new_tokens=1)
    for example, shown, wanted in zip(questions, expected, logits, strict=False):
        with compress(nano.model, compressor, keep=16) as handle:
            given = nano.model(**nano._process(example)).logits[0, -1]
        assert torch.equal(handle.last.indices[0][0], shown.places)
        assert_close(handle.last.sizes[0][0].float().log(), shown.log_size)
        assert_close(given, wanted, rtol=1e-4, atol=1e-4)


def test_compress_inputs_refuses_context_tokens():
    model, inputs = build("llava"), prompts("llava")
    compressor = EvoCompCompressor.from_mllm(model, sharp=6).eval()
    with pytest.raises(UserError, match=r"use evocomp.compress, or set compressor.config.sharp = 0"):
        compress_inputs(model, inputs, compressor, keep=6)
    compressor.config.sharp = 0.0
    assert compress_inputs(model, inputs, compressor, keep=6).compression.after == [6, 12]


def test_attention_kernels_without_a_bias_are_refused():
    model, inputs = copy.deepcopy(build("llava")), prompts("llava")
    model.get_decoder().config._attn_implementation = "flash_attention_2"
    compressor = EvoCompCompressor.from_mllm(build("llava"), sharp=6).eval()
    with compress(model, compressor, keep=6), pytest.raises(UserError, match=r"attn_implementation='sdpa'"):
        answer(model, inputs)
