"""Lightning's TensorBoard logger that writes baselines as separate runs, so that charts show them in other colours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

OWN, BASELINES = "compressor", ("random", "uncompressed")


class RunLogger(TensorBoardLogger):
    """Writes to FOLDER/tensorboard/compressor, and a metric `BASELINE/TAG` as `TAG` to FOLDER/tensorboard/BASELINE.

    TensorBoard colours curves by run, so `accuracy/kept_16` and `random/accuracy/kept_16` share a chart and differ in
    colour. Lightning's metric `epoch` is not written. The table of hyperparameters refers to the logged curves of its
    metrics; Lightning would write an initial value of 0 for each.
    """

    def __init__(self, folder: str | Path):
        super().__init__(folder, name="tensorboard", version=OWN, default_hp_metric=False)
        self._baselines: dict[str, SummaryWriter] = {}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        own = {}
        for name, value in metrics.items():
            run, _, tag = name.partition("/")
            if run in BASELINES:
                self._writer(run).add_scalar(tag, float(value), step)
            elif name != "epoch":
                own[name] = value
        super().log_metrics(own, step)

    @rank_zero_only
    def log_table(self, params: Mapping[str, Any], metrics: list[str]) -> None:
        """Write the hyperparameters for the HParams tab, which shows them with the last values of `metrics`."""
        self.log_hyperparams(dict(params))
        known = self._sanitize_params(dict(params))
        for summary in hparams(known, dict.fromkeys(metrics, 0.0)):
            self.experiment._get_file_writer().add_summary(summary)

    @rank_zero_only
    def save(self) -> None:
        super().save()
        for writer in self._baselines.values():
            writer.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        for writer in self._baselines.values():
            writer.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_baselines": {}}

    def _writer(self, run: str) -> SummaryWriter:
        if run not in self._baselines:
            self._baselines[run] = SummaryWriter(f"{self.root_dir}/{run}")
        return self._baselines[run]
