"""The main job end to end on a few questions: its outputs, and resuming."""

import json
import shutil

import lightning as L
import numpy as np
import pytest
import torch

from evocomp.cli import main
from evocomp.compressor.model import EvoCompCompressor
from evocomp.config.load import load
from evocomp.data.conversations import write_scenes
from evocomp.data.splits import load_splits
from evocomp.inference.selectors import load_compressor
from evocomp.labels.build import build_labeller
from evocomp.labels.store import LabelStore
from evocomp.mllm.hf import FrozenMLLM
from evocomp.training.build import build_compressor
from evocomp.training.datamodule import LabelledQuestions
from evocomp.training.module import CompressorModule
from evocomp.training.refresh_labels import RefreshLabels

QUICK = [
    "recipe=published",
    # explicit, so that compared runs do not depend on a measurement
    "labels.dtype=model",
    "optim.muon_dtype=bfloat16",
    "data.max_samples=24",
    "data.val_samples=10",
    "data.test_samples=30",
    "search.generations=1",
    "search.population=8",
    "search.parents=3",
    "labels.chunk_size=8",
    "labels.passes=2",
    "optim.batch_size=4",
    "eval.kept=[16,4]",
    "eval.seeds=1",
    "eval.resamples=50",
    "eval.max_new_tokens=1",
    "eval.sheet=2",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "threads=1",
]
PLUS = [
    "recipe=plus",
    "labels.target=credit",
    "labels.credit_samples=12",
    "labels.credit_masks=8",
    "labels.refresh=on_policy",
    "labels.refresh_start=1",
    "labels.samples_per_refresh=20",
    "labels.proposals=4",
    "labels.flat=0.0",
    "labels.samples_per_epoch=24",
    "loss.name=listwise",
    "compressor.budget_input=true",
    "optim.ema=0.9",
]


def train(folder, *settings: str) -> None:
    assert main(["train", *(f"--{word}" for word in [*QUICK, *settings, f"run_dir={folder}"])]) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("main") / "run"
    train(folder)
    return folder


def test_everything_is_there(finished):
    names = ("config.yaml", "compressor/model.safetensors", "labels/meta.json", "report.md", "report.html", "kept.png")
    for name in names:
        assert (finished / name).stat().st_size > 0, name
    assert list((finished / "tensorboard" / "compressor").glob("events.*"))
    text = (finished / "compressor" / "README.md").read_text()
    assert "wrong_image" in text and "24 questions of scenes" in text and "generations_per_refresh" in text
    rows = json.loads((finished / "report.json").read_text())
    assert {"method", "kept", "accuracy", "low", "high", "n", "relative"} <= set(rows[0])
    methods = {row["method"] for row in rows}
    wanted = {"full", "no_image", "wrong_image", "random", "uniform_stride", "average_pool", "downsampling", "evocomp"}
    assert wanted <= methods
    assert {row["kept"] for row in rows if row["method"] == "evocomp"} == {16, 4}
    assert all(row["n"] == 30 for row in rows)


def test_a_finished_run_is_shown_not_repeated(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    train(finished)
    assert "EvoComp" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


def test_other_settings_are_refused_in_the_same_folder(finished, capsys):
    words = [f"--{word}" for word in [*QUICK, "loss.alpha=0.7", f"run_dir={finished}"]]
    assert main(["train", *words]) == 2
    assert "loss.alpha=0.1, requested 0.7" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_labels_and_weights(finished, tmp_path):
    train(tmp_path / "again")
    for round in (0, 1):
        stores = [LabelStore(folder / "labels") for folder in (finished, tmp_path / "again")]
        assert stores[0].digest(round) == stores[1].digest(round)
    one, other = (EvoCompCompressor.from_pretrained(f / "compressor") for f in (finished, tmp_path / "again"))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpoints_hold_the_compressor_only(finished):
    state = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=False)
    assert state["state_dict"] and all(key.startswith("compressor.") for key in state["state_dict"])


def test_labels_never_get_worse_and_beat_the_uncompressed_loss(finished):
    store = LabelStore(finished / "labels")
    first, second = store.read(0), store.read(1)
    for id, record in first.items():
        assert record["best_loss"] <= record["first_best"] and second[id]["best_loss"] <= record["best_loss"]
        kept, groups = record["kept"].astype(int), record["groups"]
        assert sorted(groups[kept]) == list(range(groups.max() + 1)), "one token of every group"
    assert np.mean([r["best_loss"] for r in second.values()]) < np.mean([r["first_mean"] for r in first.values()])


