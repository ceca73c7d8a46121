"""The cost estimate against independent numbers: published figures, transformers, and torch's FLOP counter."""

import re

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaNextConfig, Qwen2_5_VLConfig

from evocomp import cli
from evocomp.config.load import load
from evocomp.labels import estimate
from evocomp.labels.estimate import GPUS, KNOWN, Target, Workload, by_arithmetic, by_timing, candidate_forwards
from evocomp.labels.records import encode
from evocomp.mllm.hf import ASSETS
from tests.mllm.answer_logits import answer_logits

LLAVA, QWEN = "llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2.5-VL-7B-Instruct"


@pytest.mark.parametrize(
    ("name", "length", "answer", "seconds"),
    # 528 forwards with answer logits at 800 TFLOP/s, computed independently: 2.02 s and 2.51 s
    [(LLAVA, 35 + 150 + 50, 5, 2.02), (QWEN, 30 + 200 + 60, 8, 2.51)],
)
def test_the_cost_of_a_sample_equals_a_calculation_by_hand(name, length, answer, seconds):
    target = Target.from_config(KNOWN[name])
    assert 528 * target.forward(length, answer) / 800e12 == pytest.approx(seconds, abs=0.006)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (LLAVA, LlavaConfig),
        ("llava-hf/llava-v1.6-mistral-7b-hf", LlavaNextConfig),
        (QWEN, Qwen2_5_VLConfig),
    ],
)
def test_decoder_weights_are_those_of_transformers(name, kind):
    known = KNOWN[name]
    config = kind(text_config=dict(known["text_config"]))
    with torch.device("meta"):
        decoder = AutoModelForImageTextToText.from_config(config).get_decoder()
    weights = sum(p.numel() for key, p in decoder.layers.named_parameters() if p.ndim == 2)
    assert Target.from_config(known).body == weights


def test_flops_equal_torchs_flop_counter(nano, encoded):
    target, sample = Target.named("nano", ASSETS), encoded[0]
    index = torch.arange(20)[None]
    with FlopCounterMode(display=False) as counter:
        answer_logits(nano, sample, sample.visual[index], index)
    counted = counter.get_flop_counts()["Global"]
    products = sum(value for op, value in counted.items() if "mm" in str(op))
    length, answer = len(sample.text_at) + 20 + len(sample.answer_ids) - 1, len(sample.answer_ids)
    attention = 2 * length**2 * target.heads * target.head_dim * target.layers
    assert products == target.forward(length, answer) - attention


@pytest.fixture(scope="module")
def run(tmp_path_factory, nano):
    """A small complete label store: (config, labeller, records)."""
    from evocomp.data.splits import load_splits
    from evocomp.labels.build import build_labeller

    sizes = ["recipe=published", "data.max_samples=5", "data.val_samples=0", "data.test_samples=0"]
    search = ["search.population=8", "search.parents=4", "search.generations=2", "labels.chunk_size=2"]
    config = load(settings=[*sizes, *search])
    labeller = build_labeller(config, nano, load_splits(config.data), tmp_path_factory.mktemp("run"))
    return config, labeller, labeller.ensure(0)


def test_forward_passes_and_disk_space_are_upper_bounds_of_a_run(run):
    config, labeller, records = run
    saved = sum(int(record["saved"]) for record in records.values())
    assert len(records) * candidate_forwards(config) == labeller.scorer.forwards + saved
    assert labeller.store.size() < len(records) * estimate.record_bytes(config, 144) + 20_000
    groups = sum(record["population"].nbytes for record in records.values())
    assert groups < len(records) * estimate.record_bytes(config, 144)


def test_credits_are_counted_as_they_are_made():
    """Credits from search masks count the masks of a subset of the questions; refreshes draw from all questions."""
    credit = ["labels.credit_masks_from=search", "labels.credit_samples=100", "labels.samples_per_refresh=300"]
    config, target = load(settings=[*credit, "compressor.sharp=0"]), Target.named("nano", ASSETS)
    assert candidate_forwards(config) == 1 + 48 * 11 and candidate_forwards(config, 1) == 16
    work = estimate.assumed_workload(config, target, 1000, 20, 2)
    assert (work.samples, work.forwards, work.pool) == (100, 529, 1000)
    once = by_arithmetic(config, target, work, GPUS["h100"])
    assert once.refresh / once.seconds == pytest.approx(300 * 16 / (100 * 529))
    masks = {"draws": np.zeros((16, 32), np.uint16), "advantages": np.zeros(16, np.float32)}
    record = {**masks, "log_prob": np.zeros(16, np.float32), "spread": np.float32(0)}
    nothing = {name: value[:0] for name, value in record.items() if value.ndim} | {"spread": np.float32(0)}
    nothing["draws"] = np.zeros((0, 0), np.uint16)
    kept = encode([{"id": i, **(record if i < 300 else nothing)} for i in range(1000)])
    assert 0.8 * once.disk < len(kept) < once.disk


