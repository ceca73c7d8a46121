"""Two ranks train like one on the joined batch; labels are never stale; a resumed run sees the remaining samples."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from evocomp.labels.store import LabelStore

EPOCH = ["labels.samples_per_epoch=24", "optim.warmup_steps=1"]
ADAMW = [*EPOCH, "optim.name=adamw", "optim.lr=1e-3"]


@pytest.fixture(scope="module")
def train(server, start_job, tmp_path_factory):
    """train(world, settings, ...) -> (job, folder of the run, folder with gradients)."""
    labels = tmp_path_factory.mktemp("labels")

    def start(world: int, settings: list[str], run: Path | None = None, shared_labels: bool = True, **options):
        out = tmp_path_factory.mktemp("out")
        run = run or out / "run"
        where = [f"labels.dir={labels}/store"] if shared_labels else []
        arguments = {"run": str(run), "out": str(out), "settings": [*settings, *where], **options}
        return start_job(server, tmp_path_factory.mktemp("job"), world, "train", **arguments), run, out

    return start


@pytest.fixture(scope="module")
def single(train):
    """One process with batches of eight."""
    job, run, out = train(1, [*ADAMW, "optim.batch_size=8"])
    return job.succeeded(), run, out


def gradients(out: Path, rank: int = 0) -> torch.Tensor:
    return torch.stack([torch.load(path) for path in sorted(out.glob(f"gradient-{rank}-*.pt"))])


def weights(run: Path) -> dict[str, torch.Tensor]:
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)
    return content["state_dict"]


def accuracies(run: Path) -> list[tuple[str, str]]:
    """Metrics of the validation split from the CSV logger."""
    with (run / "curves" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [(name, value) for row in rows for name, value in row.items() if name.startswith("accuracy/") and value]


def ids(job) -> list[set[int]]:
    """Samples of each step, over all ranks."""
    by_step = zip(*(result["steps"] for result in job.results), strict=True)
    return [set().union(*(step["ids"] for step in steps)) for steps in by_step]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_rank_with_the_joined_batch(train, single, strategy):
    job, run, out = train(2, [*ADAMW, "optim.batch_size=4", f"trainer.strategy={strategy}"])
    job.succeeded()
    alone, alone_run, alone_out = single
    assert ids(job) == [set(step["ids"]) for step in alone.results[0]["steps"]]
    losses = [sum(pair) / 2 for pair in zip(*([s["loss"] for s in r["steps"]] for r in job.results), strict=True)]
    assert losses == pytest.approx([step["loss"] for step in alone.results[0]["steps"]], rel=1e-5)
    ours, theirs = gradients(out), gradients(alone_out)
    assert ours.shape == theirs.shape and len(ours) == 3
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    # the checkpoint holds the compressor and nothing of the MLLM
    assert weights(run).keys() == weights(alone_run).keys()
    assert all(key.startswith("compressor.") for key in weights(run))


def test_a_finished_run_is_not_repeated_and_its_ranks_leave_the_group(train):
    settings = [*ADAMW, "optim.batch_size=4"]
    job, run, _ = train(2, settings)
    assert all(result["steps"] and result["left"] for result in job.succeeded().results)
    again, _, _ = train(2, settings, run=run)
    # a process that exits with an open process group may abort, and the launcher then ends the others too
    assert all(not result["steps"] and result["left"] for result in again.succeeded().results)
    other, _, _ = train(2, [*settings, "optim.lr=2e-3"], run=run)
    assert other.codes == [2, 2] and "different settings" in other.outputs[0], other.outputs
    assert all(result["left"] for result in other.results)


@pytest.mark.slow
def test_without_joined_counts_two_ranks_differ(train, single):
    """Shows that the test above can fail."""
    job, _, out = train(2, [*ADAMW, "optim.batch_size=4", "trainer.strategy=ddp"], join_counts=False)
    job.succeeded()
    theirs = gradients(single[2])
    assert float((gradients(out) - theirs).norm() / theirs.norm()) > 1e-2


@pytest.fixture(scope="module")
def uninterrupted(train):
    """Two ranks, two persistent loader workers each, a label refresh before epochs 1 and 2."""
    settings = [*EPOCH, "optim.batch_size=4", "trainer.max_epochs=3"]
    return (*train(2, settings, shared_labels=False, workers=2), settings)


def test_no_label_is_stale(uninterrupted):
    job = uninterrupted[0].succeeded()  # the spy compares every label with its round's record
    expected = [(epoch, epoch) for epoch in range(3) for _ in range(3)]
    for result in job.results:
        assert [(step["epoch"], step["round"]) for step in result["steps"]] == expected


def test_a_run_stopped_in_mid_epoch_resumes_exactly(train, uninterrupted):
    job, run, _, settings = uninterrupted
    first, again, _ = train(2, settings, shared_labels=False, workers=2, stop_at=5)
    assert first.codes == [2, 2] and "training was stopped" in first.outputs[0]
    assert all(result["left"] for result in first.results)
    second, _, _ = train(2, settings, run=again, shared_labels=False, workers=2)
    second.succeeded()
    for rank in range(2):
        whole, parts = job.results[rank]["steps"], first.results[rank]["steps"] + second.results[rank]["steps"]
        assert [step["ids"] for step in parts] == [step["ids"] for step in whole]
        assert [step["loss"] for step in parts] == [step["loss"] for step in whole]
    costs = [json.loads((folder / "trained.json").read_text())["cost"] for folder in (run, again)]
    for purpose in ("labelling", "refresh", "training"):
        assert all(costs[0][purpose][key] == costs[1][purpose][key] for key in ("forwards", "flops")), purpose
    for key, value in weights(run).items():
        assert torch.equal(value, weights(again)[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_training_resumes_with_two_ranks_or_one(train, single, strategy):
    settings = [*ADAMW, "optim.batch_size=4", f"trainer.strategy={strategy}"]
    longer = [*settings, "trainer.max_epochs=2"]
    first, run, _ = train(2, longer, stop_at=5)
    assert first.codes == [2, 2], first.outputs
    shutil.copytree(run, twin := run.parent / "twin")
    seen = [ids(first)]
    for world, folder in ((2, run), (1, twin)):
        job, _, _ = train(world, longer, run=folder)
        job.succeeded()
        seen.append(ids(job))
        assert (folder / "trained.json").exists()
    assert [len(steps) for steps in seen] == [5, 1, 2]
    assert seen[1][0] == seen[2][0] | seen[2][1]  # the samples that were left of the epoch


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_mixed_precision_and_gradient_accumulation_work_with_the_strategies(train, strategy):
    """An interruption waits until accumulated gradients are applied; the resumed run is then exact."""
    half = [*ADAMW, "optim.batch_size=2", f"trainer.strategy={strategy}", "trainer.accumulate_grad_batches=2"]
    settings = [*half, "trainer.precision=bf16-mixed"]
    whole, run, out = train(2, settings)
    whole.succeeded()
    assert [len(result["steps"]) for result in whole.results] == [6, 6]
    assert len(gradients(out)) == 3 and gradients(out).isfinite().all()
    first, again, _ = train(2, settings, stop_at=3)
    assert first.codes == [2, 2] and [len(result["steps"]) for result in first.results] == [4, 4]
    second, _, _ = train(2, settings, run=again)
    second.succeeded()
    for rank in range(2):
        parts = first.results[rank]["steps"] + second.results[rank]["steps"]
        assert parts == whole.results[rank]["steps"]
    for key, value in weights(run).items():
        assert torch.equal(value, weights(again)[key]), key


PLUS = ["recipe=plus", "labels.refresh_start=1", "labels.samples_per_refresh=8", "labels.flat=0.001"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [[], PLUS], ids=["published", "plus"])
def test_a_run_with_a_sharded_mllm_is_that_of_one_process_a_rank(train, recipe):
    """Labels, refreshes, training and measurements with half of the MLLM's layers in each of two processes."""
    exact = ["scorer.own_pass=false", "scorer.shared_prefix=never", "labels.batch=2", "data.val_samples=5"]
    settings = [*EPOCH, *exact, "optim.batch_size=4", "trainer.max_epochs=2", "logger=csv", *recipe]
    settings += ["compressor.init=layer"]
    whole, plain, _ = train(2, [*settings, "model.shard=1"], shared_labels=False)
    shards, run, _ = train(2, [*settings, "model.shard=2"], shared_labels=False)
    assert whole.succeeded().results == shards.succeeded().results
    measured = [accuracies(folder) for folder in (plain, run)]
    assert len(measured[0]) == 2 * 2 and measured[0] == measured[1]
    assert all(key.startswith("compressor.") for key in weights(run))


@pytest.mark.slow
def test_nodes_with_local_disks_train_alike_and_delete_old_rounds(train):
    settings = [*EPOCH, "optim.batch_size=4", "trainer.max_epochs=4"]
    shared, run, _ = train(2, settings, shared_labels=False)
    apart, own, _ = train(2, settings, shared_labels=False, own_disks=True)
    assert apart.succeeded().results == shared.succeeded().results
    stores = [run / "labels", *(Path(f"{own}-labels-{rank}") for rank in range(2))]
    assert [LabelStore(store).rounds() for store in stores] == [[0, 2, 3]] * 3
    assert len({LabelStore(store).digest(3) for store in stores}) == 1
