"""The TensorBoard page of a run: a layout whose first category tells the story, pictures, histograms, and the table
of hyperparameters. Written by rank 0; a run with another logger never comes here."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger

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
from evocomp.viz import four_panels, gradient_density

MANY = 4096
"""Records that a histogram of labels looks at, at most: enough for its shape, and quick with a million of them."""

SHOWN = """
recipe seed model.name data.source data.max_samples grouping.method grouping.centre grouping.count search.strategy
search.population search.generations labels.target labels.refresh labels.passes compressor.init compressor.use_text
compressor.budget_input loss.name loss.alpha optim.name optim.lr optim.batch_size optim.ema
""".split()
"""Settings in the table of hyperparameters: what experiments change. config.yaml has them all."""

# losses whose logits are independent probabilities; the others rank tokens within a sample
_PROBABILITIES = ("ghm", "focal", "bce")


class TensorBoardPage:
    """See `of`. Tags stand in `layout` and in the methods that write them."""

    def __init__(
        self, logger: TensorBoardLogger, refresh: RefreshLabels, monitor: SelectionAccuracy, pictures: int, watched: int
    ):
        self.logger = logger
        self.writer = logger.experiment
        self.refresh = refresh
        self.monitor = monitor
        self.watched = watched
        self.keep = sorted(monitor.kept)[len(monitor.kept) // 2]
        self.shown = [example for example, _ in monitor.mllm.readable(varied(monitor.examples), pictures)]
        self.labels: list[Record] = []

    @classmethod
    def of(
        cls, trainer: L.Trainer, refresh: RefreshLabels, monitor: SelectionAccuracy, pictures: int, watched: int
    ) -> "TensorBoardPage | None":
        """The page of this run, if it has one and this process writes it; a sharded MLLM answers to all or nobody."""
        if not trainer.is_global_zero or monitor.mllm.shard_group.size > 1:
            return None
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                return cls(logger, refresh, monitor, pictures, watched)
        return None

    # ------------------------------------------------------------ start and end

    def open(self, settings: dict[str, Any]) -> None:
        """Layout, hyperparameters, and the labels of the pictures, which stay those of the first round."""
        self.writer.add_custom_scalars(layout(self.monitor.kept))
        self.logger.log_hyperparams(chosen(settings), dict.fromkeys(self._final_names().values(), 0.0))
        self.labels = self._label_pictures()

    def close(self, metrics: dict[str, float]) -> None:
        """The last numbers into the table of hyperparameters."""
        final = {to: metrics[name] for name, to in self._final_names().items() if name in metrics}
        self.logger.log_metrics(final, step=1)  # the table shows the last step, and each name began at 0
        self.logger.save()

    def _final_names(self) -> dict[str, str]:
        names = ["val/accuracy", *(f"val/accuracy_{count}" for count in self.monitor.kept), "train/loss"]
        return {name: f"final/{name.split('/')[1]}" for name in names}

    def _label_pictures(self) -> list[Record]:
        """Labels of the pictures, made as those of the training questions were, and as costly."""
        labeller = self.refresh.labeller
        known = {example.id: example for example in self.shown}

        def encode(ids: Sequence[int]) -> list[Features]:
            return labeller.mllm.features([known[id] for id in ids])

        with labeller.scorer.uncounted():  # these are not the labels that training pays for
            made = {record["id"]: record for record in labeller.rounds.make(0, list(known), encode, {}, None)}
        return [made[example.id] for example in self.shown]

    # ------------------------------------------------------------ every round

    def show_round(self, step: int) -> None:
        """Histograms of the labels: groups a picture, and what the masks reach."""
        records = self.refresh.data.records
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
        values = values[np.isfinite(values)]  # random labels have no loss
        if values.size:
            self.writer.add_histogram(tag, values, step, bins=bins)

    # ------------------------------------------------------------ every epoch

    def show_epoch(self, module: CompressorModule, step: int) -> None:
        """What the compressor now makes of the watched questions and of the pictures."""
        self._show_tokens(module, step)
        if self.shown:
            self._show_pictures(module, step)

    def _show_tokens(self, module: CompressorModule, step: int) -> None:
        """Histograms of p and of GHM's gradient norm, and how well p finds the tokens that labels keep."""
        data = self.refresh.data
        ids = sorted(data.records)[: self.watched]
        if not ids:
            return
        features = self.monitor.mllm.features([data.examples[id] for id in ids])
        records = [data.records[id] for id in ids]
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
        """Precision against recall of the labels' tokens; where scores only rank, by rank within the sample."""
        pairs = [(r, s) for r, s in zip(records, scores, strict=True) if has_label(r)]
        if not pairs:
            return
        kept = np.concatenate([kept_by(record, len(row), self.keep) for record, row in pairs])
        found = np.concatenate([_sigmoid(row) if absolute else _rank(row) for _, row in pairs])
        self.writer.add_pr_curve(tag, kept, found, step)

    def _show_pictures(self, module: CompressorModule, step: int) -> None:
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
            verdict = "right" if score_answer(example, answer) >= 0.5 else "wrong"
            chosen = np.flatnonzero(kept_by(record, len(row), self.keep))
            lit, grid = first_image(one, shown.alone.cpu().numpy())
            picture = four_panels(
                as_array(example.image),
                grid,
                first_image(one, chosen)[0],
                row[: grid[0] * grid[1]],
                lit,
                f"{example.prompt}: {example.answer}",
                (
                    f"{len(row)} tokens",
                    f"label: {len(chosen)}",
                    "prediction (rank)",
                    f"kept {len(shown.places)}: {answer} ({verdict})",
                ),
            )
            self.writer.add_image(f"pictures/{number}", picture, step, dataformats="HWC")
        absolute = module.loss_config.name.startswith(_PROBABILITIES)
        self._precision_recall("retention/selection_questions", self.labels, scores, absolute, step)


