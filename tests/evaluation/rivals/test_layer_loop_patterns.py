"""The layer loop on many kinds of text decoders, compared with their own forward pass."""

from types import SimpleNamespace

import pytest
import torch

from evocomp.evaluation.rivals.layers import LayerLoop
from evocomp.evaluation.rivals.probes import Probes
from evocomp.log import UserError
from evocomp.mllm.hf import FrozenMLLM
from tests.mllm.text_decoders import DECODERS, REFUSED, TOKENS, build, samples

PLAIN_FAULTS = {
    "llama, a window that it ignores": "differ from its own forward",
    "olmo": "differ from its own forward",  # clips queries and keys
    "olmo2": "without input_layernorm",
    "stablelm": "cannot be run one by one",  # rotates only part of each head
    "phi": "without input_layernorm",
    "gpt_neox": "without input_layernorm",
    "smollm3": "differ from its own forward",  # does not rotate in some layers
    "llama4, scaled queries": "cannot be run one by one",
    "qwen2_vl": "M-RoPE",
    "lfm2": "layers of type conv",
    "qwen3_next": "layers of type linear_attention",
}
WINDOW_FAULTS = {
    "phi3": "without input_layernorm",
    "qwen2_5_vl": "M-RoPE",
    "gemma2": "differ from its own forward",  # caps the logits of its attention
    "cohere2": "differ from its own forward",  # does not rotate in some layers
    "exaone4": "without input_layernorm",
    "olmo3": "without input_layernorm",
    "gpt_oss": "differ from its own forward",  # attention sinks
    "llama4": "cannot be run one by one",
}
LOOP_FAULTS = PLAIN_FAULTS | {
    name: fault
    for name in DECODERS
    for family, fault in WINDOW_FAULTS.items()
    if name.startswith((f"{family}, window", f"{family}, chunks"))
}
"""Decoders that the loop refuses, and why."""


def own_forward(mllm: FrozenMLLM, embeds, positions) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """States [L, D] and attention probabilities [H, L, L] of each layer, computed by transformers' eager attention."""
    config = mllm.decoder.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        with torch.no_grad():
            output = mllm.decoder(
                inputs_embeds=embeds,
                position_ids=positions,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                output_attentions=True,
                use_cache=False,
            )
    finally:
        config._attn_implementation = before
    return output.last_hidden_state[0], [attention[0] for attention in output.attentions]


def assert_probes_are_the_decoders_own_or_none(mllm, features, needs):
    found = Probes(mllm).gather(None, features, needs)
    if not found:
        return
    embeds, positions = mllm.assemble(features, features.visual[None], torch.arange(TOKENS)[None])
    _, attentions = own_forward(mllm, embeds, positions)
    for number, theirs in enumerate(attentions):
        given = found["llm_attention"][number]
        torch.testing.assert_close(given, theirs[:, -given.shape[1] :], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in REFUSED])
def test_it_is_the_decoders_own_forward_or_refused(name, monkeypatch):
    mllm = build(name)
    features = samples(mllm)[0]
    needs = {"llm_attention", "llm_keys", "llm_hidden"}
    if name in LOOP_FAULTS:
        with pytest.raises(UserError, match=LOOP_FAULTS[name]):
            LayerLoop(mllm)
        assert_probes_are_the_decoders_own_or_none(mllm, features, needs)
        return
    loop = LayerLoop(mllm)
    embeds, positions = mllm.assemble(features, features.visual[None], torch.arange(TOKENS)[None])
    states, attentions = own_forward(mllm, embeds, positions)
    runs = loop.path(features)
    torch.testing.assert_close(loop.normed(runs[-1]), states, atol=1e-4, rtol=1e-4)
    probed = Probes(mllm).gather(None, features, needs)["llm_attention"]
    for number, theirs in enumerate(attentions):
        torch.testing.assert_close(loop.attention(runs[number], 5), theirs[:, -5:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(probed[number], theirs[:, -5:], atol=1e-5, rtol=1e-4)
    second = second_logits(loop, runs[-1], monkeypatch)
    token = int(mllm.head(states[-1]).argmax())
    embeds = torch.cat([embeds, mllm.embed(torch.tensor([[token]]))], dim=1)
    positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
    states, _ = own_forward(mllm, embeds, positions)
    torch.testing.assert_close(second, mllm.head(states[-1]).detach(), atol=1e-4, rtol=1e-4)


def second_logits(loop: LayerLoop, done, monkeypatch) -> torch.Tensor:
    """Logits [V] of the second token of the loop's answer."""
    monkeypatch.setattr(loop.mllm, "_stop_ids", lambda: [])
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "")
    monkeypatch.setattr(loop.mllm, "processor", SimpleNamespace(tokenizer=tokenizer))
    logits: list[torch.Tensor] = []
    hook = loop.mllm.head.register_forward_hook(lambda _, __, output: logits.append(output[0]))
    try:
        loop.answer(done, 2)
    finally:
        hook.remove()
    return logits[1]


@pytest.mark.parametrize("name", REFUSED)
def test_positions_beyond_the_limit_of_their_rope_are_refused(name):
    with pytest.raises(UserError, match=REFUSED[name]):
        LayerLoop(build(name))
