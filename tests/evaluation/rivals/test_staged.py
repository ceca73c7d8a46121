"""Methods inside the LLM, compared with the unmodified model and with transformers' decoder run on the last layers."""

import copy

import pytest
import torch
from torch import nn

from evocomp.data.scenes import SceneSpec, scene_examples
from evocomp.evaluation.panel import Panel
from evocomp.evaluation.rivals.layers import LayerLoop
from evocomp.evaluation.rivals.staged import (
    STAGED,
    at_depth,
    one_drop,
    pyramiddrop_plan,
    run_staged,
    sparsevlm_plan,
    staged_outcomes,
)
from evocomp.log import UserError
from evocomp.mllm.hf import FrozenMLLM
from evocomp.selection.schedule import Stage, layer_average

METHODS = {method.label: method for method in STAGED}


@pytest.fixture(scope="module")
def panel():
    return Panel(FrozenMLLM.load("nano"), scene_examples(77, 0, 2, SceneSpec())[:12])


@pytest.fixture(scope="module")
def loop(panel):
    return LayerLoop(panel.mllm)


def whole(asked):
    return asked.features, asked.features.visual, torch.arange(len(asked.features.visual))


def transformers_from(loop, layer, hidden, positions):
    """Logits [V] of the last row, from transformers' Llama with only the layers from `layer` on."""
    tail = copy.copy(loop.decoder)
    tail._modules = dict(loop.decoder._modules)
    tail.layers = nn.ModuleList(loop.decoder.layers[layer:])
    tail.config = copy.copy(loop.decoder.config)
    tail.config.num_hidden_layers = len(tail.layers)
    output = tail(
        inputs_embeds=hidden[None],
        position_ids=positions[None],
        attention_mask=torch.ones(1, len(hidden)),
        use_cache=False,
    )
    return loop.mllm.head(output.last_hidden_state[0, -1])


