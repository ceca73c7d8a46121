"""Scenarios of the test jobs: each function runs in every process of a job. See ranks.py."""

import logging
import os
import signal
import time
from pathlib import Path

from evocomp import cli, distributed, log
from evocomp.config.load import load
from evocomp.labels.labeller import Labeller
from evocomp.scoring.scorer import CandidateScorer

TINY = [
    "recipe=published",
    # fixed, so that compared runs do not depend on a measurement
    "labels.dtype=model",
    "optim.muon_dtype=bfloat16",
    "data.max_samples=12",
    "data.val_samples=0",
    "data.test_samples=0",
    "labels.chunk_size=2",
    "search.population=8",
    "search.parents=4",
    "search.generations=1",
    "eval.kept=[16]",
    "logger=none",
    "threads=1",
]


def rank() -> int:
    return int(os.environ["RANK"])


def digest(folder: str, round: int = 0) -> str:
    """Hash of a committed round."""
    from evocomp.labels.store import LabelStore

    return LabelStore(Path(folder)).digest(round)


def before_batch(number: int, action) -> None:
    """Call a function before this rank scores its `number`-th batch of masks."""
    original, seen = CandidateScorer._in_parts, [0]

    def counting(self, *arguments, **options):
        seen[0] += 1
        if seen[0] == number:
            action()
        return original(self, *arguments, **options)

    CandidateScorer._in_parts = counting


def send_self(number: int, store: str = "", chunks: int = 0):
    """Send a signal to this process once this number of chunks is stored (by any rank)."""

    def send() -> None:
        while len(list(Path(store).glob("round-0000/chunk-*.safetensors"))) < chunks:
            time.sleep(0.01)
        if store:
            Path(f"{store}-died").write_text(str(time.time()))
        os.kill(os.getpid(), number)

    return send


def watch_for(words: str) -> dict[str, float]:
    """Records the time at which this text is logged, as `named`."""
    found: dict[str, float] = {}

    class Watch(logging.Handler):
        def emit(self, record):
            if words in record.getMessage():
                found.setdefault("named", time.time())

    log.setup()  # otherwise it would treat this handler as its own
    log.logger.addHandler(Watch())
    return found


def label(
    folder: str,
    signal_rank: int = -1,
    number: int = signal.SIGKILL,
    chunks: int = 1,
    static: bool = False,
    own_disks: bool = False,
    settings: tuple = (),
    patient: bool = False,
):
    """`evocomp label` into folder, or into one folder per rank.

    One rank may get a signal in its first chunk, once others are stored. static: fixed chunks for each rank.
    """
    if not patient:
        distributed.heartbeat.HEARTBEAT_SECONDS, distributed.heartbeat.DEAD_AFTER_SECONDS = 0.3, 8.0
    if own_disks:
        os.environ["LOCAL_RANK"] = "0"
        folder = f"{folder}/{rank()}"
    if rank() == signal_rank:
        before_batch(2, send_self(number, folder, chunks))
    named = watch_for("sent no heartbeat")
    if static:
        distributed.WorkQueue.__call__ = lambda self, chunks: iter(chunks[rank() :: distributed.world_size()])
    made: list[int] = []
    make, scorers = Labeller._make, []

    def counting(self, round, ids, *rest):
        made.extend(ids)
        scorers[:] = [self.scorer]
        return make(self, round, ids, *rest)

    Labeller._make = counting
    code = cli.main(["label", f"--labels.dir={folder}", f"--run_dir={folder}-run", *TINY, *settings])
    forwards = sum(scorer.forwards for scorer in scorers)
    result = {"code": code, "digest": digest(folder) if code == 0 else None, "made": len(made), "forwards": forwards}
    return result | named


@distributed.process_group()
def uneven(work: float):
    """A chunk that takes longer than the timeouts of collectives and heartbeats; then the same before a barrier."""
    from datetime import timedelta

    import torch.distributed as dist

    distributed.heartbeat.HEARTBEAT_SECONDS, distributed.heartbeat.DEAD_AFTER_SECONDS = 0.2, work / 3
    queue, done = distributed.WorkQueue("uneven", lambda chunk: False), []
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=work / 2), dist.group.WORLD)
    for chunk in queue(list(range(4))):
        if chunk == 0:
            time.sleep(work)
        done.append(chunk)
    everyone = distributed.gather(done)  # the group still works
    if rank() == 1:
        time.sleep(work)
    try:
        dist.barrier()
        barrier = "passed"
    except RuntimeError:
        barrier = "failed"
    return {"done": everyone, "barrier": barrier, "waited": queue.waited}


