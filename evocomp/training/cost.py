"""What a run spends, by purpose, so that recipes are compared at equal cost."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L

from evocomp.distributed import gather, rank
from evocomp.scoring.scorer import CandidateScorer
from evocomp.training.batch import TrainBatch


@dataclass
class Spent:
    """One purpose's share.

    forwards: (mask, question) pairs scored; packed: LLM sequences that this took; flops: of the LLM or compressor
    (2 a weight and token forward, 6 with backward; attention scores left out); seconds: wall; cpu_seconds: of this
    process.
    """

    forwards: int = 0
    packed: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class CostMeter(L.Callback):
    """Adds up labelling (round 0), refreshes (later rounds) and training; survives resuming.

    `RefreshLabels` wraps its work in `labelling`; everything between two batches' starts is training but for that
    and for measurements on the selection split.
    """

    def __init__(self, scorer: CandidateScorer):
        self.scorer = scorer
        self.spent = {"labelling": Spent(), "refresh": Spent(), "training": Spent()}
        self._weights = sum(p.numel() for p in scorer.mllm.decoder.layers.parameters())
        self._batch_started = (0.0, 0.0)

    def labelling(self, round: int) -> "_Meter":
        """Context in which a round is made."""
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
        """What the whole job has spent: a checkpoint is of rank 0 alone. All ranks call it, as they save together."""
        everyone = gather({name: asdict(share) for name, share in self.spent.items()})
        return {
            name: {
                key: value if key == "seconds" else sum(one[name][key] for one in everyone)
                for key, value in share.items()
            }
            for name, share in everyone[0].items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rank 0 carries on what all have spent, the others only the time that has passed."""
        self.spent = {
            name: Spent(**share) if rank() == 0 else Spent(seconds=share["seconds"]) for name, share in state.items()
        }

    def summary(self) -> dict[str, dict[str, float]]:
        """Rounded, for trained.json and the report: work of all ranks, wall time of rank 0. All ranks call it."""
        return {
            name: {key: round(value, 1) for key, value in share.items()} for name, share in self.state_dict().items()
        }


class _Meter:
    """Books what the scorer did between entry and exit."""

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