def test_our_own_recipe_runs_and_costs_are_told_apart(tmp_path):
    train(tmp_path / "plus", *PLUS)
    cost = json.loads((tmp_path / "plus" / "trained.json").read_text())["cost"]
    assert cost["labelling"]["forwards"] == 12 * 2 * 8  # questions x sizes x masks
    assert cost["labelling"]["packed"] < cost["labelling"]["forwards"], "shared over the questions about an image"
    assert cost["refresh"]["forwards"] == 20 * 4 and cost["training"]["flops"] > 0
    records = LabelStore(tmp_path / "plus" / "labels").read(1)
    assert len(records) == 24 and sum(record["draws"].size > 0 for record in records.values()) <= 20


def test_an_adapter_is_trained_alone_and_saved_folded_in_and_apart(tmp_path, nano):
    adapter = ["compressor.init=layer", "compressor.lora.r=2", "compressor.lora.alpha=4"]
    train(tmp_path / "run", *PLUS, *adapter)
    folded = EvoCompCompressor.from_pretrained(tmp_path / "run" / "compressor").eval()
    apart = load_compressor(tmp_path / "run" / "adapter", nano.model)
    assert apart.peft_config["default"].r == 2 and apart.peft_config["default"].lora_alpha == 4
    visual, text = torch.randn(1, 7, folded.config.hidden_size), torch.randn(1, 3, folded.config.hidden_size)
    with torch.no_grad():
        scores = [one(visual, text, budget=16.0).logits for one in (apart, folded)]
    torch.testing.assert_close(*scores)
    whole = nano.decoder.layers[0].self_attn.q_proj.weight
    change = folded.encoder.layers[0].self_attn.q_proj.weight - whole
    assert 1 <= torch.linalg.matrix_rank(change, atol=1e-6) <= 2


def test_an_adapter_needs_a_layer_of_the_llm_and_is_not_sharded(tmp_path, capsys):
    words = [f"--{word}" for word in [*QUICK, *PLUS, f"run_dir={tmp_path / 'run'}", "compressor.lora.r=2"]]
    assert main(["train", *words]) == 2
    sharded = ["--trainer.strategy=fsdp2", "--optim.ema=0", "--optim.name=adamw"]
    assert main(["train", *words, "--compressor.init=layer", *sharded]) == 2
    said = capsys.readouterr().err
    assert "set compressor.init=layer" in said and "set trainer.strategy=ddp, or compressor.lora.r=0" in said
    assert not (tmp_path / "run").exists()


def test_a_run_without_test_questions_is_trained_and_not_judged(tmp_path, capsys):
    train(tmp_path / "run", "data.test_samples=0", "labels.refresh=none", "trainer.max_epochs=1")
    assert "so it is not evaluated" in capsys.readouterr().err
    assert (tmp_path / "run" / "compressor").is_dir() and not (tmp_path / "run" / "report.json").exists()
    assert main(["eval", "--run", str(tmp_path / "run")]) == 2
    assert "give --questions N and --out DIR" in capsys.readouterr().err


def test_it_runs_from_a_folder_of_conversations(tmp_path):
    write_scenes(tmp_path / "scenes", seed=3, count=12)
    settings = [f"data.source={tmp_path / 'scenes'}", "labels.refresh=none", "trainer.max_epochs=1"]
    train(tmp_path / "run", *settings)
    rows = json.loads((tmp_path / "run" / "report.json").read_text())
    assert next(row for row in rows if row["method"] == "full")["accuracy"] > 0.8


# ---------------------------------------------------------------- resuming


class Seen(L.Callback):
    """Records ids and rounds of each batch; optionally saves and stops within an epoch."""

    def __init__(self, stop_after: int | None = None, path=None):
        self.batches: list[tuple[list[int], int]] = []
        self.stop_after = stop_after
        self.path = path

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.batches.append((batch.ids, batch.round))
        if self.stop_after and len(self.batches) == self.stop_after:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True
            trainer.limit_train_batches = 0
            raise KeyboardInterrupt


def fit(folder, seen: Seen, checkpoint=None, workers: int = 0) -> None:
    config = load([], [*QUICK, f"run_dir={folder}"])
    L.seed_everything(0, verbose=False)
    splits = load_splits(config.data)
    mllm = FrozenMLLM.load("nano")
    labeller = build_labeller(config, mllm, splits, folder)
    data = LabelledQuestions(mllm, splits.train, 4, 24, seed=0, workers=workers)
    module = CompressorModule(build_compressor(config, mllm), config.loss, config.optim)
    refresh = RefreshLabels(labeller, config.labels, data)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        callbacks=[refresh, seen],
    )
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    except (KeyboardInterrupt, SystemExit):
        pass


