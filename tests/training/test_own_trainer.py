"""The module and the callback in a user's own Trainer, with other callbacks, loggers and datamodules."""

import csv
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from evocomp.compressor.lora import add_lora
from evocomp.compressor.model import EvoCompCompressor
from evocomp.config.schema import LabelConfig, LossConfig, OptimConfig
from evocomp.labels.build import labeller_for
from evocomp.log import UserError
from evocomp.training.batch import TrainBatch, compressor_input, question_ids
from evocomp.training.module import CompressorModule
from evocomp.training.refresh_labels import RefreshLabels

CONTRIBUTING = Path(__file__).resolve().parent.parent.parent / "CONTRIBUTING.md"
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def labels(**options) -> LabelConfig:
    common = {"credit_masks": 4, "refresh_start": 1, "proposals": 4, "probes": 0, "flat": 0.0, "dtype": "model"}
    return LabelConfig(**{**common, "samples_per_refresh": 8, **options})


def new_module(nano, **options) -> CompressorModule:
    torch.manual_seed(0)
    compressor = EvoCompCompressor.from_mllm(nano.model, budget_input=True, sharp=0.25)
    return CompressorModule(compressor, LossConfig(), OptimConfig(warmup_steps=2), **options)


class Questions(L.LightningDataModule):
    """A datamodule of the user's own: dictionaries with an id and other things that only the user knows."""

    def __init__(self, examples):
        super().__init__()
        self.examples = examples

    def train_dataloader(self) -> DataLoader:
        rows = [{"id": one.id, "question": one.prompt} for one in self.examples]
        return DataLoader(rows, batch_size=4, shuffle=True)


