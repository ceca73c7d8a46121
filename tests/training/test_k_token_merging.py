"""K-Token Merging: its loss equals the model's, training changes only merger and LoRA, saving and loading."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from evocomp.data.scenes import SceneSpec, scene_examples
from evocomp.evaluation.k_token_merging import k_token_outcomes
from evocomp.evaluation.panel import Panel
from evocomp.inference.k_token_merging import KTokenMerger
from evocomp.log import UserError
from evocomp.mllm.hf import FrozenMLLM
from evocomp.training.k_token_merging import KTokenModule, train
from tests.mllm.answer_logits import answer_logits


@pytest.fixture(scope="module")
def mllm():
    return FrozenMLLM.load("nano")


@pytest.fixture(scope="module")
def examples():
    return scene_examples(66, 0, 4, SceneSpec())[:32]


def means_only(mllm: FrozenMLLM, block: int) -> KTokenMerger:
    """A merger whose MLP has zero output."""
    model = KTokenMerger(mllm, block)
    for parameter in model.merger.residual[-1].parameters():
        torch.nn.init.zeros_(parameter)
    return model


@torch.no_grad()
def test_blocks_of_one_are_the_frozen_model(mllm, examples):
    """With K = 1, initial LoRA and no MLP it is the identity, with transformers' loss on answer and <eos>."""
    features = mllm.features(examples[:3])
    model = means_only(mllm, 1)
    for one, loss in zip(features, model.losses(features), strict=True):
        end = torch.tensor([mllm.processor.tokenizer.eos_token_id])
        one = replace(one, answer_ids=torch.cat([one.answer_ids, end]))
        logits = answer_logits(mllm, one, one.visual[None], torch.arange(144)[None])[0]
        expected = torch.nn.functional.cross_entropy(logits, one.answer_ids)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_blocks_are_means_at_the_middle_of_the_block(mllm, examples):
    one = mllm.features(examples[:1])[0]
    tokens, index = means_only(mllm, 9).merge(one)
    torch.testing.assert_close(tokens, one.visual.unflatten(0, (16, 9)).mean(1))
    assert index.tolist() == list(range(4, 144, 9))


def test_training_lowers_the_loss_and_leaves_the_frozen_model_alone(mllm, examples, tmp_path):
    before = copy.deepcopy(mllm.model.state_dict())
    features = mllm.features(examples)
    untrained = float(KTokenMerger(mllm, 9).losses(features).mean())
    model = train(mllm, examples, block=9, steps=25, batch_size=16, r=2, lr=5e-3)
    with torch.no_grad():
        trained = float(model.losses(features).mean())
    assert trained < 0.9 * untrained
    after = mllm.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in model.mllm.model.parameters())
    answers = model.answer(features[:8])
    assert all(len(text.split()) == 1 for text in answers)  # generation still stops
    model.save(tmp_path / "16")
    loaded = KTokenMerger.load(tmp_path / "16", mllm)
    with torch.no_grad():
        torch.testing.assert_close(loaded.losses(features), model.losses(features), rtol=0, atol=0)


def test_checkpoints_hold_merger_and_lora_only(mllm):
    model = KTokenMerger(mllm, 3, r=2)
    names = set(KTokenModule(model).state_dict())
    assert len([n for n in names if n.startswith("lora.")]) == 3 * 7 * 2  # layers, linears, A and B
    assert all(n.startswith(("lora.", "merger.")) for n in names)


def test_rows(mllm, examples, tmp_path):
    panel = Panel(mllm, examples[:6], batch=4)
    folder = tmp_path / "k_token_merging" / "48"
    KTokenMerger(mllm, 3).save(folder)
    one, sixteen, five = k_token_outcomes(panel, tmp_path, [48, 16, 5])
    assert one.not_applicable is None and len(one.answers) == 6 and np.isfinite(one.correct).all()
    assert "not trained" in sixteen.not_applicable and "equal blocks" in five.not_applicable
    other = FrozenMLLM(mllm.model, mllm.processor, "another")
    with pytest.raises(UserError, match="trained for model.name=nano"):
        KTokenMerger.load(folder, other)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"block": 3', '"block": 4'))
    with pytest.raises(UserError, match="a merger of an earlier version.*train again"):
        KTokenMerger.load(folder, mllm)
