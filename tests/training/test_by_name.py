"""Callbacks and loggers by import path: what a configuration may name, and a run with some of them."""

import csv
import sys
from types import ModuleType

import lightning as L
import pytest
import yaml
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.loggers import CSVLogger, Logger

from evocomp.cli import main
from evocomp.log import UserError
from evocomp.training.build import check_trainer
from evocomp.training.by_name import create

SMALL = {
    "recipe": "published",
    "threads": 1,
    "labels": {"dtype": "model", "refresh": "none", "passes": 1},
    "data": {"max_samples": 8, "val_samples": 6, "test_samples": 0},
    "search": {"population": 6, "parents": 3, "generations": 1},
    "optim": {"batch_size": 4, "muon_dtype": "bfloat16"},
    "eval": {"kept": [16, 4], "max_new_tokens": 1},
}


class Recorder(Logger):
    """A logger of the user's own, by Lightning's interface alone."""

    made: "list[Recorder]" = []

    def __init__(self, project: str):
        super().__init__()
        self.project, self.metrics, self.settings, self.status = project, {}, {}, ""
        Recorder.made.append(self)

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append((step, float(value)))

    def log_hyperparams(self, params, *args, **kwargs):
        self.settings = dict(params)

    def finalize(self, status):
        self.status = status


class Epochs(L.Callback):
    ended: list[int] = []

    def on_train_epoch_end(self, trainer, module):
        Epochs.ended.append(trainer.current_epoch)


def test_a_run_with_two_loggers_and_early_stopping(tmp_path):
    folder = tmp_path / "run"
    trainer = {
        "max_epochs": 9,
        "accelerator": "cpu",
        "callbacks": [
            {"class_path": f"{__name__}.Epochs"},
            # no accuracy is above 1.5, so the run ends after the second epoch without an improvement
            {
                "class_path": "lightning.pytorch.callbacks.EarlyStopping",
                "init_args": {"monitor": "accuracy/mean", "mode": "max", "min_delta": 1.5, "patience": 2},
            },
        ],
        "logger": [
            {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "csv", "version": ""}},
            {"class_path": f"{__name__}.Recorder", "init_args": {"project": "mine"}},
        ],
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "run_dir": str(folder), "trainer": trainer}))
    Epochs.ended.clear()
    Recorder.made.clear()
    command = ["train", "--config", str(path)]
    assert main(command) == 0
    assert Epochs.ended == [0, 1, 2]
    with open(folder / "csv" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("accuracy/mean")]
    (recorder,) = Recorder.made
    own = [value for _, value in recorder.metrics["accuracy/mean"]]
    assert [float(row["accuracy/mean"]) for row in rows] == pytest.approx(own) and len(own) == 3
    assert {"train/loss", "labels/round", "time/training_seconds"} <= recorder.metrics.keys()
    assert recorder.settings["optim"]["batch_size"] == 4 and recorder.status == "success"
    assert list((folder / "tensorboard").rglob("events.out.*")), "the run's own logger is gone"
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"] == trainer
    assert main(command) == 0 and len(Epochs.ended) == 3, "a finished run trains again"


def test_names_of_lightning_need_no_path_and_one_entry_no_list(tmp_path):
    (logger,) = create("logger", {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path)}})
    assert type(logger) is CSVLogger
    stopping, timer = create(
        "callbacks",
        [
            {"class_path": "EarlyStopping", "init_args": {"monitor": "train/loss"}},
            {"class_path": "lightning.pytorch.callbacks.Timer"},
        ],
    )
    assert type(stopping) is EarlyStopping and stopping.monitor == "train/loss" and type(timer) is Timer


@pytest.mark.parametrize(
    ("key", "entry", "match"),
    [
        ("callbacks", 3, "trainer.callbacks: 3 is no {class_path"),
        ("callbacks", {"path": "x"}, "is no {class_path: lightning.pytorch.callbacks.NAME"),
        ("callbacks", {"class_path": "EarlyStoping"}, "class_path=EarlyStoping cannot be imported"),
        ("callbacks", {"class_path": "no.such.module.Name"}, "cannot be imported: No module named 'no'"),
        ("callbacks", {"class_path": "Timer.", "init_args": {}}, "class_path=Timer. cannot be imported"),
        ("callbacks", {"class_path": "CSVLogger"}, "class_path=CSVLogger cannot be imported"),
        ("callbacks", {"class_path": "lightning.pytorch.loggers.CSVLogger"}, "is no Callback of Lightning"),
        ("callbacks", {"class_path": "os.system", "init_args": {"command": "true"}}, "os.system is no Callback"),
        ("logger", {"class_path": "lightning.Trainer"}, "is no Logger of Lightning"),
        ("callbacks", {"class_path": "Timer", "args": {}}, "unknown key args"),
        ("callbacks", {"class_path": "Timer", "init_args": [3]}, "init_args of Timer must be names with values"),
    ],
    ids=str,
)
def test_entries_are_checked_before_anything_is_done(key, entry, match):
    for entries in (entry, [{"class_path": "Timer"}, entry] if key == "callbacks" else [entry]):
        with pytest.raises(UserError, match=match):
            check_trainer({key: entries})


def test_arguments_that_a_class_refuses_are_named():
    with pytest.raises(UserError, match="trainer.callbacks: EarlyStopping: .*patients"):
        create("callbacks", {"class_path": "EarlyStopping", "init_args": {"monitor": "x", "patients": 3}})
    with pytest.raises(UserError, match="trainer.callbacks: EarlyStopping: .*mode"):
        create("callbacks", {"class_path": "EarlyStopping", "init_args": {"monitor": "x", "mode": "up"}})


@pytest.mark.parametrize("name", ["WandbLogger", "MLFlowLogger"])
def test_a_logger_whose_package_is_missing_is_told(name, monkeypatch):
    for module in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", False)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    with pytest.raises(UserError, match=f"trainer.logger: {name} needs a package that is not installed"):
        create("logger", {"class_path": name})


class FakeWandbRun:
    """The few calls that Lightning makes of a run of Weights & Biases."""

    def __init__(self):
        self.rows, self.config, self.name, self.id = [], self, "run", "1"

    def update(self, settings, allow_val_change=False):
        self.settings = settings

    def log(self, row):
        self.rows.append(row)

    def define_metric(self, *args, **kwargs):
        pass


def test_curves_reach_weights_and_biases(tmp_path, monkeypatch):
    run, wandb = FakeWandbRun(), ModuleType("wandb")
    wandb.run, wandb.init = None, lambda **settings: run
    disabled, sdk = ModuleType("wandb.sdk.lib"), ModuleType("wandb.wandb_run")
    disabled.RunDisabled, sdk.Run = type("RunDisabled", (), {}), FakeWandbRun
    for name, module in {
        "wandb": wandb,
        "wandb.sdk": ModuleType("wandb.sdk"),
        "wandb.sdk.lib": disabled,
        "wandb.wandb_run": sdk,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    path = tmp_path / "own.yaml"
    trainer = {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1}
    settings = {**SMALL, "run_dir": str(tmp_path / "run"), "logger": "wandb", "trainer": trainer}
    path.write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(path)]) == 0
    logged = {name for row in run.rows for name in row}
    assert {"train/loss", "accuracy/mean", "labels/round"} <= logged
    assert run.settings["optim"]["batch_size"] == 4 or run.settings["optim/batch_size"] == 4
