"""The time left that a run shows includes all its stages and is stable."""

from dataclasses import replace

import pytest

from evocomp import progress
from evocomp.labels.labeller import LabelProgress
from evocomp.progress import Progress, Stage
from evocomp.training.progress import Settled, report_labels


def test_time_left_is_that_of_all_stages():
    """50 questions at 0.5 s and 10 batches at an expected 1 s are left; finished stages add nothing."""
    stages = Progress(labels=Stage(100, guess=9.0), training=Stage(10, guess=1.0), done=Stage(5, done=5, guess=7.0))
    assert stages.seconds_left == 100 * 9.0 + 10
    stages.stages["labels"].advance(50, seconds=25.0)
    assert stages.seconds_left == 50 * 0.5 + 10


def test_a_chunk_that_is_scored_at_once_does_not_look_slow():
    """Two chunks of four questions, 10 s each: the first record arrives after 10 s, three more immediately."""
    settled, state = Settled(), LabelProgress(round=1, total=12)
    rates = []
    for _ in range(2):
        for number in range(4):
            state.seconds += 10.0 if number == 0 else 0.0001
            state.made += 1
            state.done += 1
            shown = settled.without_the_last(replace(state))
            rates.append((shown.done, shown.made, round(shown.seconds)))
    # the first chunk is counted only when the first record of the second one has arrived
    assert rates == [(0, 0, 0)] * 4 + [(4, 4, 10)] * 4
    state.done, state.made, state.seconds = 12, 12, 30.0
    assert settled.without_the_last(replace(state)).seconds == 30.0, "a complete round is counted"


def test_questions_that_take_their_time_are_counted_one_by_one():
    settled, seen = Settled(), []
    for number in range(1, 5):
        state = LabelProgress(round=0, total=9, done=number, made=number, seconds=2.0 * number)
        seen.append(settled.without_the_last(state).made)
    assert seen == [0, 1, 2, 3]


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_there_is_a_line_every_twenty_seconds(clock, caplog):
    shown = Progress(labels=Stage())
    report = report_labels(shown)
    with caplog.at_level("INFO", logger="evocomp"):
        for number in range(1, 31):
            clock[0] = 2.0 * number
            report(LabelProgress(round=0, total=60, done=number, made=number, seconds=2.0 * number))
    assert [record.message for record in caplog.records] == [
        "labels: 9/60 questions, 0.5 per second, about 102 s left".replace("102 s", "2 min"),
        "labels: 19/60 questions, 0.5 per second, about 82 s left",
        "labels: 29/60 questions, 0.5 per second, about 62 s left",
    ]


def test_no_time_is_told_while_nothing_is_known(clock, caplog):
    shown = Progress(labels=Stage(total=5))
    with caplog.at_level("INFO", logger="evocomp"):
        clock[0] = 30.0
        shown.show("labels: 0/5 questions")
    assert [record.message for record in caplog.records] == ["labels: 0/5 questions"]
