import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evocomp.log import UserError
from evocomp.selection import SELECTORS, selector
from evocomp.selection.base import NotApplicable, SelectionInputs

PURE = [
    "random_tokens",
    "uniform_stride",
    "cls_attention",
    "hired",
    "vispruner",
    "divprune",
    "cdpruner",
    "fastv",
    "sparsevlm",
    "pyramiddrop",
    "dart",
]
MERGED = ["tome", "prumerge", "prumerge_plus", "visionzip"]


def test_every_name_builds_its_selector():
    assert set(PURE + MERGED + ["average_pool", "hired_next"]) == set(SELECTORS)
    known = {f.name for f in fields(SelectionInputs)}
    for name in SELECTORS:
        built = selector(name)
        assert built.name == name
        assert built.needs <= known and isinstance(built.needs, frozenset)
        with pytest.raises(FrozenInstanceError):
            built.anything = 1


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 45), text=st.integers(1, 7), seed=st.integers(0, 99), data=st.data())
@pytest.mark.parametrize("name", PURE)
def test_selections_are_exactly_r_distinct_ascending_indices(name, n, text, seed, data, drawn):
    r = data.draw(st.integers(1, n))
    out = selector(name)(drawn(seed, n, text=text), r)
    assert out.indices.dtype == torch.int64 and len(out.indices) == r
    assert (out.indices.diff() > 0).all()
    assert 0 <= out.indices[0] and out.indices[-1] < n
    assert torch.equal(out.positions, out.indices) and out.tokens is None


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 45), seed=st.integers(0, 99), data=st.data())
@pytest.mark.parametrize("name", MERGED)
def test_merging_returns_exactly_r_finite_rows(name, n, seed, data, drawn):
    r = data.draw(st.integers(1, n))
    out = selector(name)(drawn(seed, n), r)
    assert out.tokens.shape == (r, 10) and out.tokens.isfinite().all()
    assert out.positions.shape == (r,) and out.positions.dtype == torch.int64
    assert 0 <= out.positions.min() and out.positions.max() < n
    assert out.indices is None


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), data=st.data())
def test_pooling_stays_within_the_budget(rows, columns, data, drawn):
    r = data.draw(st.integers(1, rows * columns))
    out = selector("average_pool")(drawn(0, rows * columns, grid=(rows, columns)), r)
    assert 1 <= len(out.tokens) == len(out.positions) <= r
    assert (out.positions.diff() > 0).all()


@pytest.mark.parametrize("name", [*PURE, *MERGED, "average_pool"])
def test_whole_budget_keeps_every_token_of_a_selection(name, drawn):
    out = selector(name)(drawn(4, 12, grid=(3, 4)), 12)
    if out.indices is not None:
        assert out.indices.tolist() == list(range(12))


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_a_missing_input_is_named(name, drawn):
    full = drawn(0, 20, grid=(20, 1))
    for field in selector(name).needs:
        with pytest.raises(NotApplicable, match=f"{name} is not applicable.*`{field}`") as caught:
            selector(name)(replace(full, **{field: None}), 4)
        assert (caught.value.method, caught.value.missing) == (name, field)
        assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_selectors_use_only_their_required_inputs(name, drawn):
    full = drawn(0, 20, grid=(20, 1))
    only = {f: getattr(full, f) for f in selector(name).needs}
    bare = SelectionInputs(tokens=full.tokens, grid=full.grid, **only)
    assert len(selector(name)(bare, 5).positions) <= 5


@pytest.mark.parametrize("keep", [0, 21, -1])
def test_budgets_out_of_range_are_refused(keep, drawn):
    with pytest.raises(UserError, match="1 to 20"):
        selector("divprune")(drawn(0, 20), keep)


@pytest.mark.parametrize("name", [n for n in PURE + MERGED if n != "random_tokens"])
def test_text_changes_the_selection_only_of_text_aware_selectors(name, drawn):
    """Replace the question, its CLIP embeddings and the LLM's values, but not the image."""
    inputs, other = drawn(1, 40), drawn(2, 40)
    asked = replace(
        inputs,
        text=other.text,
        clip_text_embeds=other.clip_text_embeds,
        llm_attention=other.llm_attention,
        llm_keys=other.llm_keys,
        llm_hidden=other.llm_hidden,
    )
    first, second = selector(name)(inputs, 9), selector(name)(asked, 9)
    assert torch.equal(first.positions, second.positions) != selector(name).text_aware


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_llm_inputs_are_needed_exactly_by_those_that_run_it_first(name):
    assert any(field.startswith("llm_") for field in selector(name).needs) == selector(name).needs_llm


@pytest.mark.parametrize("name", [*PURE, *MERGED, "average_pool"])
def test_half_precision_inputs(name, drawn):
    full = drawn(3, 30, grid=(5, 6))
    halves = {
        f.name: getattr(full, f.name).bfloat16()
        for f in fields(full)
        if isinstance(getattr(full, f.name), torch.Tensor)
    }
    out = selector(name)(replace(full, **halves), 8)
    assert len(out.positions) <= 8
    assert out.tokens is None or out.tokens.dtype == torch.bfloat16


def test_an_unknown_name_gets_a_hint():
    with pytest.raises(UserError, match="did you mean 'divprune'"):
        selector("divprun")
    with pytest.raises(UserError, match="choose one of random_tokens"):
        selector("zzzz")


def test_names_can_be_listed_without_importing_torch():
    code = "import sys, evocomp.selection as s; assert len(s.SELECTORS) == 17 and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
