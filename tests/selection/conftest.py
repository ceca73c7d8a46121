"""Reference results: outputs of the selectors' published code for random inputs of 144 tokens (12 x 12).

`data/expected_n144.json` lists code and commit of each; the arrays are in npz files in the same folder.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evocomp.selection.base import SelectionInputs

DATA = Path(__file__).parent / "data"


def _load(name: str) -> dict[str, torch.Tensor]:
    with np.load(DATA / name) as arrays:
        return {key: torch.from_numpy(arrays[key].astype(np.float32)) for key in arrays}


@pytest.fixture(scope="session")
def arrays() -> dict[str, torch.Tensor]:
    return _load("inputs_n144.npz")


@pytest.fixture(scope="session")
def expected() -> dict[str, torch.Tensor]:
    return _load("expected_n144.npz")


@pytest.fixture(scope="session")
def cases():
    published = json.loads((DATA / "expected_n144.json").read_text())
    return lambda method: published[method]["cases"]


@pytest.fixture(scope="session")
def inputs144(arrays) -> SelectionInputs:
    """These inputs as one sample: 5 prefix, 144 visual and 19 text tokens, with an identity projector."""
    return SelectionInputs(
        tokens=arrays["tokens"],
        grid=(12, 12),
        text=arrays["llm_hidden"][149:],
        clip_hidden=arrays["clip_hidden"],
        cls_attention=arrays["cls_attn"],
        clip_keys=arrays["clip_k"],
        clip_queries=arrays["clip_q"],
        clip_image_embeds=arrays["clip_image_embeds"],
        clip_text_embeds=arrays["clip_text_embeds"],
        llm_attention={1: arrays["llm_last_attn"][:, None], 2: arrays["llm_last_attn"][:, None]},
        llm_keys={1: arrays["llm_keys"]},
        llm_hidden={1: arrays["llm_hidden"]},
        project=lambda rows: rows,
    )


@pytest.fixture(scope="session")
def drawn():
    """draw(seed, n, ...) -> SelectionInputs with every field, heads of 4 channels."""

    def draw(seed: int, n: int, text: int = 5, grid: tuple[int, int] | None = None, **fields):
        g = torch.Generator().manual_seed(seed)
        heads, width, prefix = 3, 12, 4
        length = prefix + n + text

        def normal(*shape):
            return torch.randn(*shape, generator=g)

        full = SelectionInputs(
            tokens=normal(n, 10),
            grid=grid or (1, n),
            text=normal(text, 10),
            clip_hidden=normal(n + 1, width),
            cls_attention=normal(heads, n + 1).softmax(-1)[:, 1:],
            cls_attention_first=normal(heads, n + 1).softmax(-1)[:, 1:],
            clip_keys=normal(n + 1, width),
            clip_queries=normal(n + 1, width),
            clip_image_embeds=normal(n, 6),
            clip_text_embeds=normal(2, 6),
            llm_attention=normal(heads, text, length).softmax(-1),
            llm_keys=normal(length, width),
            llm_hidden=normal(length, 10),
            project=lambda rows: rows[:, :10],
            generator=g,
        )
        return replace(full, **fields)

    return draw