def layout(kept: Sequence[int]) -> dict[str, dict[str, list]]:
    """Charts of the Custom Scalars tab: category -> title -> [kind, tags]. The first category is the story."""
    story = {
        f"right answers at {count} tokens: compressor, random, full": [
            "Multiline",
            [f"val/accuracy_{count}$", f"val/random_{count}$", "val/full$"],
        ]
        for count in sorted(kept)
    }
    story = {
        "right answers by kept tokens, and full": ["Multiline", [*(f"val/accuracy_{c}$" for c in kept), "val/full$"]],
        "losses": ["Multiline", [r"train/(loss|ghm|focal|bce|listwise|policy|separation)$"]],
        "label search: first, mean, best, all tokens": [
            "Multiline",
            ["labels/first_mean$", "labels/first_best$", "labels/mean_loss$", "labels/best_loss$", "labels/full_loss$"],
        ],
        **story,
    }
    return {
        "1 The story": story,
        "2 Labels by round": {
            "gain since the last round [nats]": ["Multiline", ["labels/gain$"]],
            "share of labels changed, and of forwards saved": [
                "Multiline",
                ["labels/share_changed$", "labels/share_saved$", "labels/share_usable$"],
            ],
            "labels a second": ["Multiline", ["labels/per_second$"]],
            "seconds that each rank waited": ["Multiline", [r"labels/wait_seconds_\d+$", "labels/skew_seconds$"]],
        },
        "3 Optimisation": {
            "gradient norm": ["Multiline", ["train/gradient_norm$"]],
            "learning rate": ["Multiline", ["lr-"]],
            "seconds so far": ["Multiline", ["time/"]],
        },
    }


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
    """Questions about `count` images, or all, the i-th question of the i-th image: all kinds come up."""
    by_picture: dict[str, list[Example]] = {}
    for example in examples:
        by_picture.setdefault(example.image_id, []).append(example)
    return [asked[i % len(asked)] for i, asked in enumerate(list(by_picture.values())[:count])]


def budgets_of(records: Sequence[Record]) -> list[float] | None:
    """How many tokens each proposed mask keeps; None for labels that are for all sizes."""
    return [float(record["draws"].shape[-1]) for record in records] if "draws" in records[0] else None


def _target(record: Record, tokens: int) -> np.ndarray:
    """What a loss over probabilities compares p with [N]."""
    return record["credits"].astype(np.float64) if "credits" in record else kept_by(record, tokens, 0)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * logits))


def _softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max())
    return odds / odds.sum()


def _rank(scores: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(scores, kind="stable"), kind="stable") / max(1, len(scores) - 1)
