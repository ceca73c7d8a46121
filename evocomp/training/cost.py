"""Compute spent by a run on labelling, refreshes and training, so that recipes can be compared at equal cost."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L

from evocomp.distributed import gather, rank
from evocomp.scoring.scorer import CandidateScorer
from evocomp.training.batch import TrainBatch


@dataclass
class Spent:
    """Compute spent on one purpose.

    forwards: scored (mask, question) pairs; packed: LLM sequences that held them; flops: of the LLM or the compressor
    (per weight and token: 2 for a forward pass, 6 with the backward pass; attention scores not counted); seconds: wall
    time; cpu_seconds: CPU time of this process.
    """

    forwards: int = 0
    packed: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class CostMeter(L.Callback):
    """Adds up the costs of labelling (round 0), refreshes (later rounds) and training; checkpoints contain the sums.

    `RefreshLabels` runs in the context `labelling`. Training is the time from the start to the end of each batch.
    """

    def __init__(self, scorer: CandidateScorer):
        self.scorer = scorer
        self.spent = {"labelling": Spent(), "refresh": Spent(), "training": Spent()}
        self._weights = sum(p.numel() for p in scorer.mllm.decoder.layers.parameters())
        self._batch_started = (0.0, 0.0)

    def labelling(self, round: int) -> "_Meter":
        """Context manager that measures the labelling of a round."""
        return _Meter(self, "labelling" if round == 0 else "refresh")

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch_started = (time.perf_counter(), time.process_time())

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        share = self.spent["training"]
        share.seconds += time.perf_counter() - self._batch_started[0]
        share.cpu_seconds += time.process_time() - self._batch_started[1]
        tokens = batch.inputs.visual.shape[0] * (batch.inputs.visual.shape[1] + batch.inputs.prompt.shape[1])
        share.flops += 6.0 * tokens * sum(p.numel() for p in module.parameters())

    def state_dict(self) -> dict[str, Any]:
        """Cost of all ranks, since only rank 0 writes the checkpoint. A collective operation: all ranks call it."""
        everyone = gather({name: asdict(share) for name, share in self.spent.items()})
        return {
            name: {
                key: value if key == "seconds" else sum(one[name][key] for one in everyone)
                for key, value in share.items()
            }
            for name, share in everyone[0].items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rank 0 continues the sums of all ranks; the others continue only the wall time."""
        self.spent = {
            name: Spent(**share) if rank() == 0 else Spent(seconds=share["seconds"]) for name, share in state.items()
        }

    def summary(self) -> dict[str, dict[str, float]]:
        """Rounded, for trained.json and the report: work of all ranks, wall time of rank 0. All ranks call it."""
        return {
            name: {key: round(value, 1) for key, value in share.items()} for name, share in self.state_dict().items()
        }


class _Meter:
    """Adds the work of the scorer between entry and exit to one purpose."""

    def __init__(self, cost: CostMeter, purpose: str):
        self.cost = cost
        self.purpose = purpose

    def __enter__(self) -> None:
        self.before = self._now()

    def __exit__(self, *_) -> None:
        forwards, packed, tokens, seconds, cpu = (
            after - before for after, before in zip(self._now(), self.before, strict=True)
        )
        share = self.cost.spent[self.purpose]
        share.forwards += int(forwards)
        share.packed += int(packed)
        share.flops += 2.0 * self.cost._weights * tokens
        share.seconds += seconds
        share.cpu_seconds += cpu

    def _now(self) -> tuple[float, ...]:
        scorer = self.cost.scorer
        return (
            scorer.forwards,
            scorer.losses.sequences,
            scorer.losses.tokens,
            time.perf_counter(),
            time.process_time(),
        )
