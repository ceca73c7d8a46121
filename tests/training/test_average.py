import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from evocomp.training.average import AverageFromEpoch


class Walk(L.LightningModule):
    """A model with one weight, which each step increases by 1; records its value after each step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([100.0]))
        self.seen = []

    def training_step(self, batch, _):
        return -self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(self.weight.item())


@pytest.mark.parametrize("start", [0, 1, 2, 7])
def test_the_average_is_that_of_the_steps_from_the_epoch_on(start, tmp_path):
    module, decay, steps = Walk(), 0.7, 4
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[AverageFromEpoch(decay, start)],
    )
    trainer.fit(module, DataLoader(torch.zeros(steps, 1)))
    assert module.seen == [101.0 + i for i in range(3 * steps)]
    # initial average: the last weights before it, or those of the first step if there are none
    first = max(0, start * steps - 1)
    expected = module.seen[min(first, 3 * steps - 1)]
    for weight in module.seen[first + 1 :]:
        expected = decay * expected + (1 - decay) * weight
    assert module.weight.item() == pytest.approx(expected, abs=1e-4)
