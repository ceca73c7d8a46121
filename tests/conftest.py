import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import signal

import pytest
import torch
from hypothesis import settings

from evocomp import log

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # a suite that a shell starts in the background inherits that Ctrl-C is ignored, and so would its children
    signal.signal(signal.SIGINT, signal.default_int_handler)
# how long an example takes says nothing on a machine that others use too
settings.register_profile("evocomp", deadline=None)
settings.load_profile("evocomp")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_messages():
    """Reset the log handler, which refers to the current stderr, and the record of one-time warnings."""
    yield
    log.logger.handlers.clear()
    log.logger.propagate = True
    log.logger.setLevel("NOTSET")
    log._warned.clear()


@pytest.fixture(scope="session")
def nano():
    """The shipped MLLM, loaded once; tests must not change it."""
    from evocomp.mllm.hf import FrozenMLLM

    return FrozenMLLM.load("nano")


@pytest.fixture(scope="session")
def questions():
    """60 questions of all seven kinds about drawn scenes that no setting uses."""
    from evocomp.data.scenes import scene_examples

    return scene_examples(seed=515151, start=0, count=5, relation=True)[:60]


@pytest.fixture(scope="session")
def encoded(nano, questions):
    return nano.features(questions)
