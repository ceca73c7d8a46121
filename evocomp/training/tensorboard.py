"""The TensorBoard page of a run: layout of the custom scalars, images, histograms and the table of hyperparameters.

Written by rank 0, and only for a run whose logger is TensorBoard.
"""

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch

from evocomp.compressor.keep import selected_count, shown_tokens
from evocomp.data.example import Example
from evocomp.data.images import as_array
from evocomp.data.scoring import score_answer
from evocomp.labels.records import Record, kept_by
from evocomp.mllm.features import Features, first_image
from evocomp.training.batch import compressor_input, has_label
from evocomp.training.module import CompressorModule
from evocomp.training.monitors import SelectionAccuracy
from evocomp.training.refresh_labels import RefreshLabels
from evocomp.training.tensorboard_logger import RunLogger
from evocomp.viz import four_panels, gradient_density

MANY = 4096
"""Largest number of records in a histogram of labels: enough for its shape, and fast for stores of any size."""

SHOWN = """
recipe seed model.name data.source data.max_samples grouping.method grouping.centre grouping.count search.strategy
search.population search.generations labels.target labels.refresh labels.passes compressor.init compressor.use_text
compressor.budget_input loss.name loss.alpha optim.name optim.lr optim.batch_size optim.ema
""".split()
"""Settings in the table of hyperparameters: those that experiments vary. config.yaml has all settings."""

# losses that train the sigmoid of each logit; with the other losses, logits only rank the tokens of a sample
_PROBABILITIES = ("ghm", "focal", "bce")


