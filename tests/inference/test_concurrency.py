"""Calls from several threads on one handle are independent, and so are two forward passes before one backward pass."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.testing import assert_close

from evocomp.inference.hooks import compress
from tests.inference.test_hooks import jumble
from tests.inference.test_speculation import one_prompt
from tests.inference.tiny_models import build, prompts, quiet


def questions(family):
    """Ten prompts about one image, of different length."""
    found = []
    for number in range(10):
        inputs = {name: value.clone() for name, value in one_prompt(family).items()}
        inputs["input_ids"][0, -3:] = torch.tensor([20 + number, 60, 61])
        shape, cut = inputs["input_ids"].shape, number % 4
        keep = [i for i in range(shape[1]) if i not in range(shape[1] - 3 - cut, shape[1] - 3)]
        found.append({name: v[:, keep] if v.shape == shape else v for name, v in inputs.items()})
    return found


@pytest.mark.parametrize("family", ["llava", "mistral3", "gemma3", "smolvlm", "internvl", "qwen2_5_vl"])
@pytest.mark.parametrize("layer", [0, 2])
def test_threads_give_the_answers_of_sequential_calls(family, layer):
    model = build(family)
    if family == "internvl":
        rows = [prompts(family)] * 4
    else:
        rows = questions(family)

    def ask(inputs):
        out = model.generate(**inputs, max_new_tokens=4, **quiet(model))
        return out.tolist(), [image.tolist() for row in handle.last.indices for image in row]

    with compress(model, jumble, keep=5, layer=layer) as handle:
        alone = [ask(inputs) for inputs in rows]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(ask, rows * 2))
        assert handle.last.after  # of this thread's last call
    assert together == alone * 2


def test_a_thread_that_has_made_no_call_sees_the_last_of_any(monkeypatch):
    model, inputs = build("llava"), prompts("llava")
    with compress(model, jumble, keep=5) as handle, ThreadPoolExecutor(1) as pool:
        assert handle.last is None
        pool.submit(model.generate, **inputs, max_new_tokens=1, **quiet(model)).result()
        assert handle.last.after == [5, 10]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_two_forward_passes_before_one_backward(layer, reentrant):
    # as in preference optimisation; the backward pass runs layers again with the inputs of their own call
    inputs = prompts("llava")
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    pairs = [(inputs, labels)]
    other = {name: value[1:] for name, value in inputs.items() if name != "pixel_values"}
    pairs.append((other | {"pixel_values": inputs["pixel_values"][1:]}, labels[1:]))

    def gradients(checkpointing):
        model = copy.deepcopy(build("llava")).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with compress(model, jumble, keep=5, layer=layer, restore_length=True):
            sum(model(**each, labels=target).loss for each, target in pairs).backward()
        return [parameter.grad for parameter in model.get_decoder().parameters()]

    for ours, wanted in zip(gradients(True), gradients(False), strict=True):
        assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
