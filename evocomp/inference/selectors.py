"""What can be passed as a selector: a compressor, a selector of `evocomp.selection`, or any function.

All are converted to one interface, `Picker`: `pick(visual, text, keep)` gets three lists with one entry per image and
returns a `Pick` per image; see `evocomp.inference.pick`. A selector may be:

- the name of a training-free selector ("divprune", ...) or of a shipped compressor ("nano"): `evocomp.inference.names`;
- an `EvoCompCompressor` (plain, with LoRA, or in a `PooledCompressor`), or a folder or hub id to load it from;
- a function `(visual [n,D], text [T,D], keep: int) -> scores [n]`, called once per image; the highest are kept;
- an object with `needs`, a collection of fields of `SelectionInputs`, that takes a `SelectionInputs` and `keep` and
  returns a `Selection` (the selectors of `evocomp.selection`); see `evocomp.inference.training_free`;
- an object with a `pick` method as above.

`visual` holds the image's tokens as in the LLM input, without newline separators. `text` holds the prompt's
other embeddings (the whole template, without padding and without the answer; see `evocomp.compress`).
"""

import copy
import math
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from evocomp.compressor.config import EvoCompConfig
from evocomp.compressor.keep import selected_count, selected_tokens
from evocomp.compressor.lora import is_lora, load_lora
from evocomp.compressor.model import EvoCompCompressor
from evocomp.compressor.transfer import PooledCompressor
from evocomp.inference.names import check_is_compressor, compressor_folder, is_selector, weights_of
from evocomp.inference.pick import Pick, Picker, name_of, top_r
from evocomp.inference.training_free import SelectionPicker, WatchedTower
from evocomp.log import UserError, logger
from evocomp.mllm.context import owners, split
from evocomp.mllm.families import decoder, unwrap
from evocomp.selection import selector_for_depth
from evocomp.selection.priority import priority_order


class CompressorPicker:
    """Scores all images of a batch in one padded forward pass of the compressor.

    context: overrides the maximum number of selected tokens that was saved with the compressor (`config.sharp`);
        None: no override.
    """

    def __init__(
        self, compressor: EvoCompCompressor | PooledCompressor, model: nn.Module, context: float | None = None
    ):
        self.compressor, self.context = compressor, context
        config = compressor.config
        by_tower = config.hedge and config.hedge_by == "cls_attention"
        self._tower = WatchedTower(model, "the compressor's hedge") if by_tower else None

    @property
    def config(self) -> EvoCompConfig:
        """Configuration of the compressor, with `context` in place of its `sharp` if given."""
        config = self.compressor.config
        if self.context is not None:
            config = copy.copy(config)
            config.sharp = self.context
        return config

    def pick(self, visual: list[Tensor], text: list[Tensor], keep: list[int]) -> list[Pick]:
        weight = next(self.compressor.parameters())
        if weight.device != visual[0].device:
            self.compressor.to(visual[0].device)
        tokens, mask = _padded(visual, weight.dtype)
        prompt, prompt_mask = _padded(text, weight.dtype)
        config = self.config
        told = [selected_count(r, len(v), config) for r, v in zip(keep, visual, strict=True)]
        orders = [self._priority(image, v) for image, v in enumerate(visual)]
        budget = torch.tensor(told, dtype=torch.float32, device=tokens.device)
        training = self.compressor.training
        self.compressor.eval()
        try:
            logits = self.compressor(tokens, prompt, prompt_mask, mask, budget=budget).logits.float()
        finally:
            self.compressor.train(training)  # it may be called during training
        rows = zip(logits, visual, keep, orders, strict=True)
        return [self._one(row[: len(v)], v, r, order) for row, v, r, order in rows]

    def watch(self) -> list:
        """See `Picker`."""
        return [] if self._tower is None else self._tower.watch()

    def _priority(self, image: int, visual: Tensor) -> Tensor | None:
        """Priority order of the image's tokens, if `config.hedge` is above 0."""
        config = self.config
        if not config.hedge:
            return None
        attention = None if self._tower is None else self._tower.fields(image, visual)["cls_attention"]
        return priority_order(config.hedge_by, visual, attention)

    def _one(self, scores: Tensor, visual: Tensor, keep: int, order: Tensor | None) -> Pick:
        selected, context = selected_tokens(scores, keep, self.config, order)
        return with_context(Pick(selected, scores), visual, context)


def with_context(pick: Pick, visual: Tensor, context: int) -> Pick:
    """Add `context` context tokens to a pick, at most as many as there are dropped tokens; visual [n, D]."""
    context = min(context, len(visual) - len(pick.kept))
    if not context:
        return pick
    centres, owner = owners(visual, pick.kept[None], context)
    return Pick(torch.cat([pick.kept, centres[0]]).sort().values, pick.scores, owner[0])


class ContextPicker:
    """Adds context tokens to another selector: it selects some of the kept tokens, the rest are means of dropped ones.

    limit: S, the maximum number of selected tokens; see `evocomp.mllm.context.split`.
    """

    def __init__(self, picker: Picker, limit: float):
        if getattr(picker, "merges", False):
            raise UserError(f"{name_of(picker)} merges tokens itself; context tokens need a selector that drops them")
        self.picker, self.limit = picker, limit
        self.reads_llm_input = getattr(picker, "reads_llm_input", False)

    def watch(self) -> list:
        """See `Picker`."""
        return watched(self.picker)

    def pick(self, visual: list[Tensor], text: list[Tensor], keep: list[int], **given) -> list[Pick]:
        counts = [split(r, len(v), self.limit) for r, v in zip(keep, visual, strict=True)]
        picks = [Pick(*pick) for pick in self.picker.pick(visual, text, [selected for selected, _ in counts], **given)]
        if any(pick.owner is not None or pick.tokens is not None for pick in picks):
            raise UserError("this selector merges tokens itself; context tokens need a selector that drops them")
        return [with_context(pick, v, context) for pick, v, (_, context) in zip(picks, visual, counts, strict=True)]


