import pytest

from evocomp.bench import timing, training

TINY = [{"image_size": 96, "patch": 24, "width": 32}]


def test_rows(monkeypatch):
    monkeypatch.setattr(timing, "MIN_SAMPLE_SECONDS", 1e-3)
    rows = training.run(repeats=1, batch=2, sizes=TINY)
    assert [row["bench"] for row in rows] == ["training step", "training step, peak memory", "growth with B"]
    assert all(row["ratio"] > 0 for row in rows[:2])


def test_other_losses_get_no_row(monkeypatch):
    monkeypatch.setattr(training, "ALPHA", 0.1)
    right = training.ghm_bce
    monkeypatch.setattr(training, "ghm_bce", lambda *a: right(*a) * 1.01)
    with pytest.raises(AssertionError):
        training.run(repeats=1, batch=2, sizes=TINY)