@pytest.mark.parametrize("stop_after", [2, 8])
def test_resuming_in_mid_epoch_sees_exactly_what_an_uninterrupted_run_sees(tmp_path, stop_after):
    whole = Seen()
    fit(tmp_path / "whole", whole)
    assert len(whole.batches) == 12
    assert [round for _, round in whole.batches] == [0] * 6 + [1] * 6, "each epoch must be trained on its own round"
    part = Seen(stop_after, tmp_path / "mid.ckpt")
    fit(tmp_path / "part", part)
    rest = Seen()
    fit(tmp_path / "part", rest, checkpoint=str(tmp_path / "mid.ckpt"))
    assert part.batches + rest.batches == whole.batches


def test_loader_workers_never_see_a_stale_label(tmp_path):
    seen = Seen()
    fit(tmp_path / "workers", seen, workers=2)
    assert [round for _, round in seen.batches] == [0] * 6 + [1] * 6


def test_own_data_with_broken_images_several_images_and_unknown_words(tmp_path, capsys):
    """In all three splits, through labels, a refresh, curves and the report."""
    write_scenes(tmp_path / "data", seed=8, count=16)
    path = tmp_path / "data" / "data.json"
    records = [record for number, record in enumerate(json.loads(path.read_text())) if number % 4 == 0]
    splits = load_splits(load([], [*QUICK, f"data.source={tmp_path / 'data'}", "data.max_samples=0"]).data)
    broken = {part[0].image_id for part in (splits.train, splits.val, splits.test)}
    whole = [name for name in sorted({example.image_id for example in splits.train}) if name not in broken]
    asked = {"from": "human", "value": "<image> or <image> has the zebra"}
    bad = {record["id"] for record in records if record["image"] in broken}
    records.insert(0, {"id": "two", "image": whole[:2], "conversations": [asked, {"from": "gpt", "value": "red"}]})
    path.write_text(json.dumps(records))
    for name in broken:
        (tmp_path / "data" / name).write_bytes(b"no image")
    settings = [f"--{word}" for word in [*QUICK, *PLUS, "data.max_bad=40", f"data.source={tmp_path / 'data'}"]]
    assert main(["train", *settings, f"--run_dir={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().err
    assert "nano does not know 3 words and replaces each by the unknown token: or has zebra" in said
    named = {line.split(":")[0].split()[-1] for line in said.splitlines() if line.startswith("left out record ")}
    assert named and named <= bad and said.count("left out record ") == len(named)
    rows = json.loads((tmp_path / "run" / "report.json").read_text())
    splits = load_splits(load([tmp_path / "run" / "config.yaml"]).data)
    usable = [example for example in splits.test if example.image_id not in broken]
    assert len(splits.train[0].images) == 2 and splits.train[0].id in LabelStore(tmp_path / "run" / "labels").read(0)
    assert {row["n"] for row in rows if row["n"]} == {len(usable)}
    settings[settings.index("--data.max_bad=40")] = "--data.max_bad=0"
    assert main(["label", *settings, f"--run_dir={tmp_path / 'other'}"]) == 2
    assert "more than data.max_bad=0" in capsys.readouterr().err


@pytest.mark.parametrize("rate", [".inf", "1e30"])
def test_a_training_that_diverges_is_no_finished_run(tmp_path, capsys, rate):
    settings = [f"--{word}" for word in [*QUICK, f"optim.lr={rate}", f"run_dir={tmp_path / 'run'}"]]
    assert main(["train", *settings]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "training has diverged in epoch 0" in line and "optim.lr" in line
    for name in ("compressor", "trained.json", "report.md", "checkpoints/last.ckpt"):
        assert not (tmp_path / "run" / name).exists(), name


def test_a_compressor_that_is_no_numbers_is_not_judged(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    weights = EvoCompCompressor.from_pretrained(tmp_path / "run" / "compressor")
    with torch.no_grad():
        next(weights.parameters()).view(-1)[0] = torch.nan
    weights.save_pretrained(tmp_path / "run" / "compressor")
    (tmp_path / "run" / "report.md").unlink()
    assert main(["eval", "--run", str(tmp_path / "run")]) == 2
    assert "has weights that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.md").exists()
