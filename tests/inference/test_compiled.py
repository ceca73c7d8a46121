"""Compiled models: each handle has its effect, removing it restores the model, and `last` is correct."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import CompileConfig

from evocomp.inference.hooks import compress
from evocomp.log import UserError
from tests.inference import tiny_models
from tests.inference.test_hooks import jumble
from tests.inference.tiny_models import prompts, quiet

BACKEND = "eager"  # Dynamo only: tracing and guards, without a C++ compiler


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model(monkeypatch):
    """Two decoder layers: tracing is slow."""
    for part in (tiny_models.TEXT, tiny_models.VISION):
        monkeypatch.setitem(part, "num_hidden_layers", 2 if part is tiny_models.TEXT else 1)
    torch.manual_seed(0)
    made = tiny_models.FAMILIES["llava"]().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    made.generation_config.pad_token_id, made.generation_config.eos_token_id = tiny_models.PAD, None
    return made


def whole(model):
    return torch.compile(model, backend=BACKEND)


def forward(model):
    model.forward = torch.compile(model.forward, backend=BACKEND)
    return model


def in_place(model):
    model.compile(backend=BACKEND)
    return model


def decoder(model):
    model.model.language_model = torch.compile(model.model.language_model, backend=BACKEND)
    return model


def every_layer(model):
    for block in model.get_decoder().layers:
        block.compile(backend=BACKEND)
    return model


def wrapped_layers(model):
    blocks = model.get_decoder().layers
    for number in range(len(blocks)):
        blocks[number] = torch.compile(blocks[number], backend=BACKEND)
    return model


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def close(ours, theirs):
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "compiled",
    [
        every_layer,
        pytest.param(wrapped_layers, marks=pytest.mark.slow),
        pytest.param(whole, marks=pytest.mark.slow),
        pytest.param(forward, marks=pytest.mark.slow),
        pytest.param(in_place, marks=pytest.mark.slow),
        pytest.param(decoder, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_gives_the_results_of_the_model_at_all_keeps(model, compiled):
    inputs, settings = prompts("llava"), [dict(keep=2), dict(keep=6, layer=1)]
    plain, wanted = logits(model, inputs), []
    for each in settings:
        with compress(model, jumble, **each, restore_length=True):
            wanted.append(logits(model, inputs))
    fast = compiled(copy.deepcopy(model))
    close(logits(fast, inputs), plain)  # compiled before it is compressed
    for each, expected in zip(settings, wanted, strict=True):
        with compress(fast, jumble, **each, restore_length=True) as handle:
            close(logits(fast, inputs), expected)
            assert handle.last.after == [each["keep"], 2 * each["keep"]]
            handle.keep = 16
            close(logits(fast, inputs), plain)
            assert handle.last.after == [16, 32]
    close(logits(fast, inputs), plain)


def test_a_static_cache_that_is_compiled_by_default_decodes_as_a_dynamic_one(model):
    inputs, config = prompts("llava"), CompileConfig(backend=BACKEND, mode=None)
    config._compile_all_devices = True  # as on CUDA
    static = dict(cache_implementation="static", compile_config=config)

    def generate(**kwargs):
        settings = dict(max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
        return model.generate(**inputs, **settings, **quiet(model), **kwargs)

    before = generate(**static)  # this compiles the model, without hooks
    assert hasattr(model, "_compiled_call")
    found = []
    for layer, keep in ((0, 4), (0, 8), (1, 4)):
        with compress(model, jumble, keep=keep, layer=layer) as handle:
            dynamic, fast = generate(), generate(**static)
            assert torch.equal(dynamic.sequences, fast.sequences)
            for ours, theirs in zip(fast.logits, dynamic.logits, strict=True):
                close(ours, theirs)
            assert handle.last.after == [keep, 2 * keep]
            found.append(fast.logits[-1])
    assert not torch.allclose(found[0], found[1], atol=1e-2)
    after = generate(**static)
    assert torch.equal(after.sequences, before.sequences)
    close(after.logits[-1], before.logits[-1])


def test_the_compiled_wrapper_is_unwrapped(model):
    inputs = prompts("llava")
    with compress(whole(model), jumble, keep=2) as handle:
        assert handle.model is model
        logits(model, inputs)  # a direct call of the model, without compilation
        assert handle.last.after == [2, 4]
        with pytest.raises(UserError, match="compressed already"):
            compress(model, jumble)


def test_two_models_of_one_class_share_code_but_not_hooks(model):
    inputs, other = prompts("llava"), every_layer(copy.deepcopy(model))
    plain = logits(model, inputs)
    with compress(model, jumble, keep=2, restore_length=True):
        wanted = logits(model, inputs)
        every_layer(model)
        for _ in range(2):
            close(logits(other, inputs), plain)
            close(logits(model, inputs), wanted)


def test_fullgraph_is_refused(model):
    inputs, config = prompts("llava"), CompileConfig(backend=BACKEND, mode=None, fullgraph=True)
    config._compile_all_devices = True
    with compress(model, jumble, keep=2), pytest.raises(UserError, match="fullgraph=False"):
        model.generate(**inputs, max_new_tokens=3, cache_implementation="static", compile_config=config, **quiet(model))


def test_last_is_none_where_layers_ran_without_hooks(model):
    inputs = prompts("llava")
    with compress(model, jumble, keep=2, layer=1) as handle:
        logits(model, inputs)
        assert handle.last.after == [2, 4]
        model.get_decoder().layers[0]._forward_pre_hooks.clear()
        with pytest.raises(UserError, match="ran without the hooks"):
            logits(model, inputs)
        assert handle.last is None
