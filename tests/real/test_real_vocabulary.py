"""Grouping on a real vocabulary: SmolLM2's embedding rows, EfficientNet features, a closed-form projector.

The fixture is made by `python -m experiments.real.fixture`; these tests need no further package.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from evocomp.grouping.vocabulary import nearest_words, vocabulary_groups

DATA = Path(__file__).parents[2] / "experiments" / "real" / "vocabulary"


@pytest.fixture(scope="module")
def real():
    tensors = {name: value for name, value in load_file(DATA / "vocabulary.safetensors").items()}
    texts = json.loads((DATA / "vocabulary.json").read_text())
    tokens = tensors["features"].float() @ tensors["weight"].float() + tensors["bias"].float()
    tensors["words_mask"] = tensors.pop("words")
    return SimpleNamespace(**{**tensors, "table": tensors["table"].float(), "tokens": tokens}, **texts)


def test_nearest_words_agree_with_brute_force_in_fp64(real):
    tokens, table = real.tokens[0].double(), real.table.double()
    cosine = (tokens @ table.T) / tokens.norm(dim=1)[:, None] / table.norm(dim=1)
    ids, values = nearest_words(real.tokens[0], real.table)
    torch.testing.assert_close(values.double(), cosine.max(1).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(cosine.gather(1, ids[:, None])[:, 0], cosine.max(1).values, atol=1e-5, rtol=0)


def test_groups_are_few_beside_tokens(real):
    for tokens in real.tokens:
        groups = vocabulary_groups(tokens, real.table, real.words_mask)
        ids, _ = nearest_words(tokens, real.table, real.words_mask)
        assert groups.count == len(ids.unique())
        assert 2 <= groups.count <= len(tokens) // 3  # neither a single group nor one per token
        assert int(groups.sizes.sum()) == len(tokens) == 196


def test_rows_that_were_never_trained_are_one_direction(real):
    """The cause of hubs: the rows that the mask excludes are nearly equal, the others are not."""
    rows = torch.nn.functional.normalize(real.table, dim=1)
    never = rows[~real.trained & real.special]
    assert len(never) >= 4
    assert (never @ never.T).min() > 0.9
    some = rows[real.words_mask][:200]
    assert (some @ some.T).fill_diagonal_(0).median() < 0.8


@pytest.mark.parametrize("name", ["trained", "words_mask"])
def test_vocabulary_mask_takes_hub_tokens_out(real, name):
    mask, hubs = getattr(real, name), 0
    for tokens in real.tokens:
        bare, _ = nearest_words(tokens, real.table)
        masked, _ = nearest_words(tokens, real.table, mask)
        hubs += int((~real.trained[bare]).sum())
        assert mask[masked].all() and real.trained[masked].all()
        unaffected = mask[bare]
        assert torch.equal(bare[unaffected], masked[unaffected])
    assert hubs > 0.01 * real.tokens[..., 0].numel(), "without a mask, hubs must attract some tokens"


def test_leaving_special_tokens_out_is_not_enough(real):
    """Byte and program-code tokens share the hubs' direction and take their place."""
    hubs = 0
    for tokens in real.tokens:
        masked, _ = nearest_words(tokens, real.table, real.special)
        hubs += int((~real.trained[masked]).sum())
    assert hubs > 0.01 * real.tokens[..., 0].numel()


def test_nearest_words_name_what_tokens_show(real):
    """Tokens are nearest to a part of their own word far more often than to a part of another scene's word."""
    texts = [text.strip() for text in real.texts]

    def share(shown):
        hits = []
        for tokens, names in zip(real.tokens, shown, strict=True):
            ids, _ = nearest_words(tokens, real.table, real.words_mask)
            hits += [
                real.words[name].startswith(texts[i]) or texts[i].startswith(real.words[name])
                for i, name in zip(ids.tolist(), names.tolist(), strict=True)
                if name >= 0
            ]
        return sum(hits) / len(hits)

    own, other = share(real.shown), share(real.shown.roll(1, 0))
    assert own > 0.3
    assert own > 4 * other