class Seen(L.Callback):
    """What a callback beside `RefreshLabels` gets to see."""

    def __init__(self):
        self.batches: list[list[int]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches.append(question_ids(batch))
        self.losses.append(float(outputs["loss"]))


def test_the_script_of_contributing_runs(tmp_path, monkeypatch):
    text = CONTRIBUTING.read_text().split("## Use it in your own Trainer")[1]
    script = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    statements = [line for line in script.split("\n\n")[2].splitlines() if line and not line.startswith((" ", ")"))]
    assert len(statements) <= 15
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(script, found)
    epochs = found["trainer"].current_epoch
    with open("runs/own/lightning_logs/version_0/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    measured = [float(row["accuracy/mean"]) for row in rows if row.get("accuracy/mean")]
    assert len(measured) == epochs and max(measured) == pytest.approx(float(found["stopping"].best_score))
    rounds = {row["labels/round"] for row in rows if row.get("labels/round")}
    assert {float(round) for round in rounds} == {float(round) for round in range(epochs)}
    assert list(Path("runs/own/lightning_logs").rglob("events.out.*")), "the second logger wrote nothing"
    saved = EvoCompCompressor.from_pretrained("runs/own/compressor")
    for name, value in found["best"].compressor.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value), name


def test_a_datamodule_of_ones_own_trains_on_every_round(nano, questions, tmp_path):
    examples, seen = questions[:12], Seen()
    module, settings = new_module(nano), labels()
    labeller = labeller_for(nano, examples, tmp_path, module.compressor.config, settings)
    refresh = RefreshLabels(labeller, settings)
    trainer = L.Trainer(max_epochs=3, callbacks=[seen, refresh], logger=False, enable_checkpointing=False, **QUIET)
    before = [p.detach().clone() for p in module.parameters()]
    trainer.fit(module, Questions(examples))
    assert len(seen.batches) == 9 and {id for ids in seen.batches for id in ids} == {one.id for one in examples}
    assert refresh.round == 2 and 0 < len(refresh.records) <= 8
    assert all(torch.isfinite(torch.tensor(seen.losses)))
    assert any(not torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    assert module.batch_of is None, "the module still holds the frozen MLLM"


def test_a_batch_is_its_labelled_questions(nano, questions, tmp_path):
    examples = questions[:6]
    module, settings = new_module(nano), labels(credit_samples=4, refresh="none")
    labeller = labeller_for(nano, examples, tmp_path, module.compressor.config, settings)
    refresh = RefreshLabels(labeller, settings)
    trainer = L.Trainer(logger=False, enable_checkpointing=False, **QUIET)
    batch = refresh._batch(trainer, module, [one.id for one in examples])
    assert batch.ids == [one.id for one in examples[:4]] and batch.round == 0
    records = labeller.store.read(0)
    for row, id in enumerate(batch.ids):
        expected = torch.from_numpy(records[id]["credits"].astype("float32"))
        assert torch.equal(batch.targets[row], expected)
    assert refresh._batch(trainer, module, [examples[5].id]) is None
    with pytest.raises(UserError, match="question 3 of a batch is not among those"):
        refresh._batch(trainer, module, [3])


def test_a_batch_without_any_label_changes_no_weight(nano):
    module = new_module(nano)
    module.batch_of = lambda ids: None
    loss = module.training_step(torch.tensor([1, 2]), 0)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_a_run_that_begins_anew_takes_no_round_of_an_earlier_compressor(nano, questions, tmp_path):
    examples, settings = questions[:8], labels()

    def train(seed: int, checkpoint: str | None = None, epochs: int = 2) -> bytes:
        module = new_module(nano)
        torch.manual_seed(seed)
        with torch.no_grad():
            module.compressor.score.weight.normal_()
        labeller = labeller_for(nano, examples, tmp_path, module.compressor.config, settings)
        trainer = L.Trainer(
            max_epochs=epochs,
            callbacks=[RefreshLabels(labeller, settings), ModelCheckpoint(tmp_path / "checkpoints", save_last=True)],
            logger=False,
            **QUIET,
        )
        trainer.fit(module, DataLoader(examples, batch_size=4, collate_fn=question_ids), ckpt_path=checkpoint)
        return (tmp_path / "labels" / "round-0001" / "chunk-000000.safetensors").read_bytes()

    first = train(1)
    assert train(2) != first
    assert train(1) == first
    assert train(1, str(tmp_path / "checkpoints" / "last.ckpt"), epochs=3) == first, "a resumed run keeps its rounds"


@pytest.mark.parametrize(
    "batch",
    [
        torch.tensor([5, 7]),
        [5, 7],
        (5, 7),
        {"id": torch.tensor([5, 7]), "question": ["a", "b"]},
        {"id": [5, 7]},
    ],
    ids=["tensor", "list", "tuple", "dictionary of a tensor", "dictionary of a list"],
)
def test_what_names_questions(batch):
    assert question_ids(batch) == [5, 7]


@pytest.mark.parametrize("batch", [torch.rand(2), {"question": ["a"]}, ["a", "b"], "ab", None, {"id": torch.rand(2)}])
def test_what_names_no_questions_is_told(batch):
    with pytest.raises(UserError, match="cannot tell the questions of a batch of type"):
        question_ids(batch)


def test_batches_of_ids_need_the_callback(nano):
    with pytest.raises(UserError, match="add RefreshLabels to the Trainer's callbacks"):
        new_module(nano).training_step(torch.tensor([1]), 0)


# -------------------------------------------------------------------- checkpoints and hyperparameters


def saved(module: CompressorModule, path: Path) -> Path:
    trainer = L.Trainer(logger=False, enable_checkpointing=False, **QUIET)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)
    return path


@pytest.mark.parametrize("kind", ["whole", "narrow", "adapter"])
def test_load_from_checkpoint_needs_the_path_alone(nano, encoded, tmp_path, kind):
    torch.manual_seed(3)
    options = {"layer": 1} if kind == "adapter" else {"width": 32} if kind == "narrow" else {}
    compressor = EvoCompCompressor.from_mllm(nano.model, budget_input=True, dither=0.5, **options).float()
    if kind == "adapter":
        compressor = add_lora(compressor, 4, 8)
    optim = OptimConfig(name="adamw", lr=3e-4, refresh_lr=1e-4)
    module = CompressorModule(compressor, LossConfig(name="ghm_cs", bins=7), optim, refresh_start=2)
    path = saved(module, tmp_path / "one.ckpt")
    assert torch.load(path, weights_only=True)["hyper_parameters"].keys() >= {"compressor", "loss", "optim"}
    again = CompressorModule.load_from_checkpoint(path, weights_only=True)
    assert (again.loss_config, again.optim_config) == (module.loss_config, module.optim_config)
    assert again.refresh_start == 2 and again.supervised.term.bins == 7
    assert again.compressor.config.to_dict() == module.compressor.config.to_dict()
    trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    assert trainable == [name for name, p in again.named_parameters() if p.requires_grad]
    inputs = compressor_input(nano, encoded[:3])
    for ours, theirs in zip(module.score(inputs), again.score(inputs), strict=True):
        assert (ours == theirs).all()


def test_settings_may_be_dictionaries_and_a_tuned_rate_is_saved(nano, tmp_path):
    config = EvoCompCompressor.from_mllm(nano.model).config
    module = CompressorModule(config.to_dict(), {"name": "bce"}, {"lr": 1e-3})
    assert (module.loss_config, module.optim_config) == (LossConfig(name="bce"), OptimConfig(lr=1e-3))
    module.lr = 5e-4
    assert module.lr == module.optim_config.lr == 5e-4
    again = CompressorModule.load_from_checkpoint(saved(module, tmp_path / "one.ckpt"), optim={"lr": 2e-3})
    assert again.lr == 2e-3, "an argument wins over the checkpoint"
    assert CompressorModule.load_from_checkpoint(tmp_path / "one.ckpt").lr == 5e-4
    with pytest.raises(UserError, match="optim.lr=-1"):
        CompressorModule(config, optim={"lr": -1.0})


def test_the_tuner_finds_a_rate_and_leaves_the_weights(nano, questions, tmp_path):
    examples, settings = questions[:12], labels()
    module = new_module(nano)
    labeller = labeller_for(nano, examples, tmp_path, module.compressor.config, settings)
    callbacks = [RefreshLabels(labeller, settings), EarlyStopping("train/loss")]
    trainer = L.Trainer(
        max_epochs=2, callbacks=callbacks, logger=False, default_root_dir=tmp_path, enable_checkpointing=False, **QUIET
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    loader = DataLoader(examples, batch_size=1, collate_fn=question_ids)
    found = Tuner(trainer).lr_find(module, loader, min_lr=1e-5, max_lr=1e-1, num_training=20)
    assert len(set(found.results["loss"])) > 5, "the rate had no effect"
    assert module.lr == found.suggestion() != OptimConfig().lr
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    trainer.fit(module, loader)
    assert trainer.current_epoch == 2 and trainer.optimizers[0].param_groups[0]["initial_lr"] == module.lr


def test_train_batches_move_as_one(nano, questions, encoded):
    inputs = compressor_input(nano, encoded[:2])
    batch = TrainBatch([1, 2], 0, inputs, torch.zeros(2, 144)).to(torch.device("meta"))
    assert batch.inputs.visual.device.type == batch.targets.device.type == "meta" and batch.ids == [1, 2]
