"""A compressor as a LoRA adapter: its trained weights, and equal outputs after saving and merging."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from evocomp.compressor.lora import add_lora, is_lora, load_lora, merge_lora, save_lora
from evocomp.compressor.model import EvoCompCompressor
from evocomp.log import UserError
from tests.inference.tiny_models import FAMILIES, HIDDEN, build


def trained(model, **kwargs):
    """An adapter after three steps of training."""
    torch.manual_seed(0)
    adapter = add_lora(EvoCompCompressor.from_mllm(model, layer=1, budget_input=True, **kwargs), r=2)
    visual, prompt = torch.randn(2, 6, HIDDEN), torch.randn(2, 3, HIDDEN)
    optimizer = torch.optim.Adam([p for p in adapter.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        adapter(visual, prompt, budget=4.0).logits.square().mean().backward()
        optimizer.step()
    return adapter.eval(), visual, prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_loading_and_merging_change_nothing(family, tmp_path):
    model = build(family)
    adapter, visual, prompt = trained(model)
    with torch.no_grad():
        wanted = adapter(visual, prompt, budget=4.0).logits
        save_lora(adapter, tmp_path)
        assert is_lora(tmp_path)
        loaded = load_lora(tmp_path, model).eval()
        assert_close(loaded(visual, prompt, budget=4.0).logits, wanted, rtol=1e-5, atol=1e-6)
        merged = merge_lora(loaded)
        assert type(merged) is EvoCompCompressor
        assert_close(merged(visual, prompt, budget=4.0).logits, wanted, rtol=1e-4, atol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        assert not is_lora(tmp_path / "merged")
        whole = EvoCompCompressor.from_pretrained(tmp_path / "merged").eval()
        assert_close(whole(visual, prompt, budget=4.0).logits, wanted, rtol=1e-4, atol=1e-5)


def test_the_layer_is_frozen_and_not_saved(tmp_path):
    model = build("llava")
    adapter, _, _ = trained(model)
    layer = model.get_decoder().layers[1].state_dict()
    for name, weight in adapter.get_base_model().encoder.layers[0].named_parameters():
        if "lora_" not in name:
            assert not weight.requires_grad
            assert torch.equal(weight, layer[name.replace("base_layer.", "")])
    save_lora(adapter, tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert all(any(part in name for part in ("lora_", "score", "head_norm", "budget")) for name in names)
    assert sum("budget" in name for name in names) == 2 and sum("score" in name for name in names) == 2


def test_lora_is_refused_for_a_random_compressor():
    with pytest.raises(UserError, match="layer=0"):
        add_lora(EvoCompCompressor.from_mllm(build("llava")))


def test_heads_without_norm_and_without_budget():
    compressor = EvoCompCompressor.from_mllm(build("llava"), layer=0, head_norm="none")
    assert add_lora(compressor, r=2).peft_config["default"].modules_to_save == ["score"]
