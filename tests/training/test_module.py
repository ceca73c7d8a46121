"""CompressorModule: losses decrease, and checkpoints contain only the compressor."""

from dataclasses import replace

import lightning as L
import numpy as np
import pytest
import torch

from evocomp.compressor.model import EvoCompCompressor
from evocomp.config.schema import LossConfig, OptimConfig
from evocomp.losses import LOSSES
from evocomp.training.batch import compressor_input, train_batch
from evocomp.training.datamodule import LabelledQuestions
from evocomp.training.module import CompressorModule
from evocomp.training.optim import REFRESH_FLAT, learning_rate


def module(nano, loss: str = "ghm_cs", **options) -> CompressorModule:
    torch.manual_seed(0)
    compressor = EvoCompCompressor.from_mllm(nano.model, **options)
    return CompressorModule(compressor, LossConfig(name=loss), OptimConfig(lr=3e-3, warmup_steps=2))


def hard(encoded) -> list[dict]:
    """Labels that a compressor can learn: the eight tokens with the largest projection onto a fixed direction."""
    direction = torch.randn(encoded[0].visual.shape[1], generator=torch.Generator().manual_seed(1))
    found = []
    for f in encoded:
        best = (f.visual @ direction).topk(8).indices.sort().values
        found.append({"id": f.id, "kept": best.numpy().astype(np.uint16)})
    return found


def credits(encoded) -> list[dict]:
    records = []
    for f, record in zip(encoded, hard(encoded), strict=True):
        values = np.zeros(len(f.visual), np.float16)
        values[record["kept"]] = 1
        records.append({"id": f.id, "credits": values})
    return records


class Watch(L.Callback):
    """Records losses and learning rates of all steps."""

    def __init__(self):
        self.losses: list[float] = []
        self.rates: list[set[float]] = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append({group["lr"] for group in optimizer.param_groups})

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def fit(nano, questions, records, one, steps: int = 40, **options) -> tuple[L.Trainer, Watch]:
    data = LabelledQuestions(nano, questions, 8, steps * 8)
    data.use(0, {r["id"]: r for r in records}, 0)
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
        **{"max_epochs": 1, **options},
    )
    trainer.fit(one, data)
    return trainer, watch


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(nano, questions, encoded, name):
    one = module(nano, name)
    before = [p.detach().clone() for p in one.parameters()]
    make = credits if name == "listwise" else hard
    trainer, watch = fit(nano, questions[:8], make(encoded[:8]), one, steps=2)
    logged = {key.removeprefix("train/"): float(v) for key, v in trainer.callback_metrics.items()}
    assert logged.keys() == {"loss", name.removesuffix("_cs")} | ({"separation"} if name.endswith("_cs") else set())
    assert logged["loss"] == pytest.approx(watch.losses[-1]) and np.isfinite(watch.losses).all()
    if name.endswith("_cs"):
        alpha = one.loss_config.alpha
        assert logged["loss"] == pytest.approx(logged[name[:-3]] + alpha * logged["separation"], rel=1e-5)
    assert all(torch.isfinite(p).all() for p in one.parameters())
    moved = [not torch.equal(p, b) for p, b in zip(one.parameters(), before, strict=True)]
    assert all(moved), [n for (n, _), m in zip(one.named_parameters(), moved, strict=True) if not m]


@pytest.mark.parametrize("name", ["ghm_cs", "bce_cs"])
def test_the_labels_are_found_and_the_loss_goes_down(nano, questions, encoded, name):
    records = hard(encoded[:16])
    one = module(nano, name)
    losses = fit(nano, questions[:16], records, one, steps=60)[1].losses
    scores = one.score(compressor_input(nano, encoded[:16]))
    found = [len(set(row.argsort()[-8:]) & set(r["kept"].tolist())) / 8 for row, r in zip(scores, records, strict=True)]
    assert np.mean(found) > 0.7
    if name == "bce_cs":  # GHM changes its weights in each batch, so its value alone means little
        assert np.mean(losses[-8:]) < 0.6 * np.mean(losses[:8])


