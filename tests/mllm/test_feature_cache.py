"""Features from the disk cache equal those of the tower, even if files are damaged or the disk is full."""

import copy
import errno
import multiprocessing
import os

import pytest
import torch

from evocomp.log import UserError
from evocomp.mllm import families
from evocomp.mllm.feature_cache import FeatureCache
from evocomp.mllm.hf import FrozenMLLM
from tests.inference.tiny_models import PICTURE_TOKENS, build, prompts


def tokens(model, inputs, encoded) -> torch.Tensor:
    rows = families.visual_tokens(model, inputs["input_ids"], encoded)
    deepstack = families.deepstack_rows(encoded)
    return rows if deepstack is None else torch.cat([rows[None], deepstack])


def runs_of_layers(model) -> list[int]:
    """A list that grows by one for every forward pass of a linear layer of the tower."""
    runs: list[int] = []
    for module in families.tower(model).modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("family", PICTURE_TOKENS)
def test_every_family_gets_the_same_tokens_to_the_bit_without_its_tower(family, tmp_path):
    model, inputs = copy.deepcopy(build(family)), prompts(family)
    for weight in model.parameters():
        if not weight.any():  # with a projector of zeros all outputs would be equal
            torch.nn.init.normal_(weight)
    cache, runs = FeatureCache(tmp_path, model, "a"), runs_of_layers(model)
    with torch.no_grad():
        expected = tokens(model, inputs, families.encode(model, inputs))
        first = tokens(model, inputs, cache.encode(inputs))
        spent = len(runs)
        again = tokens(model, inputs, cache.encode(inputs))
        other = tokens(model, inputs, cache.encode({**inputs, "pixel_values": 2 * inputs["pixel_values"]}))
    assert torch.equal(first, expected) and torch.equal(again, expected) and not torch.equal(other, expected)
    assert 0 < spent == len(runs) * 2 / 3  # the tower did not run the second time
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_the_cache_is_smaller_than_llavas_projector_output(tmp_path):
    """Per token, 16 numbers are cached and the projector returns 32; in LLaVA-1.5 these are 1,024 and 4,096."""
    model, inputs = build("llava"), prompts("llava")
    FeatureCache(tmp_path, model, "a").encode(inputs)
    (path,) = tmp_path.rglob("*.safetensors")
    width = families.tower(model).config.hidden_size
    assert path.stat().st_size < 4 * width * 3 * 17 + 200


def test_other_models_pixels_and_dtypes_have_separate_files(tmp_path):
    model, inputs = build("llava"), prompts("llava")
    FeatureCache(tmp_path, model, "a").encode(inputs)
    FeatureCache(tmp_path, model, "b").encode(inputs)
    FeatureCache(tmp_path, model, "b").encode({**inputs, "pixel_values": inputs["pixel_values"] + 1})
    half = copy.deepcopy(model).to(torch.bfloat16)
    FeatureCache(tmp_path, half, "b").encode({**inputs, "pixel_values": inputs["pixel_values"].bfloat16()})
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4
    # the cache key does not depend on the text
    FeatureCache(tmp_path, model, "b").encode({**inputs, "attention_mask": inputs["attention_mask"] * 0 + 1})
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


def test_a_damaged_file_is_replaced(tmp_path, caplog):
    model, inputs = build("llava"), prompts("llava")
    cache = FeatureCache(tmp_path, model, "a")
    expected = tokens(model, inputs, cache.encode(inputs))
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert torch.equal(tokens(model, inputs, cache.encode(inputs)), expected)
    assert "damaged" in caplog.text and path.read_bytes() == whole


def test_a_full_disk_stops_writing_but_not_the_run(tmp_path, monkeypatch, caplog):
    model, inputs = build("llava"), prompts("llava")
    cache = FeatureCache(tmp_path, model, "a")
    expected = tokens(model, inputs, families.encode(model, inputs))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for _ in range(2):
        assert torch.equal(tokens(model, inputs, cache.encode(inputs)), expected)
    assert caplog.text.count("is full") == 1 and not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(UserError, match="no image fits"):
        cache.reserve(10, free=0)


def test_disk_space_is_logged_and_checked_beforehand(tmp_path, caplog):
    model, inputs = build("llava"), prompts("llava")
    cache = FeatureCache(tmp_path, model, "a")
    cache.encode(inputs)
    size = next(tmp_path.rglob("*.safetensors")).stat().st_size
    with caplog.at_level("INFO", logger="evocomp"):
        cache.reserve(1000, free=999 * size)
    assert "for 1000 images" in caplog.text
    with pytest.raises(UserError, match="choose a folder on a larger disk"):
        cache.reserve(1000, free=999 * size - 1)


def test_several_layers_of_a_tower_are_refused(tmp_path):
    several = copy.deepcopy(build("llava"))
    several.config.vision_feature_layer = [-2, -1]
    with pytest.raises(UserError, match="several layers of its vision tower"):
        FeatureCache(tmp_path, several, "a")


def _encode_all(folder, family: str, order: int) -> None:
    torch.set_num_threads(1)
    model, inputs = build(family), prompts(family)
    cache = FeatureCache(folder, model, "a")
    for shift in list(range(12))[::order]:
        cache.encode({**inputs, "pixel_values": inputs["pixel_values"] + shift})


def test_several_processes_may_write_at_once(tmp_path):
    processes = [
        multiprocessing.get_context("fork").Process(target=_encode_all, args=(tmp_path / "both", "llava", order))
        for order in (1, -1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    _encode_all(tmp_path / "one", "llava", 1)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()} for name in ("both", "one")]
    assert files[0] == files[1] and len(files[0]) == 12


def test_the_mllm_uses_the_cache(nano, questions, tmp_path):
    with_cache, again, without = (FrozenMLLM(nano.model, nano.processor) for _ in range(3))
    for mllm in (with_cache, again):
        mllm.cache = FeatureCache(tmp_path, nano.model, nano.fingerprint())
    expected = without.features(questions[:6])
    for mllm in (with_cache, again):
        for one, other in zip(mllm.features(questions[:6]), expected, strict=True):
            assert torch.equal(one.visual, other.visual)
    assert len(list(tmp_path.rglob("*.safetensors"))) == len({example.image_id for example in questions[:6]})
