"""The script that trains the nano MLLMs: interruption, initial weights, tasks and schedule."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from evocomp.data.scenes import COLORS, SIGN_WORDS, SPECS, draw_scene
from evocomp.mllm.nano import READING_WORDS, WORDS, build_nano, nano_config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))

import nano_mllm
import nano_steps
import nano_tower


def steps(folder, stops) -> torch.Tensor:
    """Weights after 8 steps with random data, with a new process after each stop; only the file is kept."""
    for stop in stops:
        torch.manual_seed(0)
        layer, other = torch.nn.Linear(6, 6, bias=False), torch.nn.Linear(6, 2)
        optimizers = nano_steps.muon_and_adamw([layer.weight], [*layer.parameters(), *other.parameters()], 1e-2)
        rng, draw = np.random.default_rng(1), torch.Generator().manual_seed(1)
        parts = {"layer": layer, "other": other, "muon": optimizers[0], "adamw": optimizers[1]}
        state = nano_steps.State(folder / "x.state", parts, rng, draw)
        for _ in range(state.load(), stop):
            inputs = torch.rand(4, 6, generator=draw) + float(rng.random())
            nano_steps.update(optimizers, other(layer(inputs)).square().mean(), 1e-2)
        state.save(stop)
    return torch.cat([layer.weight.detach().flatten(), other.weight.detach().flatten()])


def test_interrupted_training_gives_the_same_weights(tmp_path):
    for name in ("once", "twice", "shorter"):
        (tmp_path / name).mkdir()
    once = steps(tmp_path / "once", [8])
    assert torch.equal(once, steps(tmp_path / "twice", [3, 8]))
    assert not torch.equal(once, steps(tmp_path / "shorter", [7]))


def test_the_larger_model_starts_from_the_smaller_ones_weights():
    small, large = (
        build_nano(nano_config(size, words=words), torch.Generator().manual_seed(seed))
        for seed, (size, words) in enumerate(((96, WORDS), (192, READING_WORDS)))
    )
    fresh = {name: weight.clone() for name, weight in large.state_dict().items()}
    nano_mllm.take_over(large, small)
    now, old = large.state_dict(), small.state_dict()
    for name, weight in now.items():
        if "position_embedding" in name:
            assert torch.equal(weight, fresh[name])
        elif "embed_tokens" in name or "lm_head" in name:
            known = len(WORDS)
            assert torch.equal(weight[:known], old[name]) and torch.equal(weight[known:], fresh[name][known:])
        else:
            assert torch.equal(weight, old[name]), name


@pytest.mark.parametrize("name", SPECS)
def test_the_towers_targets_match_the_patches(name):
    spec = SPECS[name]
    scene = draw_scene(3, 0, spec)
    truth = nano_tower.patch_truth(scene, spec).reshape(spec.tokens_per_side, spec.tokens_per_side, 5)
    written = {}
    for row, column in np.argwhere(truth[..., 3] > 0):
        written[int(row), int(column)] = nano_tower.GLYPHS[truth[row, column, 2]]
    for thing in scene.objects:
        row, column = int(thing.y // spec.patch), int(thing.x // spec.patch)
        shape, color, _, here, word = truth[row, column]
        assert (nano_tower.FORMS[shape - 1], list(COLORS)[color - 1], here) == (thing.shape, thing.color, 1)
        if thing.word is None:
            assert word == 0 and written.pop((row, column)) == str(thing.digit)
        else:
            assert SIGN_WORDS[word - 1] == thing.word
            assert "".join(written.pop((row, column + place)) for place in (-1, 0, 1)) == thing.word
    assert not written


def test_the_phases_cover_all_steps():
    recipe = nano_mllm.RECIPES["nano576"]
    seen = [nano_mllm.phase_of(recipe, step).tokens for step in range(recipe.llm_steps)]
    assert [seen.count(phase.tokens) for phase in recipe.phases] == [1800, 750, 450]
    assert seen == sorted(seen, key=[phase.tokens for phase in recipe.phases].index)


def test_pruned_samples_keep_all_glyphs_at_their_positions():
    features = torch.arange(2 * 50 * 3).reshape(2, 50, 3).float()
    written = torch.tensor([[4, 49, 4], [0, 17, 30]])
    some, positions = nano_mllm.some_tokens(features, written, 6, torch.Generator().manual_seed(0))
    assert positions.shape == (2, 6) and bool((positions.diff(dim=1) > 0).all())
    for row in range(2):
        assert torch.equal(some[row], features[row, positions[row] - 1])
        assert set(written[row].tolist()) <= set((positions[row] - 1).tolist())
    everything, places = nano_mllm.some_tokens(features, written, 0, torch.Generator())
    assert torch.equal(everything, features) and places[1].tolist() == list(range(1, 51))
