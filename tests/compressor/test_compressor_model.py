"""The compressor, against the target LLM's own layer and against the definitions of masks and budget input."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel

from evocomp.compressor.config import EvoCompConfig, layer_config
from evocomp.compressor.model import EvoCompCompressor
from evocomp.log import UserError
from tests.inference.tiny_models import FAMILIES, HIDDEN, build

every_family = pytest.mark.parametrize("family", FAMILIES)
B, N, T = 2, 7, 4


def make(family="llava", **kwargs):
    torch.manual_seed(0)
    return EvoCompCompressor.from_mllm(build(family), layer=1, **kwargs).eval()


def tokens(n=N, t=T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, n, HIDDEN, generator=generator), torch.randn(B, t, HIDDEN, generator=generator)


@every_family
def test_hidden_is_the_llm_layer_without_causal_mask_plus_skip(family):
    model, compressor = build(family), make(family)
    visual, prompt = tokens()
    llm = model.get_decoder()
    source = torch.cat([visual, prompt], 1)
    positions = torch.arange(1, N + T + 1)[None].expand(B, -1)
    rotary = positions[None].expand(3, -1, -1) if "vl_text" in llm.config.model_type else positions
    extra = (llm.config.layer_types[0],) if family == "gemma3" else ()
    mask = torch.zeros(B, 1, N + T, N + T)
    with torch.no_grad():
        embedded = llm.rotary_emb(source, rotary, *extra)
        layer = llm.layers[1](source, attention_mask=mask, position_embeddings=embedded, position_ids=positions)
        out = compressor(visual, prompt)
    hidden = layer[:, :N] + visual
    assert_close(out.hidden, hidden, rtol=1e-4, atol=1e-4)
    logits = torch.nn.functional.layer_norm(hidden.double(), (HIDDEN,)) @ compressor.score.weight.double().T
    assert_close(out.logits.double(), logits[..., 0] + compressor.score.bias.double(), rtol=1e-4, atol=1e-4)


@every_family
def test_every_token_sees_every_other(family):
    compressor, (visual, prompt) = make(family), tokens()
    with torch.no_grad():
        before = compressor(visual, prompt).logits
        prompt[:, -1] += 1.0
        after = compressor(visual, prompt).logits
    assert (before != after).all()


@every_family
def test_padding_has_no_influence(family):
    compressor = make(family)
    visual, prompt = tokens()
    wide, long = tokens(N + 3, T + 2, seed=9)
    wide[:, :N], long[:, 2:] = visual, prompt  # visual padded on the right, prompt on the left
    visual_mask = torch.arange(N + 3).expand(B, -1) < N
    prompt_mask = torch.arange(T + 2).expand(B, -1) >= 2
    with torch.no_grad():
        alone = compressor(visual, prompt)
        padded = compressor(wide, long, prompt_mask, visual_mask)
    assert_close(padded.logits[:, :N], alone.logits, rtol=1e-5, atol=1e-5)
    assert_close(padded.hidden[:, :N], alone.hidden, rtol=1e-5, atol=1e-5)


def test_gradients_stay_finite_when_a_row_is_all_padding():
    compressor, (visual, prompt) = make(), tokens()
    out = compressor(visual, prompt, torch.tensor([[False] * T, [True] * T]))
    out.logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in compressor.parameters() if p.grad is not None)


@every_family
def test_saves_and_loads_through_the_auto_classes(family, tmp_path):
    compressor, (visual, prompt) = make(family, budget_input=True, metadata={"data": "scenes"}), tokens()
    torch.nn.init.normal_(compressor.budget.visual)
    compressor.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix in (".safetensors", ".bin")) == ["model.safetensors"]
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), EvoCompConfig)
    assert again.config.metadata == {"data": "scenes"} and again.config.budget_input
    assert again.config.init_layer == 1
    state = compressor.state_dict()
    assert state.keys() == again.state_dict().keys() and not any("embed_tokens" in key for key in state)
    assert all(torch.equal(state[key], value) for key, value in again.state_dict().items())
    with torch.no_grad():
        ours, theirs = compressor(visual, prompt, budget=8.0), again(visual, prompt, budget=8.0)
    # equal inputs, but loaded weights may have another alignment, which changes the order of sums in BLAS
    assert_close(ours.logits, theirs.logits, rtol=1e-6, atol=1e-6)


@every_family
def test_layer_is_copied_strictly(family):
    model, compressor = build(family), make(family)
    source = model.get_decoder().layers[1].state_dict()
    assert all(torch.equal(source[k], v) for k, v in compressor.encoder.layers[0].state_dict().items())


def test_random_start_has_the_stated_spread():
    torch.manual_seed(0)
    compressor = EvoCompCompressor(EvoCompConfig.from_mllm(build("llava")))
    for name, weight in compressor.encoder.layers.named_parameters():
        if weight.ndim == 2:
            expected = 0.7 / math.sqrt(weight.shape[1])
            assert abs(weight.std().item() / expected - 1) < 0.1, name
            assert abs(weight.mean().item()) < 0.1 * expected, name
    assert (compressor.encoder.layers[0].input_layernorm.weight == 1).all()


def test_without_text_the_prompt_is_ignored():
    compressor, (visual, prompt) = make(use_text=False), tokens()
    with torch.no_grad():
        assert torch.equal(compressor(visual, prompt).logits, compressor(visual).logits)


def test_budget_vectors_move_visual_and_prompt_by_log2_of_r_over_16():
    compressor, plain = make(budget_input=True), make()
    plain.load_state_dict({k: v for k, v in compressor.state_dict().items() if "budget" not in k})
    visual, prompt = tokens()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        assert torch.equal(compressor(visual, prompt, budget=64).logits, plain(visual, prompt).logits)
        compressor.budget.visual.normal_(generator=generator)
        compressor.budget.text.normal_(generator=generator)
        out = compressor(visual, prompt, budget=torch.tensor([64.0, 4.0]))
        level = torch.tensor([2.0, -2.0])[:, None, None]
        moved = plain(visual + level * compressor.budget.visual, prompt + level * compressor.budget.text)
    # the skip adds the visual token itself, without its budget vector
    expected = moved.hidden - level * compressor.budget.visual
    assert_close(out.hidden, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="budget"):
        compressor(visual, prompt)


@every_family
def test_a_narrow_compressor_equals_that_of_a_narrow_llm_with_projected_tokens(family):
    torch.manual_seed(0)
    settings = {"budget_input": True, "num_layers": 2}
    narrow = EvoCompCompressor.from_mllm(build(family), width=HIDDEN // 2, **settings).eval()
    small = layer_config(narrow.config)  # equals the text configuration of an LLM with half the heads
    whole = narrow.config.text_config
    assert (small.hidden_size, small.num_attention_heads) == (HIDDEN // 2, whole.num_attention_heads // 2)
    assert small.num_key_value_heads == whole.num_key_value_heads // 2
    assert small.head_dim == (getattr(whole, "head_dim", None) or HIDDEN // whole.num_attention_heads)
    assert small.intermediate_size == whole.intermediate_size // 2
    other = EvoCompCompressor(EvoCompConfig(small, **settings)).eval()
    state = narrow.state_dict()
    projection = state.pop("narrow.weight")
    other.load_state_dict(state)
    visual, prompt = tokens()
    with torch.no_grad():
        out = narrow(visual, prompt, budget=8.0)
        expected = other(visual @ projection.T, prompt @ projection.T, budget=8.0)
    assert out.hidden.shape == (B, N, HIDDEN // 2)
    assert_close(out.hidden, expected.hidden, rtol=1e-4, atol=1e-4)
    assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_a_narrow_compressor_is_saved_and_preserves_norms(tmp_path):
    torch.manual_seed(0)
    compressor, (visual, prompt) = EvoCompCompressor.from_mllm(build("llava"), width=HIDDEN // 2).eval(), tokens(64)
    projected = compressor.narrow(visual).detach()
    assert projected.square().mean() / visual.square().mean() == pytest.approx(1, abs=0.25)
    compressor.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_close(again(visual, prompt).logits, compressor(visual, prompt).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [-8, 12, HIDDEN, 2 * HIDDEN])
def test_a_width_without_whole_heads_is_refused(width):
    with pytest.raises(UserError, match=f"compressor width {width}: must be a multiple of 8 below {HIDDEN}"):
        EvoCompCompressor.from_mllm(build("llava"), width=width)


def test_init_from_layer_is_refused_for_a_narrow_compressor():
    with pytest.raises(UserError, match=f"width {HIDDEN // 2}"):
        EvoCompCompressor.from_mllm(build("llava"), layer=0, width=HIDDEN // 2)


@pytest.mark.parametrize(
    "kwargs", [{}, {"use_text": False}, {"budget_input": True, "num_layers": 2}, {"width": HIDDEN // 4}]
)
def test_every_parameter_gets_a_gradient(kwargs):
    # DDP fails for a parameter without gradient
    compressor, (visual, prompt) = EvoCompCompressor.from_mllm(build("llava"), **kwargs), tokens()
    compressor(visual, prompt, budget=32.0).logits.square().sum().backward()
    assert [name for name, p in compressor.named_parameters() if p.grad is None] == []


def test_mrope_positions_pass_through():
    compressor, (visual, prompt) = make("qwen2_vl"), tokens()
    flat = torch.arange(1, N + T + 1).expand(B, -1)
    grid = flat.expand(3, -1, -1).clone()
    with torch.no_grad():
        default = compressor(visual, prompt).logits
        assert torch.equal(compressor(visual, prompt, position_ids=grid).logits, default)
        grid[1, :, :N] = 5
        assert not torch.equal(compressor(visual, prompt, position_ids=grid).logits, default)
        four = torch.cat([flat[None], grid])
        three = compressor(visual, prompt, position_ids=grid).logits
        assert torch.equal(compressor(visual, prompt, position_ids=four).logits, three)


def test_eager_and_sdpa_agree():
    compressor, (visual, prompt) = make(), tokens()
    mask = torch.arange(T).expand(B, -1) >= torch.tensor([[0], [2]])
    with torch.no_grad():
        sdpa = compressor(visual, prompt, mask).logits
        compressor.set_attn_implementation("eager")
        assert_close(compressor(visual, prompt, mask).logits, sdpa, rtol=1e-5, atol=1e-5)


def test_head_norm_none_reads_the_skip_sum():
    compressor, (visual, prompt) = make(head_norm="none"), tokens()
    with torch.no_grad():
        out = compressor(visual, prompt)
        assert torch.equal(compressor.score(out.hidden).squeeze(-1), out.logits)


@pytest.mark.parametrize("bad", [{"head_norm": "batch"}, {"positions": "new"}])
def test_invalid_settings_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        EvoCompConfig(**bad)


def test_layer_config_leaves_the_target_configuration_alone():
    config = EvoCompConfig.from_mllm(build("gemma3"))
    before = config.text_config.to_dict()
    assert layer_config(config).layer_types == ["full_attention"]
    assert config.text_config.to_dict() == before


def test_compiles_without_graph_breaks():
    compressor, (visual, prompt) = make(budget_input=True), tokens()
    compiled = torch.compile(compressor, fullgraph=True, backend="eager")
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 0] = False
    with torch.no_grad():
        expected = compressor(visual, prompt, mask, budget=16.0).logits
        assert_close(compiled(visual, prompt, mask, budget=16.0).logits, expected)


def test_the_head_is_loaded_in_float32(tmp_path):
    make().save_pretrained(tmp_path)
    compressor = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in compressor.encoder.parameters()} == {torch.bfloat16}
    assert compressor.score.weight.dtype == compressor.head_norm.weight.dtype == torch.float32
    visual, prompt = tokens()
    out = compressor(visual.bfloat16(), prompt.bfloat16())
    assert out.logits.dtype == torch.float32 and out.hidden.dtype == torch.bfloat16


def test_gradient_checkpointing_gives_the_same_gradients():
    compressor, (visual, prompt) = make(), tokens()
    compressor.train()
    gradients = []
    for _ in range(2):
        compressor.zero_grad()
        compressor(visual, prompt).logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in compressor.parameters()])
        compressor.gradient_checkpointing_enable()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bf16_weights_and_tokens():
    compressor, (visual, prompt) = make(budget_input=True).bfloat16(), tokens()
    out = compressor(visual.bfloat16(), prompt.bfloat16(), budget=torch.tensor([8.0, 16.0]))
    assert out.logits.dtype == out.hidden.dtype == torch.bfloat16


def test_balanced_text_weighs_as_much_as_the_image():
    """Reference without a bias: each text token is repeated at its position until the text is as long as the image."""
    n, t = 12, 3
    balanced, plain = make(balance_text=True), make()
    plain.load_state_dict(balanced.state_dict())
    visual, prompt = tokens(n, t)
    once = torch.arange(1, n + t + 1)[None].expand(B, -1)
    often = torch.cat([once[:, :n], once[:, n:].repeat_interleave(n // t, 1)], 1)
    with torch.no_grad():
        ours = balanced(visual, prompt, position_ids=once).logits
        oracle = plain(visual, prompt.repeat_interleave(n // t, 1), position_ids=often).logits
        unbalanced = plain(visual, prompt, position_ids=once).logits
    assert_close(ours, oracle, rtol=1e-5, atol=1e-5)
    assert (ours - unbalanced).abs().max() > 1e-3


def test_balanced_text_ignores_padding_and_runs_in_bfloat16():
    compressor, (visual, prompt) = make(balance_text=True), tokens()
    seen_text, seen = torch.ones(B, T, dtype=torch.bool), torch.ones(B, N, dtype=torch.bool)
    seen_text[0, 2:], seen[0, 5:] = False, False
    with torch.no_grad():
        padded = compressor(visual, prompt, seen_text, seen).logits
        alone = compressor(visual[:1, :5], prompt[:1, :2]).logits
        assert_close(padded[:1, :5], alone, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            short = compressor(visual, prompt, seen_text, seen).logits
    assert_close(short.float()[seen], padded[seen], rtol=5e-2, atol=5e-2)