def watched(picker: Picker) -> list:
    """Register the hooks that a selector needs on the model; `remove()` of each one ends it."""
    watch = getattr(picker, "watch", None)
    return watch() if watch else []


def _padded(rows: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Padded rows [B,n,D] and their mask, bool [B,n]; None without padding."""
    padded = pad_sequence([row.to(dtype) for row in rows], batch_first=True)
    sizes = torch.tensor([len(row) for row in rows])
    if bool((sizes == padded.shape[1]).all()):
        return padded, None
    return padded, (torch.arange(padded.shape[1]) < sizes[:, None]).to(padded.device)


class FunctionPicker:
    """Calls a scoring function once per image and keeps the highest scores."""

    def __init__(self, function):
        self.function = function

    def pick(self, visual: list[Tensor], text: list[Tensor], keep: list[int]) -> list[Pick]:
        picks = []
        for v, t, r in zip(visual, text, keep, strict=True):
            scores = self.function(v, t, r)
            if not isinstance(scores, Tensor) or scores.shape != v.shape[:1]:
                shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise UserError(f"the selector returned {shape} for {len(v)} visual tokens; return one score per token")
            if bool(scores.isnan().any()):
                raise UserError(f"the selector returned NaN among its {len(v)} scores; return numbers")
            picks.append(top_r(scores.to(v.device), r))
        return picks


def picker_for(selector, model: nn.Module, context: float | None = None) -> Picker:
    """Convert a selector for `model` to a `Picker`, with context tokens if `context` is given and not 0.

    Raises UserError if it is not a selector, needs inputs that the model does not provide, or is a compressor for
    another hidden size.
    """
    check_context(context)
    if is_selector(selector):
        selector = selector_for_depth(selector, len(decoder(model).layers))
    elif isinstance(selector, str | Path):
        selector = load_compressor(selector, model)
    if isinstance(unwrap(selector), EvoCompCompressor | PooledCompressor):
        _check_fits(unwrap(selector), model)
        return CompressorPicker(selector, model, context)
    picker = _plain_picker(selector, model)
    return ContextPicker(picker, context) if context else picker


def check_context(context: float | None) -> None:
    """Raise UserError unless `context` is None or a finite number >= 0."""
    if context is None:
        return
    if isinstance(context, bool) or not isinstance(context, int | float) or not 0 <= context < math.inf:
        raise UserError(
            f"context={context!r}: give the maximum number of selected tokens, as a number or as a fraction "
            "(below 1) of an image's tokens, or 0 for no context tokens"
        )


def _plain_picker(selector, model: nn.Module) -> Picker:
    if hasattr(selector, "pick"):
        return selector
    if hasattr(selector, "needs"):
        return SelectionPicker(selector, model)
    if callable(selector):
        return FunctionPicker(selector)
    raise UserError(
        f"{selector!r} is no selector; give the name of one ('divprune'), a compressor, its folder, or a function "
        "(visual, text, keep) -> scores"
    )


def _check_fits(compressor: EvoCompCompressor | PooledCompressor, model: nn.Module) -> None:
    made_for, size = compressor.hidden_size, decoder(model).config.hidden_size
    if made_for != size:
        raise UserError(
            f"this compressor was made for hidden size {made_for}, the model has {size}; transfer it with "
            f"evocomp.compressor.transfer.PooledCompressor(compressor, {size}), or train a new one"
        )
    if isinstance(compressor, EvoCompCompressor):  # a pooled compressor was moved to another model on purpose
        _warn_of_another_model(compressor, model)


def _warn_of_another_model(compressor: EvoCompCompressor, model: nn.Module) -> None:
    """Warn if the recorded model name differs: models of equal hidden size cannot be told apart by shape."""
    trained_for = _last_part(compressor.config.base_model_name_or_path)
    given = _last_part(getattr(unwrap(model).config, "_name_or_path", None))
    if trained_for and given and trained_for != given:
        logger.warning("this compressor was trained for %s, the model is %s: expect worse answers", trained_for, given)


def _last_part(name: str | None) -> str:
    """Name of a model without its folder, which depends on the machine; in the hub's cache the last part is a hash."""
    path = Path(name or "")
    return path.parent.parent.name.rsplit("--", 1)[-1] if path.parent.name == "snapshots" else path.name


def load_compressor(path: str | Path, model: nn.Module) -> EvoCompCompressor | PeftModel:
    """Load a compressor, or a LoRA adapter of one, from a folder or a hub id, or a shipped one by its name.

    It gets the dtype of `model`, except for the head, which stays in float32: scores in bfloat16 would tie.

    Raises UserError if there is no compressor at `path`.
    """
    path = compressor_folder(path)
    check_is_compressor(path)
    dtype = next(decoder(model).parameters()).dtype
    with weights_of(path):
        if not is_lora(path):
            return EvoCompCompressor.from_pretrained(path, dtype=dtype)
        adapter = load_lora(path, model).to(dtype)
    for head in ("score", "head_norm"):
        getattr(adapter.get_base_model(), head).float()
    return adapter.eval()