@distributed.process_group()
def between_rounds(size: int, training: float, hangs: bool):
    """Two rounds of shard groups of `size`, with a pause between them; returns the chunks of each rank.

    The timeouts are short: 1.5 s without a candidate batch count as a hang. hangs: rank 1 hangs in round 1.
    """
    heartbeat = distributed.heartbeat
    heartbeat.HEARTBEAT_SECONDS, heartbeat.DEAD_AFTER_SECONDS, heartbeat.STALLED_AFTER_SECONDS = 0.2, 1.0, 1.5
    group, done = distributed.ShardGroup.form(size), []
    for round in range(2):
        if round:
            time.sleep(training)
            distributed.gather(None)
            time.sleep(0.1 * group.leads)  # followers query first
        queue = distributed.WorkQueue(f"round-{round}", lambda chunk: False, group)
        done.append([])
        for chunk in queue([0, 1]):
            done[-1].append(chunk)
            time.sleep(0.3)
            if hangs and round and rank() == 1:
                time.sleep(6.0)
    distributed.gather(None)
    return {"done": done}


class Spy:
    """Records the batch and the gradient of each step; `spying` turns it into a Lightning callback."""

    def __init__(self, out: Path, stop_at: int, store: Path):
        self.out, self.stop_at, self.store = out, stop_at, store
        self.steps: list[dict] = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        import torch

        parts = []
        for parameter in module.parameters():
            gradient = parameter.grad
            parts.append((gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).flatten())
        torch.save(torch.cat(parts), self.out / f"gradient-{trainer.global_rank}-{trainer.global_step}.pt")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        from evocomp.labels.store import LabelStore

        records = LabelStore(self.store).read(batch.round)
        hard = [id for id in batch.ids if "kept" in records[id]]
        for id, target in zip(hard, batch.targets if hard else [], strict=True):
            assert target.nonzero()[:, 0].tolist() == records[id]["kept"].tolist(), "labels of another round"
        seen = {"epoch": trainer.current_epoch, "round": batch.round, "ids": batch.ids}
        self.steps.append({**seen, "loss": float(outputs["loss"])})
        if len(self.steps) == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


def spying(spy: Spy, workers: int) -> None:
    """Add the spy to the trainer that `run` builds, and set worker processes of the loader."""
    import functools

    import lightning as L

    from evocomp.training import build

    methods = {name: getattr(spy, name) for name in ("on_before_optimizer_step", "on_train_batch_end")}
    callback = type("SpyCallback", (L.Callback,), {k: staticmethod(v) for k, v in methods.items()})()
    original = build.build_trainer
    build.build_trainer = lambda config, folder, settings, callbacks: original(
        config, folder, settings, [*callbacks, callback]
    )
    build.LabelledQuestions = functools.partial(build.LabelledQuestions, workers=workers)


def train(
    run: str,
    out: str,
    settings: tuple = (),
    stop_at: int = 0,
    workers: int = 0,
    join_counts: bool = True,
    own_disks: bool = False,
):
    """`evocomp train` without evaluation; returns the records of the spy and the final state of training.

    own_disks: each rank simulates a node with a separate label store.
    """
    from evocomp.training import build
    from evocomp.training.module import CompressorModule

    if own_disks:
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": str(rank())}
        settings = [*settings, f"labels.dir={run}-labels-{rank()}"]
    if not join_counts:
        CompressorModule._sum_over_ranks = lambda self, counts: counts
    words = [f"run_dir={run}", *TINY, "trainer.accelerator=cpu", "trainer.max_epochs=1", *settings]
    config = load(settings=words)
    spy = Spy(Path(out), stop_at, Path(config.labels.dir or f"{run}/labels"))
    spying(spy, workers)
    code = 0
    try:
        build.run(config)
    except log.UserError as error:
        print(f"evocomp: {error}", flush=True)
        code = 2
    return {"code": code, "steps": spy.steps, "left": distributed.world_size() == 1}


@distributed.process_group()
def proposals(folder: str, rounds: int = 3, signal_rank: int = -1):
    """On-policy rounds 1.. with equal scores in all processes; returns the digests of all rounds.

    One rank may be killed while round 1 is made.
    """
    from evocomp.training import build

    distributed.heartbeat.HEARTBEAT_SECONDS, distributed.heartbeat.DEAD_AFTER_SECONDS = 0.3, 8.0
    plus = ["recipe=plus", "labels.credit_masks=4", "labels.samples_per_refresh=8", "labels.proposals=8"]
    config = load(settings=[f"run_dir={folder}", *TINY, *plus, "labels.flat=0.001"])
    splits, mllm = build.load_splits(config.data), build.load_mllm(config)
    labeller = build.build_labeller(config, mllm, splits, Path(folder))

    def scores(features, budgets):
        return [one.visual.norm(dim=1).numpy() + budget for one, budget in zip(features, budgets, strict=True)]

    usable = []
    for round in range(rounds):
        if round == 1 and rank() == signal_rank:
            before_batch(1, send_self(signal.SIGKILL))
        records = labeller.ensure(round, scores)
        usable.append(sum("draws" in record and record["draws"].size > 0 for record in records.values()))
    return {"digests": [digest(f"{folder}/labels", round) for round in range(rounds)], "usable": usable}
