"""Everything that can be a selector: compressors in all forms, functions, and training-free selectors."""

import copy
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from evocomp.compressor.lora import add_lora, save_lora
from evocomp.compressor.model import EvoCompCompressor
from evocomp.compressor.transfer import ReusedPicks
from evocomp.inference.hooks import compress
from evocomp.inference.selectors import load_compressor, picker_for, top_r
from evocomp.log import UserError
from evocomp.mllm import families
from tests.inference.test_hooks import answer, jumble
from tests.inference.tiny_models import FAMILIES, IMAGE, build, prompts
from tests.mllm.image_features import image_features


def compressor_for(model, layer=0, **kwargs):
    torch.manual_seed(3)
    return EvoCompCompressor.from_mllm(model, layer=layer, **kwargs).eval()


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.data())
@settings(deadline=None)
def test_top_r_keeps_the_best_earliest_in_order(scores, data):
    r = data.draw(st.integers(0, len(scores)))
    kept = top_r(torch.tensor(scores, dtype=torch.float), r).kept
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:r]
    assert kept.tolist() == sorted(best)


@pytest.mark.parametrize("width", [0, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_compressor_scores_are_those_of_each_image_alone(family, width):
    model, inputs = build(family), prompts(family)
    compressor = compressor_for(model, layer=None if width else 0, width=width, budget_input=True)
    torch.nn.init.normal_(compressor.budget.visual)
    with compress(model, compressor, keep=0.4) as handle:
        answer(model, inputs, max_new_tokens=1)
    with torch.no_grad():
        images = image_features(model, inputs)
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        rows = [0, 1, 1]
        for row, image, scores in zip(rows, images, sum(handle.last.scores, []), strict=True):
            text = model.get_input_embeddings()(ids[row][mask[row] & (ids[row] != IMAGE)])
            content = image[~families.newline_rows(model, image)]
            alone = compressor(content[None], text[None], budget=float(max(1, round(0.4 * len(content)))))
            assert_close(scores, alone.logits[0], rtol=1e-4, atol=1e-4)


def test_a_dithered_compressor_keeps_the_highest_of_scores_and_noise(tmp_path):
    model = build("llava")
    compressor_for(model, keep=0.5, dither=2.0).save_pretrained(tmp_path)
    with compress(model, tmp_path) as handle:
        answer(model, prompts("llava"), max_new_tokens=1)
    moved = False
    for index, scores in zip(sum(handle.last.indices, []), sum(handle.last.scores, []), strict=True):
        noise = torch.tensor([-math.log(-math.log((i * (5**0.5 - 1) / 2 + 0.5) % 1)) for i in range(len(scores))])
        expected = sorted(range(len(scores)), key=lambda i: -float(scores[i] + 2 * noise[i]))[: len(index)]
        assert index.tolist() == sorted(expected)
        moved |= index.tolist() != top_r(scores, len(index))[0].tolist()
    assert moved


def test_saved_settings_are_the_defaults(tmp_path):
    model = build("llava")
    compressor = compressor_for(model, keep=3, prune_layer=2, positions="original")
    compressor.save_pretrained(tmp_path)
    with compress(model, tmp_path) as handle:
        answer(model, prompts("llava"), max_new_tokens=1)
        assert (handle.keep, handle.layer, handle.last.after) == (3, 2, [3, 6])
    with compress(model, str(tmp_path), keep=5, layer=0) as other:
        answer(model, prompts("llava"), max_new_tokens=1)
        assert (other.keep, other.layer, other.last.after) == (5, 0, [5, 10])
    assert torch.equal(handle.last.scores[0][0], other.last.scores[0][0])
    with compress(model, jumble) as handle:
        assert (handle.keep, handle.layer, handle.positions) == (192, 0, "original")


def test_an_adapter_folder_loads_on_the_models_own_layer(tmp_path):
    model, inputs = build("llava"), prompts("llava")
    adapter = add_lora(compressor_for(model), r=2)
    for name, weight in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    save_lora(adapter, tmp_path)
    records = []
    for selector in (adapter, tmp_path, compressor_for(model)):
        with compress(model, selector, keep=4) as handle:
            answer(model, inputs, max_new_tokens=1)
        records.append(handle.last.scores[0][0])
    assert_close(records[0], records[1], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(records[0], records[2])


def test_the_compressor_has_the_models_dtype_except_for_the_head(tmp_path):
    model = copy.deepcopy(build("llava")).bfloat16()
    compressor_for(model).float().save_pretrained(tmp_path / "whole")
    save_lora(add_lora(compressor_for(model), r=2), tmp_path / "adapter")
    compressor_for(model, layer=None, width=16).float().save_pretrained(tmp_path / "narrow")
    for folder in ("whole", "adapter", "narrow"):
        loaded = families.unwrap(load_compressor(tmp_path / folder, model))
        layers = {n: p.dtype for n, p in loaded.named_parameters() if n.startswith(("encoder", "narrow"))}
        assert set(layers.values()) == {torch.bfloat16}
        assert {p.dtype for n, p in loaded.named_parameters() if n not in layers} == {torch.float32}
        visual = torch.randn(1, 8, 32, dtype=torch.bfloat16)
        assert loaded(visual, visual[:, :3]).logits.dtype == torch.float32


def test_a_compressor_in_training_stays_so():
    compressor = compressor_for(build("llava")).train()
    with compress(build("llava"), compressor, keep=4):
        answer(build("llava"), prompts("llava"), max_new_tokens=1)
    assert compressor.training and compressor.encoder.training


def test_a_compressor_in_training_stays_so_after_an_error():
    compressor = compressor_for(build("llava")).train()
    compressor.score.weight.data = compressor.score.weight.data[:, :5]
    with compress(build("llava"), compressor, keep=4), pytest.raises(RuntimeError, match="shapes"):
        answer(build("llava"), prompts("llava"), max_new_tokens=1)
    assert compressor.training and compressor.encoder.training


def test_a_folder_that_holds_no_compressor_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    compressor_for(build("llava")).save_pretrained(tmp_path / "run" / "compressor")
    for path, says in (
        (tmp_path / "none", f"no compressor at {tmp_path}/none: no such folder; give RUN/compressor of a run, or"),
        ("runs/none/compressor", "no compressor at runs/none/compressor: no such folder; give"),
        ("none/none", "no compressor at none/none: no such folder, and as a hub id: "),
        (tmp_path / "empty", "empty: the folder has no config.json; give RUN/compressor"),
        (tmp_path / "run", f"run holds a run; give its compressor: {tmp_path}/run/compressor"),
    ):
        with pytest.raises(UserError, match=says):
            picker_for(path, build("llava"))
    build("llava").config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'llava', not an EvoComp compressor"):
        picker_for(tmp_path, build("llava"))


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("kept", [0, 100])
def test_broken_weights_are_named(tmp_path, adapter, kept):
    """Weights of a truncated download or copy."""
    model = build("llava")
    if adapter:
        save_lora(add_lora(compressor_for(model), r=2), tmp_path)
    else:
        compressor_for(model).save_pretrained(tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(UserError, match=f"the weights in {tmp_path} cannot be read .*; copy or train them again"):
        picker_for(tmp_path, model)
    weights.unlink()
    with pytest.raises(UserError, match=f"the weights in {tmp_path} cannot be read .*; copy or train them again"):
        picker_for(tmp_path, model)


@pytest.mark.parametrize(
    ("trained_for", "given", "warns"),
    [
        ("nano", "some/assets/nano", False),
        ("nano", "some/assets/nano576", True),
        ("org/llava", "/cache/models--org--llava/snapshots/0123abc", False),
        ("org/llava", "org/llava-next", True),
        (None, "org/llava", False),
        ("nano", "", False),
    ],
)
def test_a_compressor_of_another_model_of_the_same_width_is_a_warning(caplog, monkeypatch, trained_for, given, warns):
    model = build("llava")
    compressor = compressor_for(model)
    compressor.config.base_model_name_or_path = trained_for
    monkeypatch.setattr(model.config, "_name_or_path", given, raising=False)
    with caplog.at_level("WARNING", logger="evocomp"):
        picker_for(compressor, model)
    assert len(caplog.records) == warns
    if warns:
        says = f"was trained for {trained_for.split('/')[-1]}, the model is {given.split('/')[-1]}"
        assert says in caplog.records[0].message


def test_invalid_selectors_are_refused():
    with pytest.raises(UserError, match="no selector"):
        picker_for(192, build("llava"))


@pytest.mark.parametrize("bad", [lambda v, t, k: v, lambda v, t, k: torch.zeros(3), lambda v, t, k: [0.0]])
def test_scores_of_the_wrong_shape_are_named(bad):
    with (
        compress(build("llava"), bad, keep=4),
        pytest.raises(UserError, match="16 visual tokens; return one"),
    ):
        answer(build("llava"), prompts("llava"), max_new_tokens=1)


def test_nan_scores_are_refused():
    def broken(visual, text, keep):
        return torch.tensor([math.nan] + [1.0] * (len(visual) - 1))

    with compress(build("llava"), broken, keep=4), pytest.raises(UserError, match="NaN among its 16 scores"):
        answer(build("llava"), prompts("llava"), max_new_tokens=1)


def test_kept_tokens_of_a_small_model_are_reused_in_a_large_one():
    small, big, inputs = build("llava"), build("gemma3"), prompts("gemma3")
    text_only = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    with compress(small, jumble, keep=4) as chosen:
        answer(small, text_only, max_new_tokens=1)
    with compress(big, ReusedPicks(lambda: chosen.last), keep=4) as handle:
        answer(big, inputs, max_new_tokens=1)
    for ours, theirs in zip(handle.last.indices, chosen.last.indices, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("newline", ["keep", "drop"])
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_reused_tokens_are_the_same_with_newline_separators(family, newline):
    model, inputs = build(family), prompts(family)
    with compress(model, jumble, keep=8, newline=newline) as chosen:
        answer(model, inputs, max_new_tokens=1)
    with compress(model, ReusedPicks(lambda: chosen.last), keep=8, newline=newline) as handle:
        answer(model, inputs, max_new_tokens=1)
    for ours, theirs in zip(sum(handle.last.indices, []), sum(chosen.last.indices, []), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "record, message",
    [
        (SimpleNamespace(picked=[[torch.tensor([15])]] * 3), "token 15 was kept, but the image has 8"),
        (SimpleNamespace(picked=[[torch.tensor([1])]]), "1 images in the record"),
        (None, "not NoneType; give `lambda: handle.last`"),
        ([[torch.tensor([1])]] * 3, "not list; give `lambda: handle.last`"),
    ],
)
def test_kept_tokens_that_cannot_be_reused_are_refused(record, message):
    with compress(build("qwen2_vl"), ReusedPicks(lambda: record), keep=4), pytest.raises(UserError, match=message):
        answer(build("qwen2_vl"), prompts("qwen2_vl"), max_new_tokens=1)


def test_invalid_token_indices_are_refused():
    class Broken:
        def pick(self, visual, text, keep):
            return [(torch.tensor([99]), None) for _ in visual]

    with compress(build("llava"), Broken(), keep=4), pytest.raises(IndexError):
        answer(build("llava"), prompts("llava"), max_new_tokens=1)


@dataclass
class Stride:
    """A selector with the interface of `evocomp.selection`."""

    merges: bool = False
    needs = frozenset({"tokens"})

    def __call__(self, inputs, keep):
        assert inputs.tokens.shape == (16, 32) and inputs.text.shape[1] == 32 and inputs.grid == (4, 4)
        indices = torch.arange(0, len(inputs.tokens), len(inputs.tokens) // keep)[:keep].flip(0)
        return SimpleNamespace(indices=None if self.merges else indices)


def test_baselines_choose_by_indices():
    with compress(build("llava"), Stride(), keep=4) as handle:
        answer(build("llava"), prompts("llava"), max_new_tokens=1)
        assert [image.tolist() for image in handle.last.indices[1]] == [[0, 4, 8, 12]] * 2
        assert handle.last.scores == [[None], [None, None]]
        handle.keep = 0
        answer(build("llava"), prompts("llava"), max_new_tokens=1)
        assert handle.last.after == [0, 0]


def test_merging_selectors_without_tokens_are_refused():
    with (
        compress(build("llava"), Stride(merges=True), keep=4),
        pytest.raises(UserError, match="Stride merges"),
    ):
        answer(build("llava"), prompts("llava"), max_new_tokens=1)


def test_divprune_of_the_selection_package():
    divprune = pytest.importorskip("evocomp.selection.divprune")
    model, inputs = build("llava"), prompts("llava")
    with compress(model, divprune.DivPrune(), keep=4) as handle:
        answer(model, inputs, max_new_tokens=1)
    with torch.no_grad():
        images = image_features(model, inputs)
    for kept, image in zip(sum(handle.last.indices, []), images, strict=True):
        assert torch.equal(kept, divprune.divprune(image, 4).sort().values)


def test_baselines_that_need_more_are_refused():
    class NeedsAttention:
        needs = ("tokens", "cls_attention")

    with pytest.raises(UserError, match="NeedsAttention needs a CLIP vision tower .*cls_attention.*Qwen2VL.*divprune"):
        picker_for(NeedsAttention(), build("qwen2_vl"))
