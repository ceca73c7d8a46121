"""Names of strategies: the strategies that they select, and errors for those that are refused."""

import pytest
from lightning.pytorch.strategies import ModelParallelStrategy

from evocomp.config.schema import OptimConfig
from evocomp.log import UserError
from evocomp.training.strategy import job_size, whole, with_strategy

ADAMW = OptimConfig(name="adamw", ema=0.0)


def test_other_names_are_lightnings_own():
    settings = {"strategy": "ddp", "devices": 2}
    assert with_strategy(settings, OptimConfig()) == settings
    assert with_strategy({}, OptimConfig()) == {}


def test_fsdp2_spreads_data_over_all_processes():
    settings = with_strategy({"strategy": "fsdp2", "devices": 4, "num_nodes": 2}, ADAMW)
    strategy = settings["strategy"]
    assert isinstance(strategy, ModelParallelStrategy)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (8, 1)
    assert not strategy._save_distributed_checkpoint


@pytest.mark.parametrize(
    ("settings", "optim", "advice"),
    [
        ({"strategy": "fsdp2"}, OptimConfig(ema=0), "add --optim.name=adamw .*so[)], or choose"),
        ({"strategy": "fsdp2"}, OptimConfig(name="adamw", ema=0.9), "add --optim.ema=0, or choose"),
        ({"strategy": "fsdp2"}, OptimConfig(name="muon", ema=0.9), "add --optim.name=adamw .* and --optim.ema=0, or"),
        ({"strategy": "fsdp", "accelerator": "cpu"}, ADAMW, "needs GPUs"),
    ],
)
def test_what_sharding_cannot_do_is_refused(settings, optim, advice):
    with pytest.raises(UserError, match=advice):
        with_strategy(settings, optim)


def test_the_size_of_the_job_is_torchruns(monkeypatch):
    assert job_size() == {"devices": 1}
    for name, value in {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert job_size() == {"devices": 2, "num_nodes": 3}


def test_a_module_that_is_whole_stays_itself():
    import torch

    module = torch.nn.Linear(2, 2)
    assert whole(module) is module