def test_timed_samples_give_lengths_and_hours(run):
    config, labeller, records = run
    result = by_timing(config, Target.named("nano", ASSETS), labeller, 1000, GPUS["l4"], count=2)
    first = labeller.encode(list(records)[:3])
    assert result.work.text == round(sum(len(one.text_at) for one in first) / 3)
    assert result.work.forwards == 1 + 8 * 3 and result.timed == 2 and result.seconds > 0
    assert "2 samples timed here" in result.report()


def test_credits_are_timed_by_image(nano, tmp_path):
    """All questions about an image share its masks, so that a single question would cost as much as all of them."""
    from evocomp.data.splits import load_splits
    from evocomp.labels.build import build_rounds

    credit = ["labels.target=credit", "labels.refresh=none", "loss.name=listwise", "labels.credit_masks=4"]
    config = load(settings=[*credit, "data.max_samples=40", "data.val_samples=0", "data.test_samples=0"])
    splits = load_splits(config.data)
    labeller, made = build_rounds(config, nano, splits, None), []
    make = labeller.rounds.make
    labeller.rounds.make = lambda round, ids, *rest: made.append(list(ids)) or make(round, ids, *rest)
    result = by_timing(config, Target.named("nano", ASSETS), labeller, 1000, GPUS["l4"], count=2)
    pictures = [{labeller.examples[id].image_id for id in ids} for ids in made]
    assert len(made) == 3 and all(len(one) == 1 for one in pictures) and len(set.union(*pictures)) == 3
    assert result.timed == len(made[1]) + len(made[2]) > 2


def test_hours_price_and_refresh_follow(run):
    config, _, _ = run
    target, gpu = Target.from_config(KNOWN[LLAVA]), GPUS["h100"]
    once = by_arithmetic(config, target, Workload(100, candidate_forwards(config), 85, 150, 5), gpu)
    twice = by_arithmetic(config, target, Workload(200, candidate_forwards(config), 85, 150, 5), gpu)
    assert twice.seconds == pytest.approx(2 * once.seconds)
    assert once.seconds * gpu.peak * estimate.EFFICIENCY == pytest.approx(once.flops)
    assert once.refresh / once.seconds == pytest.approx(8 / 25)


@pytest.mark.parametrize("name", ["llava15_7b", "llava15_7b_published", "llava_next_7b", "qwen25_vl_7b"])
def test_comments_in_the_7b_recipes_equal_the_estimate(name, capsys):
    from pathlib import Path

    path = Path(__file__).resolve().parent.parent.parent / "experiments" / f"{name}.yaml"
    assert cli.main(["label", "--config", str(path), "--estimate", "--gpu", "h100", "--gpus=8"]) == 0
    said = capsys.readouterr().out
    hours = float(re.search(r"GPU-hours +([\d.]+)", said)[1])
    refresh = float(re.search(r"per refresh +([\d.]+)", said)[1])
    disk = re.search(r"disk +at most (.*)", said)[1]
    head = path.read_text().partition("recipe:")[0]
    assert f"labels {hours:.0f} GPU-hours" in head
    assert f"refresh {refresh:.1f} GPU-hours" in head and disk in head


def test_a_cpu_configuration_is_timed_on_this_machine(capsys):
    """nano runs on a CPU: the estimate has no GPU price and counts all 144 visual tokens."""
    few = ["--data.max_samples=60", "--labels.credit_samples=60", "--labels.dtype=model"]
    assert cli.main(["label", "--config", "nano", "--estimate", *few]) == 0
    said = capsys.readouterr().out
    assert re.search(r"samples on this CPU \(\d+ samples timed here\)", said)
    assert re.search(r"text \+ 12 of 144 visual \+ 1 answer tokens", said)
    assert re.search(r"time +\d+ s \([\d.]+ labels/s\)", said) and "USD" not in said and "GPU" not in said
    assert cli.main(["label", "--config", "nano", "--estimate", "--gpu", "h100", *few]) == 0
    said = capsys.readouterr().out
    assert "of 144 visual" in said and "on H100 (calculated" in said


def test_a_refresh_is_timed_by_masks_of_each_question(nano, monkeypatch):
    """Unlike in round 0, the questions about an image do not share on-policy masks."""
    from evocomp.data.splits import load_splits
    from evocomp.labels.build import build_rounds

    few = ["data.max_samples=40", "data.val_samples=0", "data.test_samples=0", "labels.samples_per_refresh=300"]
    config = load(settings=[*few, "labels.credit_masks=4", "labels.proposals=5"])
    labeller, clock, shapes = build_rounds(config, nano, load_splits(config.data), None), [0.0], set()
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: clock[0])

    def each(features, masks, context):
        clock[0] += 2.0 * len(features)
        shapes.add((masks.shape[1], masks.shape[2] + context))

    monkeypatch.setattr(labeller.scorer, "each", each)
    result = by_timing(config, Target.named("nano", ASSETS), labeller, 1000, GPUS["l4"], count=2)
    assert result.refresh == pytest.approx(300 * 2.0) and shapes == {(5, size) for size in (4, 8, 16, 32)}