def test_a_checkpoint_holds_the_compressor_and_nothing_of_the_mllm(nano, questions, encoded, tmp_path):
    one = module(nano)
    trainer, _ = fit(nano, questions[:16], hard(encoded[:16]), one, steps=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=False)
    expected = {f"compressor.{key}" for key in one.compressor.state_dict()}
    assert stored["state_dict"].keys() == expected
    assert all(len(key) for key in stored["optimizer_states"][0])
    assert (tmp_path / "a.ckpt").stat().st_size < 4_000_000


def test_the_learning_rate_follows_the_schedule(nano, questions, encoded):
    watch = fit(nano, questions[:16], hard(encoded[:16]), module(nano), steps=6)[1]
    assert all(len(rates) == 1 for rates in watch.rates)  # of Muon and AdamW
    expected = [3e-3 * learning_rate(step, 6, 2, 0.3) for step in range(6)]
    assert [rate for rates in watch.rates for rate in rates] == pytest.approx(expected)


def test_the_second_schedule_begins_with_its_epoch_also_where_max_steps_ends_the_run(nano, questions, encoded):
    one = module(nano)
    one.refresh_start = 2
    one.optim_config = OptimConfig(lr=3e-3, refresh_lr=1e-3, warmup_steps=2)
    options = {"max_epochs": 9, "max_steps": 10, "accumulate_grad_batches": 2}
    watch = fit(nano, questions[:16], hard(encoded[:16]), one, steps=5, **options)[1]
    first = [3e-3 * learning_rate(step, 6, 2, 0.3) for step in range(6)]  # two epochs of three steps
    second = [1e-3 * learning_rate(step, 4, 2, REFRESH_FLAT) for step in range(4)]
    rates = [rate for rates in watch.rates for rate in rates]
    assert rates == pytest.approx(first + second)


def test_scoring_that_fails_leaves_the_compressor_as_it_was(nano, encoded):
    one = module(nano)
    one.train()
    inputs = compressor_input(nano, encoded[:2])
    with pytest.raises(RuntimeError):
        one.score(replace(inputs, visual=inputs.visual[..., :3]))
    assert one.compressor.training


def test_scores_are_those_of_evaluation_for_uneven_samples(nano, encoded):
    one = module(nano)
    one.train()
    some = [encoded[0], replace(encoded[1], visual=encoded[1].visual[:60])]
    together = one.score(compressor_input(nano, some))
    assert [len(row) for row in together] == [144, 60] and one.compressor.training
    for row, features in zip(together, some, strict=True):
        (alone,) = one.score(compressor_input(nano, [features]))
        assert np.allclose(row, alone, atol=1e-5)


def test_the_budget_is_read_only_if_the_compressor_has_it(nano, encoded):
    inputs = compressor_input(nano, encoded[:2])
    one = module(nano, budget_input=True)
    with torch.no_grad():
        for weight in one.compressor.budget.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    neutral, sixteen, four = one.score(inputs), one.score(inputs, [16.0, 16.0]), one.score(inputs, [4.0, 16.0])
    assert np.array_equal(neutral[0], sixteen[0]) and np.array_equal(four[1], sixteen[1])
    assert np.abs(four[0] - sixteen[0]).max() > 1e-3
    plain = module(nano)
    assert np.array_equal(plain.score(inputs, [4.0, 4.0])[0], plain.score(inputs)[0])


def test_populations_move_the_logits_towards_what_was_good(nano, encoded):
    """With one good and one bad mask, a step increases the probability of the good one."""
    from evocomp.losses import plackett_luce_log_prob

    one = module(nano)
    one.log = lambda *_, **__: None
    features = encoded[:3]
    draws = np.stack([np.arange(0, 8), np.arange(8, 16)])
    before = one.score(compressor_input(nano, features))
    records = []
    for f, row in zip(features, before, strict=True):
        log_prob = plackett_luce_log_prob(torch.from_numpy(row)[None], torch.from_numpy(draws)[None])[0].numpy()
        advantages = np.array([1.0, -1.0], np.float32)
        records.append({"id": f.id, "draws": draws.astype(np.uint16), "advantages": advantages, "log_prob": log_prob})
    optimizer = torch.optim.SGD(one.parameters(), lr=1e-2)
    one.training_step(train_batch(nano, features, records, round=1), 0).backward()
    optimizer.step()
    for f, row in zip(features, before, strict=True):
        (now,) = one.score(compressor_input(nano, [f]))
        assert (now[:8].mean() - now[8:16].mean()) > (row[:8].mean() - row[8:16].mean())