@torch.no_grad()
def test_nothing_dropped_is_the_unmodified_model(panel, loop):
    for asked in panel.asked[:4]:
        (text,), logits = panel.mllm.answer([whole(asked)], 4)
        said, first = loop.answer(loop.path(asked.features)[-1], 4)
        assert said == text
        torch.testing.assert_close(first, logits[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_several_tokens_are_those_of_the_unmodified_model(panel, loop, monkeypatch):
    monkeypatch.setattr(panel.mllm, "_stop_ids", lambda: [])  # nano answers with one word; force it to continue
    for asked in panel.asked[:3]:
        said, _ = loop.answer(loop.path(asked.features)[-1], 6)
        (text,), _ = panel.mllm.answer([whole(asked)], 6)
        assert said == text


@torch.no_grad()
def test_attention_is_what_eager_transformers_reports(panel, loop):
    asked = panel.asked[0]
    eager = FrozenMLLM.load("nano", attention="eager")
    path = loop.path(asked.features)
    output = eager.decoder(
        inputs_embeds=path[0].hidden[None], position_ids=path[0].positions[None], output_attentions=True
    )
    for layer in range(loop.depth):
        torch.testing.assert_close(
            loop.attention(path[layer], 3), output.attentions[layer][0, :, -3:], rtol=1e-4, atol=1e-6
        )


@torch.no_grad()
@pytest.mark.parametrize("label", METHODS)
def test_what_follows_the_last_drop_is_transformers_on_the_shorter_sequence(panel, loop, label):
    asked = panel.asked[1]
    done = run_staged(loop, METHODS[label], loop.path(asked.features), 16)
    short = done.previous  # input of the last layer
    expected = transformers_from(loop, short.layer, short.hidden, short.positions)
    torch.testing.assert_close(loop.answer(done, 1)[1], expected, rtol=1e-4, atol=1e-5)
    dense = label in ("sparsevlm_inside", "pyramiddrop_inside")
    assert (short.positions.diff() == 1).all() == dense


@torch.no_grad()
def test_fastv_is_attention_of_the_layer_before_and_a_mask_from_there_on(panel, loop):
    """The published drop by hand: eager attention of layer 1, keys of dropped tokens masked from layer 2 on."""
    asked, kept = panel.asked[2], 20
    eager = FrozenMLLM.load("nano", attention="eager")
    door = loop.door(asked.features)
    inputs = {"inputs_embeds": door.hidden[None], "position_ids": door.positions[None], "use_cache": False}
    attention = eager.decoder(**inputs, output_attentions=True).attentions[1][0].mean(0)[-1]
    columns = attention[door.start : door.start + door.count]
    drop = columns.argsort()[:-kept] + door.start

    def hide(module, args, kwargs):
        length = len(door.hidden)
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
        mask[:, drop] = torch.finfo(torch.float32).min
        return args, {**kwargs, "attention_mask": mask[None, None]}

    handle = eager.decoder.layers[2].register_forward_pre_hook(hide, with_kwargs=True)
    expected = eager.head(eager.decoder(**inputs).last_hidden_state[0, -1])
    handle.remove()
    done = run_staged(loop, METHODS["fastv_inside"], loop.path(asked.features), kept)
    torch.testing.assert_close(loop.answer(done, 1)[1], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_decoding_after_a_drop_reads_every_layers_own_cache(panel, loop, monkeypatch):
    """The second token equals that of a prompt that already ends with the first one."""
    asked = panel.asked[0]
    done = run_staged(loop, METHODS["pyramiddrop_inside"], loop.path(asked.features), 16)
    token = int(loop.answer(done, 1)[1].argmax())
    embedded = panel.mllm.embed(torch.tensor([token]))
    hidden, short = embedded, done
    chain = []
    while short is not None:
        chain.insert(0, short)
        short = short.previous
    for before in chain[:-1]:  # each layer reads its own sequence with the new token appended
        rows = torch.cat([before.hidden, hidden])
        positions = torch.cat([before.positions, before.positions[-1:] + 1])
        layer = loop.decoder.layers[before.layer]
        mask = torch.full((len(rows), len(rows)), torch.finfo(torch.float32).min).triu(1)[None, None]
        rotary = loop.decoder.rotary_emb(rows[None], positions[None])
        hidden = layer(rows[None], attention_mask=mask, position_embeddings=rotary)[0][-1:]
    expected = loop.mllm.head(loop.decoder.norm(hidden))[0]
    seen = []
    monkeypatch.setattr(loop.mllm, "_stop_ids", lambda: [])
    hook = loop.mllm.head.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    loop.answer(done, 2)
    hook.remove()
    torch.testing.assert_close(seen[1], expected, rtol=1e-4, atol=1e-5)


def len_of(done, layer):
    return done.cache.held[layer][0].shape[2]


@torch.no_grad()
@pytest.mark.parametrize("label", METHODS)
@pytest.mark.parametrize("kept", [48, 4])
def test_the_layer_average_is_what_was_really_processed(panel, loop, label, kept):
    done = run_staged(loop, METHODS[label], loop.path(panel.asked[3].features), kept)
    text = len(done.hidden) - done.count
    processed = [len_of(done, layer) - text for layer in range(loop.depth)]
    plan = METHODS[label].plan(144, kept, loop.depth)
    assert sum(processed) / 3 == pytest.approx(layer_average(144, plan.stages, 3))


def test_published_schedules_at_published_depth():
    assert one_drop(576, 64, 32).stages == (Stage(2, 64),)
    averages = {kept: layer_average(576, sparsevlm_plan(576, kept, 32).stages) for kept in (192, 128, 64)}
    # number of rows that the authors' code processes, including layer 2 and merged rows
    assert {kept: round(average) for kept, average in averages.items()} == {192: 206, 128: 145, 64: 82}
    assert sparsevlm_plan(576, 192, 32).keep == (300, 200, 110)
    for kept in (192, 128, 64):
        assert kept - 2 < layer_average(576, pyramiddrop_plan(576, kept, 32).stages) <= kept


def test_shallow_llms_take_the_places_in_proportion():
    assert at_depth((2,), 3) == {2: 0}
    assert at_depth((3, 7, 16), 3) == {1: 1, 2: 2}
    assert at_depth((8, 16, 24), 25) == {8: 0, 16: 1, 24: 2}
    with pytest.raises(UserError, match="one layer"):
        at_depth((2,), 1)


def test_rows_of_the_panel(panel):
    outcomes = staged_outcomes(panel, [144, 16])
    assert [(o.method, o.kept) for o in outcomes] == [(m.label, k) for m in STAGED for k in (144, 16)]
    assert all(len(o.answers) == len(panel.asked) and "layer" in o.note for o in outcomes)
    full = panel.full()
    assert list(outcomes[0].answers) == list(full.answers)  # FastV that keeps all tokens
    assert outcomes[1].kept_average == pytest.approx((2 * 144 + 16) / 3)
