"""The cost of a job includes all its processes, also after a resume with another number of processes."""

from types import SimpleNamespace

import pytest
import torch

from evocomp.training import cost
from evocomp.training.cost import CostMeter


@pytest.mark.parametrize("before", [[1000], [900, 100]])
@pytest.mark.parametrize("after", [1, 2])
def test_forwards_are_counted_once_however_many_processes_go_on(monkeypatch, before, after):
    scorer = SimpleNamespace(mllm=SimpleNamespace(decoder=SimpleNamespace(layers=torch.nn.Linear(2, 2))))

    def job(size: int) -> list[CostMeter]:
        meters = [CostMeter(scorer) for _ in range(size)]
        monkeypatch.setattr(cost, "gather", lambda own: [{n: vars(s) for n, s in m.spent.items()} for m in meters])
        return meters

    first = job(len(before))
    for meter, forwards in zip(first, before, strict=True):
        meter.spent["labelling"].forwards, meter.spent["labelling"].seconds = forwards, 7.0
    state = first[0].state_dict()
    second = job(after)
    for rank, meter in enumerate(second):
        monkeypatch.setattr(cost, "rank", lambda rank=rank: rank)
        meter.load_state_dict(state)
    for meter in second:
        meter.spent["labelling"].forwards += 50
        meter.spent["labelling"].seconds += 1.0
    told = second[0].summary()["labelling"]
    assert told["forwards"] == 1000 + 50 * after and isinstance(told["forwards"], int) and told["seconds"] == 8.0
