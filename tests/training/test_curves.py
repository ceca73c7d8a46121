"""Curves, read from the files of small real runs with each kind of label and of logger."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata

from evocomp.config.load import load, to_dict
from evocomp.data.splits import load_splits
from evocomp.evaluation.panel import Panel
from evocomp.evaluation.reading import read_curves, read_labels
from evocomp.training import curves as curves_module
from evocomp.training.build import run
from evocomp.training.cost import Spent
from evocomp.training.curves import Curves
from evocomp.training.tensorboard import TensorBoardPage, layout, varied
from evocomp.training.tensorboard_logger import BASELINES, OWN

SMALL = {
    "recipe": "published",
    "threads": "1",
    "data.max_samples": "24",
    "data.val_samples": "90",
    "data.test_samples": "5",
    "search.population": "6",
    "search.parents": "3",
    "search.generations": "1",
    "labels.passes": "2",
    "optim.batch_size": "8",
    "eval.kept": "[32,8]",
    "trainer.max_epochs": "2",
    "trainer.accelerator": "cpu",
    "trainer.log_every_n_steps": "1",
}
PLUS = {
    "recipe": "plus",
    "labels.target": "credit",
    "labels.credit_masks": "6",
    "labels.refresh": "on_policy",
    "labels.refresh_start": "1",
    "labels.samples_per_refresh": "16",
    "labels.proposals": "4",
    "labels.flat": "0.0",
    "loss.name": "listwise",
    "compressor.budget_input": "true",
}


def trained(folder, **settings):
    config = load([], [f"{key}={value}" for key, value in {**SMALL, "run_dir": str(folder), **settings}.items()])
    run(config)
    return config


def events(folder) -> EventAccumulator:
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0, "tensors": 0})
    return reader.Reload()


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hard")
    return folder, trained(folder)


@pytest.fixture(scope="module")
def plus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plus")
    return folder, trained(folder, **PLUS)


def test_the_page_has_pictures_histograms_curves_and_a_layout(hard):
    tags = events(hard[0] / "tensorboard" / OWN).Tags()
    assert {f"examples/{i}" for i in range(8)} | {"tokens/gradient_density"} == set(tags["images"])
    expected = {"labels/groups", "labels/best_loss_of_each", "tokens/p", "tokens/gradient_norm"}
    assert expected == set(tags["histograms"])
    assert {"custom_scalars__config__", "retention/labelled_questions", "retention/selection_questions"} <= set(
        tags["tensors"]
    )


def test_credits_and_proposals_have_a_page_too(plus):
    reader = events(plus[0] / "tensorboard" / OWN)
    tags = reader.Tags()
    assert {f"examples/{i}" for i in range(8)} == set(tags["images"])
    assert {"labels/credits", "labels/advantages", "labels/spread_of_each", "tokens/p"} <= set(tags["histograms"])
    assert len(reader.Tensors("retention/labelled_questions")) == 2


@pytest.mark.parametrize("which", ["hard", "plus"])
def test_every_chart_of_the_layout_has_one_curve_and_no_chart_is_empty(which, request):
    folder, config = request.getfixturevalue(which)
    curves = read_curves(folder)
    charts = layout((32, 8), to_dict(config), 2)
    assert len(charts) == 4
    for category in charts.values():
        for title, (_, patterns) in category.items():
            found = [name for pattern in patterns for name in curves if re.match(pattern, name)]
            assert found, title
            assert len(found) == 1 or "learning rate" in title, "curves of one run have the same colour"
    titles = {title for category in charts.values() for title in category}
    assert ("policy loss (on-policy rounds)" in titles) == (which == "plus")
    assert ("cosine separation" in titles) == (which == "hard")


def test_a_run_without_refreshes_has_no_charts_by_round(hard):
    settings = to_dict(hard[1])
    assert [len(layout((8,), settings, epochs)) for epochs in (1, 2)] == [3, 4]
    settings["labels"]["refresh"] = "none"
    assert len(layout((8,), settings, 9)) == 3
    assert len(layout((8,), settings, 9, ranks=2)) == 4


def test_baselines_are_runs_of_their_own_with_the_tags_of_the_compressor(hard):
    """TensorBoard colours curves by run, so the chart of a tag has three curves in three colours."""
    own, *others = (
        {name for name in events(path).Tags()["scalars"] if name.startswith("accuracy/")}
        for path in (hard[0] / "tensorboard" / name for name in (OWN, *BASELINES))
    )
    assert own == {"accuracy/mean", "accuracy/kept_32", "accuracy/kept_8"} and others == [own, own]
    groups = {name.split("/")[0] for name in events(hard[0] / "tensorboard" / OWN).Tags()["scalars"]}
    assert groups == {"accuracy", "labels", "learning_rate", "time", "train"} and min(groups) == "accuracy"


def test_floor_and_ceiling_are_those_of_the_panel(hard, nano):
    curves = read_curves(hard[0])
    val = load_splits(hard[1].data).val
    full = Panel(nano, val).full().correct.mean()
    assert [value for _, value in curves["uncompressed/accuracy/kept_8"]] == pytest.approx([full, full])
    # at the same steps as the accuracy in the same chart
    steps = [step for step, _ in curves["accuracy/kept_8"]]
    assert [step for step, _ in curves["random/accuracy/kept_8"]] == steps
    assert [step for step, _ in curves["uncompressed/accuracy/mean"]] == steps
    right = 0
    for example, one in zip(val, nano.features(val), strict=True):
        index = torch.from_numpy(np.sort(np.random.default_rng(example.id).permutation(144)[:32]))
        right += nano.answer([(one, one.visual[index], index)], 8)[0][0] == example.answer
    assert curves["random/accuracy/kept_32"][0][1] == pytest.approx(right / len(val))
    both = [curves[f"random/accuracy/kept_{count}"][0][1] for count in (32, 8)]
    assert curves["random/accuracy/mean"][0][1] == pytest.approx(np.mean(both))


def test_pictures_cost_no_labels_and_speed_counts_what_was_scored(hard):
    cost = json.loads((hard[0] / "trained.json").read_text())["cost"]
    first = read_labels(hard[0])[0]
    assert cost["labelling"]["forwards"] == sum(record["evaluations"] + 1 for record in first.values())
    curves = read_curves(hard[0])
    assert curves["labels/per_second"][0][1] == pytest.approx(24 / cost["labelling"]["seconds"], rel=0.2, abs=0.2)
    saved = sum(record["saved"] for record in first.values())
    scored = sum(record["evaluations"] for record in first.values())
    assert curves["labels/share_saved"][0][1] == pytest.approx(saved / (saved + scored))
    mean = np.mean([record["losses"].mean() for record in first.values()])
    assert curves["labels/mean_loss"][0][1] == pytest.approx(mean, rel=1e-5)


def test_the_table_of_hyperparameters_shows_the_last_value_of_real_curves(hard):
    """No curve starts with a 0 that was not measured; the table refers to curves of the run."""
    reader = events(hard[0] / "tensorboard" / OWN)
    content = reader.PluginTagToContent("hparams")["_hparams_/experiment"]
    experiment = hparams_metadata.parse_experiment_plugin_data(content)
    named = {info.name.tag for info in experiment.metric_infos}
    assert named == {"accuracy/mean", "accuracy/kept_32", "accuracy/kept_8", "train/loss"}
    assert named <= set(reader.Tags()["scalars"])
    assert all(len(reader.Scalars(name)) == 2 for name in named if name.startswith("accuracy/"))


def test_another_logger_gets_the_numbers_and_no_page_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(TensorBoardPage, "open", lambda *_: pytest.fail("a page was drawn without TensorBoard"))
    trained(tmp_path, logger="csv", **{"trainer.max_epochs": "1"})
    assert not list(tmp_path.rglob("events.out.tfevents.*"))
    curves = read_curves(tmp_path)
    expected = {"train/gradient_norm", "labels/per_second", "random/accuracy/kept_8", "time/measuring_seconds"}
    expected |= {"uncompressed/accuracy/mean"}
    assert expected <= set(curves)


def test_no_logger_no_work(tmp_path, monkeypatch):
    monkeypatch.setattr(Curves, "_measure_references", lambda *_: pytest.fail("measured for nobody"))
    monkeypatch.setattr(curves_module.torch.nn.utils, "get_total_norm", lambda *_: pytest.fail("measured for nobody"))
    trained(tmp_path, logger="none", **{"trainer.max_epochs": "1"})


def test_gradient_norm_is_that_of_all_weights():
    module = torch.nn.ParameterList([torch.zeros(2), torch.zeros(1), torch.zeros(3)])
    module[0].grad, module[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([-4.0])
    logged = {}
    module.log = logged.__setitem__
    Curves(None, None, {}).on_before_optimizer_step(SimpleNamespace(loggers=[1]), module, None)
    assert logged == {"train/gradient_norm": pytest.approx(5.0)}


def test_speed_and_skew_are_those_of_all_ranks():
    spent = {"labelling": Spent(forwards=100, seconds=4.0), "refresh": Spent()}
    refresh = SimpleNamespace(
        labeller=SimpleNamespace(waited=1.5),
        records={i: {"id": i} for i in range(20)},
        cost=SimpleNamespace(spent=spent),
    )
    other = torch.tensor([60.0, 5.0, 0.25])
    module = SimpleNamespace(device="cpu", all_gather=lambda mine: torch.stack([mine, other]))
    metrics = Curves(refresh, None, {})._label_speed(module)
    assert metrics["labels/per_second"] == pytest.approx(20 / 5)  # the slower rank determines the time of the round
    assert metrics["labels/forwards_per_second"] == pytest.approx(160 / 5)
    assert metrics["labels/wait_seconds_0"] == 1.5 and metrics["labels/wait_seconds_1"] == 0.25
    assert metrics["labels/skew_seconds"] == pytest.approx(1.25)


def test_pictures_are_of_different_scenes_and_kinds(questions):
    shown = varied(questions, 4)
    assert len({example.image_id for example in shown}) == 4
    assert len({example.kind for example in shown}) > 1
    assert shown == varied(questions, 4)
