"""Families outside the table: a derived policy, checked on the first prompt, is exact or is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from evocomp.inference.hooks import compress
from evocomp.inference.rewrite import compress_inputs
from evocomp.log import UserError
from evocomp.mllm import attention, families
from tests.inference.derived_models import BUILDERS, build
from tests.inference.test_hooks import answer, jumble
from tests.inference.tiny_models import IMAGE, PAD

EXACT = [name for name in BUILDERS if name != "mllama"]
SHARED_KEYS = "gemma4_shared_keys"  # layer 0 only: its last two layers use the keys of layers 0 and 1
every_family = pytest.mark.parametrize("family", EXACT)
every_layer = pytest.mark.parametrize("layer", [0, 1, 2])


def skip_refused(family, layer):
    if family == SHARED_KEYS and layer:
        pytest.skip("refused at this layer")


def difference(ours, plain):
    pairs = zip(ours.logits, plain.logits, strict=True)
    return max((a - b)[a.isfinite() & b.isfinite()].abs().max().item() for a, b in pairs)


@every_family
@every_layer
def test_keeping_all_changes_nothing(family, layer):
    skip_refused(family, layer)
    model, inputs = build(family)
    plain = answer(model, inputs)
    with compress(model, jumble, keep=1.0, layer=layer) as handle:
        ours = answer(model, inputs)
        assert handle.trust == ("table" if family == "llama4" else "checked")
        assert handle.last.after == handle.last.before == [int((inputs["input_ids"] == IMAGE).sum())]
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, plain.logits, strict=True))


def on_the_kept_tokens(model, inputs, kept, layer):
    """Logits [V] after the prompt: the unhooked layers on the kept tokens, by a decoder that begins at `layer`."""
    seen, states = {}, {}
    llm = families.decoder(model)
    hooks = [
        llm.register_forward_pre_hook(lambda _, __, kw: seen.update(kw), with_kwargs=True),
        llm.layers[layer].register_forward_pre_hook(lambda _, args: states.update(hidden=args[0])),
    ]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    ids = inputs["input_ids"][0]
    stays = ids != IMAGE
    stays[(ids == IMAGE).nonzero().squeeze(1)[kept]] = True
    positions = seen.get("position_ids")
    positions = torch.arange(len(ids))[None] if positions is None else positions
    positions = positions[..., stays]
    if positions.ndim == 3 and len(positions) == 4:
        positions[0] = torch.arange(positions.shape[-1])
    given = {name: seen[name][:, stays] for name in ("per_layer_inputs",) if seen.get(name) is not None}
    if seen.get("deepstack_visual_embeds") is not None:
        given["visual_pos_masks"] = seen["visual_pos_masks"][:, stays]
        given["deepstack_visual_embeds"] = [rows[kept] for rows in seen["deepstack_visual_embeds"]]
    short = llm
    if layer:
        short, config = copy.copy(llm), copy.copy(llm.config)
        short._modules = dict(llm._modules, layers=nn.ModuleList(llm.layers[layer:]))
        config.num_hidden_layers -= layer
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[layer:]
        short.config = config
    mask = torch.ones(positions.shape[-2:], dtype=torch.long)
    if getattr(llm.config, "use_bidirectional_attention", None):  # within an image, in layers with a window only
        place, visual = torch.arange(int(stays.sum())), (ids == IMAGE)[stays]
        before, near = place[:, None] >= place, place[:, None] - place < llm.config.sliding_window
        near_or_block = near & (before | visual[:, None] & visual)
        mask = {"full_attention": before[None, None], "sliding_attention": near_or_block[None, None]}
    embeds = (seen["inputs_embeds"] if layer == 0 else states["hidden"])[:, stays]
    with torch.no_grad():
        out = short.forward(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, **given)
    return model.get_output_embeddings()(out.last_hidden_state[0, -1])


@every_family
@every_layer
def test_pruned_is_the_models_own_decoder_on_the_kept_tokens(family, layer):
    skip_refused(family, layer)
    if layer and family in ("qwen3_vl_moe", "gemma4"):
        pytest.skip("its first layers take more than embeddings")
    model, inputs = build(family)
    with compress(model, jumble, keep=0.4, layer=layer) as handle:
        out = answer(model, inputs, max_new_tokens=1)
    plain = answer(model, inputs, max_new_tokens=1)
    wanted = on_the_kept_tokens(model, inputs, handle.last.indices[0][0], layer)
    finite = out.logits[0][0].isfinite()
    assert_close(out.logits[0][0][finite], wanted[finite], rtol=1e-4, atol=1e-4 * wanted.std().item())
    assert difference(out, plain) > 1e-3


@every_family
@every_layer
def test_with_and_without_a_cache_agree(family, layer):
    skip_refused(family, layer)
    model, inputs = build(family)
    with compress(model, jumble, keep=0.4, layer=layer):
        assert difference(answer(model, inputs), answer(model, inputs, use_cache=False)) < 1e-5


def left_padded(inputs):
    """The prompt, left-padded, above a longer one with the same image; and that one alone."""
    ids, more = inputs["input_ids"], torch.tensor([[30, 40, 50, 60, 70]])
    rows = torch.cat([torch.cat([torch.full_like(more, PAD), ids], 1), torch.cat([ids, more], 1)])
    along = ("input_ids", "attention_mask", "mm_token_type_ids")
    pixels = {name: value for name, value in inputs.items() if name not in along}
    both = {name: torch.cat([value, value]) for name, value in pixels.items()} | {"input_ids": rows}
    if "target_sizes" in inputs:  # MiniCPM-V packs the patches of all images along the last dimension
        both["pixel_values"] = torch.cat([inputs["pixel_values"]] * 2, dim=-1)
    alone = pixels | {"input_ids": rows[1:], "attention_mask": torch.ones_like(rows[1:])}
    both["attention_mask"] = torch.ones_like(rows)
    both["attention_mask"][0, : more.shape[1]] = 0
    if "mm_token_type_ids" in inputs:
        both["mm_token_type_ids"] = (rows == IMAGE).int()
        alone["mm_token_type_ids"] = both["mm_token_type_ids"][1:]
    return both, alone


@every_family
@every_layer
def test_a_batch_answers_as_its_rows_alone(family, layer):
    skip_refused(family, layer)
    model, inputs = build(family)
    both, alone = left_padded(inputs)
    with compress(model, jumble, keep=0.4, layer=layer):
        batch, first, second = (answer(model, one) for one in (both, inputs, alone))
    for one, a, b in zip(batch.logits, first.logits, second.logits, strict=True):
        finite = one.isfinite()
        assert_close(one[finite], torch.cat([a, b])[finite], rtol=0, atol=1e-5)


@every_family
def test_shorter_inputs_give_the_answers_of_the_hooks(family):
    if family == "llama4":
        pytest.skip("its encoder gives no projected tokens")
    model, inputs = build(family)
    with compress(model, jumble, keep=0.4):
        hooked = answer(model, inputs)
    assert difference(hooked, answer(model, compress_inputs(model, inputs, jumble, keep=0.4))) < 1e-5


def test_cross_attention_and_encoder_decoders_are_refused_as_such():
    with pytest.raises(UserError, match="mllama.*cross-attention"):
        compress(build_only("mllama"), jumble)


def build_only(family):
    return BUILDERS[family]()[0]


def test_layers_before_shared_keys_only():
    with pytest.raises(UserError, match="keys of layer 0; use a layer from 0 to 0"):
        compress(build(SHARED_KEYS)[0], jumble, layer=1)


def test_only_the_table_on_request():
    with pytest.raises(UserError, match="glm4v is not in the table.*trust='checked'"):
        compress(build("glm4v")[0], jumble, trust="table")
    with pytest.raises(UserError, match="use 'checked' or 'table'"):
        compress(build("glm4v")[0], jumble, trust="blind")


@pytest.mark.parametrize("fault", ["mask", "position"])
def test_the_check_finds_what_is_not_exact(fault, monkeypatch):
    model, inputs = build("cohere2_vision")
    if fault == "mask":  # all layers would attend to everything before
        monkeypatch.setattr(attention, "layer_types", lambda config: ("full_attention",) * config.num_hidden_layers)
        reason = "with all tokens kept"
    else:
        monkeypatch.setattr("evocomp.inference.state.take", lambda x, index: x[..., -index.shape[1] :, :])
        reason = "with tokens dropped"
    with compress(model, jumble, keep=0.4) as handle:
        for _ in range(2):
            with pytest.raises(UserError, match=f"not exact for Cohere2Vision.*{reason}"):
                answer(model, inputs)
        assert handle.last is None
    assert answer(model, inputs).logits[0].isfinite().any()


def test_the_check_leaves_no_trace(family="qwen3_5"):
    model, inputs = copy.deepcopy(build(family)[0]), build(family)[1]
    model.train()
    with compress(model, jumble, keep=0.4, prompt_length=inputs["input_ids"].shape[1]) as handle:
        model(**inputs)
        assert model.training and all(module.training for module in model.modules())
        assert handle.last.after == [6]
    assert not any(module._forward_hooks for module in model.modules())