class TensorBoardPage:
    """Writes the TensorBoard page; create it with `of`. The tags are in `layout` and in the methods that write them.

    Args:
        epochs, ranks: number of epochs and of processes of the run.
    """

    def __init__(
        self,
        logger: RunLogger,
        refresh: RefreshLabels,
        monitor: SelectionAccuracy,
        pictures: int,
        watched: int,
        epochs: int,
        ranks: int = 1,
    ):
        self.logger = logger
        self.writer = logger.experiment
        self.refresh = refresh
        self.monitor = monitor
        self.watched = watched
        self.epochs = epochs
        self.ranks = ranks
        self.keep = sorted(monitor.kept)[len(monitor.kept) // 2]
        self.shown = [example for example, _ in monitor.mllm.readable(varied(monitor.examples), pictures)]
        self.labels: list[Record] = []

    @classmethod
    def of(
        cls, trainer: L.Trainer, refresh: RefreshLabels, monitor: SelectionAccuracy, pictures: int, watched: int
    ) -> "TensorBoardPage | None":
        """The page of this run; None without a `RunLogger`, on ranks other than 0, and for a sharded MLLM, which rank 0
        alone cannot run."""
        if not trainer.is_global_zero or monitor.mllm.shard_group.size > 1:
            return None
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                return cls(logger, refresh, monitor, pictures, watched, trainer.max_epochs, trainer.world_size)
        return None

    # ------------------------------------------------------------ start and end

    def open(self, settings: dict[str, Any]) -> None:
        """Write layout and hyperparameters, and make labels for the shown images; these labels are never refreshed."""
        kept = self.monitor.kept
        self.writer.add_custom_scalars(layout(kept, settings, self.epochs, self.ranks))
        names = ["accuracy/mean", *(f"accuracy/kept_{count}" for count in kept), "train/loss"]
        self.logger.log_table(chosen(settings), names)
        self.labels = self._label_shown()

    def close(self) -> None:
        """Write everything to disk."""
        self.logger.save()

    def _label_shown(self) -> list[Record]:
        """Labels of the shown questions, made like the labels of the training questions in round 0."""
        labeller = self.refresh.labeller
        known = {example.id: example for example in self.shown}

        def encode(ids: Sequence[int]) -> list[Features]:
            return labeller.mllm.features([known[id] for id in ids])

        with labeller.scorer.uncounted():  # the cost of training does not include these labels
            made = {record["id"]: record for record in labeller.rounds.make(0, list(known), encode, {}, None)}
        return [made[example.id] for example in self.shown]

    # ------------------------------------------------------------ every round

    def show_round(self, step: int) -> None:
        """Histograms of the labels: groups per image, losses, credits and advantages."""
        records = self.refresh.records
        some = [records[id] for id in sorted(records)[:MANY]]
        if "groups" in some[0]:
            counts = np.array([int(record["groups"].max()) + 1 for record in some])
            self._histogram("labels/groups", counts, step, bins=np.arange(counts.min(), counts.max() + 2) - 0.5)
        for name in ("best_loss", "spread"):
            if name in some[0]:
                self._histogram(f"labels/{name}_of_each", [record[name] for record in some], step)
        for name in ("credits", "advantages"):
            if name in some[0]:
                self._histogram(f"labels/{name}", np.concatenate([record[name].ravel() for record in some]), step)

    def _histogram(self, tag: str, values: Sequence[float] | np.ndarray, step: int, bins: Any = "tensorflow") -> None:
        values = np.asarray(values, dtype=np.float64)
        values = values[np.isfinite(values)]  # random labels have no losses
        if values.size:
            self.writer.add_histogram(tag, values, step, bins=bins)

    # ------------------------------------------------------------ every epoch

    def show_epoch(self, module: CompressorModule, step: int) -> None:
        """Write histograms of the watched questions and images of the shown ones, with the current compressor."""
        self._show_tokens(module, step)
        if self.shown:
            self._show_images(module, step)

    def _show_tokens(self, module: CompressorModule, step: int) -> None:
        """Histograms of p and of GHM's gradient norm, and precision and recall of the tokens that the labels keep."""
        labelled, examples = self.refresh.records, self.refresh.labeller.examples
        ids = sorted(labelled)[: self.watched]
        if not ids:
            return
        features = self.monitor.mllm.features([examples[id] for id in ids])
        records = [labelled[id] for id in ids]
        scores = module.score(compressor_input(self.monitor.mllm, features), budgets_of(records))
        absolute = module.loss_config.name.startswith(_PROBABILITIES) and "draws" not in records[0]
        p = np.concatenate([_sigmoid(row) if absolute else _softmax(row) for row in scores])
        self._histogram("tokens/p", p, step)
        if absolute:
            target = [_target(record, len(row)) for record, row in zip(records, scores, strict=True)]
            norm, bins = np.abs(p - np.concatenate(target)), module.loss_config.bins
            self._histogram("tokens/gradient_norm", norm, step, bins=np.linspace(0, 1, bins + 1))
            self.writer.add_figure("tokens/gradient_density", gradient_density(norm, bins), step)
        self._precision_recall("retention/labelled_questions", records, scores, absolute, step)

    def _precision_recall(
        self, tag: str, records: Sequence[Record], scores: Sequence[np.ndarray], absolute: bool, step: int
    ) -> None:
        """Precision-recall curve against the tokens kept by the labels.

        The threshold is on p, or on the rank of a token within its sample if the loss only ranks tokens.
        """
        pairs = [(r, s) for r, s in zip(records, scores, strict=True) if has_label(r)]
        if not pairs:
            return
        kept = np.concatenate([kept_by(record, len(row), self.keep) for record, row in pairs])
        found = np.concatenate([_sigmoid(row) if absolute else _rank(row) for _, row in pairs])
        self.writer.add_pr_curve(tag, kept, found, step)

    def _show_images(self, module: CompressorModule, step: int) -> None:
        mllm = self.monitor.mllm
        features = mllm.features(self.shown)
        config = module.compressor.config
        budgets = [float(selected_count(self.keep, len(one.visual), config)) for one in features]
        scores = module.score(compressor_input(mllm, features), budgets)
        pairs = zip(scores, features, strict=True)
        kept = [shown_tokens(torch.from_numpy(row), one.visual, self.keep, config, one.priority) for row, one in pairs]
        prompts = [(one, *shown) for one, shown in zip(features, kept, strict=True)]
        answers, _ = mllm.answer(prompts, self.monitor.max_new_tokens)
        rows = zip(self.shown, features, self.labels, scores, kept, answers, strict=True)
        for number, (example, one, record, row, shown, answer) in enumerate(rows):
            verdict = "correct" if score_answer(example, answer) >= 0.5 else "wrong"
            chosen = np.flatnonzero(kept_by(record, len(row), self.keep))
            lit, grid = first_image(one, shown.alone.cpu().numpy())
            panels = four_panels(
                as_array(example.image),
                grid,
                first_image(one, chosen)[0],
                row[: grid[0] * grid[1]],
                lit,
                f"{example.prompt}: {example.answer}",
                (
                    f"image, {len(row)} tokens",
                    f"label, {len(chosen)} tokens",
                    "scores (rank)",
                    f"{len(shown.places)} kept: {answer}, {verdict}",
                ),
                first_image(one, shown.merged.cpu().numpy())[0].tolist(),
            )
            self.writer.add_image(f"examples/{number}", panels, step, dataformats="HWC")
        absolute = module.loss_config.name.startswith(_PROBABILITIES)
        self._precision_recall("retention/selection_questions", self.labels, scores, absolute, step)


def layout(kept: Sequence[int], settings: dict[str, Any], epochs: int, ranks: int = 1) -> dict[str, dict[str, list]]:
    """Charts of the Custom Scalars tab: category -> title -> [kind, tags].

    The curves of one run share one colour, so each chart has one tag. Charts that would stay empty are left out.

    Args:
        settings: settings of the run, as in config.yaml.
        epochs: number of epochs.
        ranks: number of processes.
    """
    accuracy = {"mean over kept counts": "accuracy/mean"}
    accuracy |= {f"{count} kept tokens": f"accuracy/kept_{count}" for count in sorted(kept)}
    categories = {
        "1 Accuracy on the selection split: compressor, random tokens, uncompressed": accuracy,
        "2 Training loss": _loss_charts(settings, epochs),
        "3 Labels by round": _label_charts(settings),
        "4 Optimization and time": {
            "gradient norm before clipping": "train/gradient_norm",
            "learning rate": "learning_rate.*",
            "seconds of refreshing labels": "time/refresh_seconds",
            "seconds of training": "time/training_seconds",
            "seconds of measuring accuracy": "time/measuring_seconds",
        },
    }
    if ranks > 1:
        categories["5 Ranks"] = {
            "seconds that each rank waited": r"labels/wait_seconds_\d+",
            "longest minus shortest wait [s]": "labels/skew_seconds",
        }
    if not _refreshes(settings, epochs):
        del categories["3 Labels by round"]
        del categories["4 Optimization and time"]["seconds of refreshing labels"]
    return {
        name: {title: ["Multiline", [f"^{tag}$"]] for title, tag in charts.items()}
        for name, charts in categories.items()
    }


def _refreshes(settings: dict[str, Any], epochs: int) -> bool:
    """Whether labels are refreshed after the first epoch; otherwise curves by round have a single point."""
    labels = settings["labels"]
    return labels["refresh"] != "none" and labels["refresh_start"] < epochs


_TERMS = {"ghm": "GHM-C", "focal": "focal loss", "bce": "binary cross-entropy", "listwise": "listwise loss of credits"}


def _loss_charts(settings: dict[str, Any], epochs: int) -> dict[str, str]:
    """One chart for each term of the loss."""
    name = settings["loss"]["name"]
    term = name.removesuffix("_cs")
    charts = {_TERMS[term]: f"train/{term}"}
    if term != name:
        charts |= {"cosine separation": "train/separation", "sum of the loss": "train/loss"}
    if settings["labels"]["refresh"] == "on_policy" and _refreshes(settings, epochs):
        charts |= {
            "policy loss (on-policy rounds)": "train/policy",
            "share of clipped policy ratios": "train/clipped",
        }
    return charts


def _label_charts(settings: dict[str, Any]) -> dict[str, str]:
    """Charts with one point for each label round."""
    speed = {"labels per second": "labels/per_second"}
    if settings["labels"]["refresh"] == "on_policy":
        return {
            "spread of the answer losses of a question's masks [nats]": "labels/spread",
            "share of questions whose masks differ in loss": "labels/share_usable",
        } | speed
    return {
        "answer loss of the labels [nats]": "labels/best_loss",
        "mean answer loss of the last population [nats]": "labels/mean_loss",
        "decrease of the labels' answer loss since the last round [nats]": "labels/gain",
        "share of labels that changed": "labels/share_changed",
        "share of candidates that had been scored before": "labels/share_saved",
    } | speed


def chosen(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of `SHOWN`, by dotted name, and the number of epochs.

    >>> chosen({"seed": 3, "loss": {"name": "ghm", "bins": 10}, "trainer": {"max_epochs": 6}})
    {'seed': 3, 'loss.name': 'ghm', 'max_epochs': 6}
    """
    sections = {name: part for name, part in settings.items() if isinstance(part, dict)}
    flat = {f"{name}.{key}": value for name, part in sections.items() for key, value in part.items()}
    flat |= {key: value for key, value in settings.items() if not isinstance(value, dict)}
    found = {name: flat[name] for name in SHOWN if name in flat}
    return found | {"max_epochs": flat["trainer.max_epochs"]} if "trainer.max_epochs" in flat else found


def varied(examples: Sequence[Example], count: int | None = None) -> list[Example]:
    """One question for each of `count` images (None: all): the i-th question of the i-th image, to vary the types."""
    by_image: dict[str, list[Example]] = {}
    for example in examples:
        by_image.setdefault(example.image_id, []).append(example)
    return [asked[i % len(asked)] for i, asked in enumerate(list(by_image.values())[:count])]


def budgets_of(records: Sequence[Record]) -> list[float] | None:
    """Number of tokens kept by the proposed masks of each record; None if labels do not depend on that number."""
    return [float(record["draws"].shape[-1]) for record in records] if "draws" in records[0] else None


def _target(record: Record, tokens: int) -> np.ndarray:
    """Targets [N] of a loss on probabilities."""
    return record["credits"].astype(np.float64) if "credits" in record else kept_by(record, tokens, 0)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * logits))


def _softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max())
    return odds / odds.sum()


def _rank(scores: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(scores, kind="stable"), kind="stable") / max(1, len(scores) - 1)
