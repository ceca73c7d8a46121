"""Who decides which visual tokens stay: a compressor, a baseline of `evocomp.selection`, or any function.

All are brought to one form, a picker. `pick(visual, text, keep)` gets three lists with one entry per image
and returns, per image, the kept tokens [r] ascending, the scores [n] (or None), and, if some of the kept tokens
become means of dropped ones, the owner [n] of each token: the kept token that speaks for it. What a selector may be:

- an `EvoCompCompressor` (plain, with LoRA, or in a `PooledCompressor`), or a folder or hub id to load it
from;
- a function `(visual [n,D], text [T,D], keep: int) -> scores [n]`, called once per image; the highest stay;
- an object with `needs`, a collection of input names, that takes a `SelectionInputs` and `keep` and returns a
  `Selection` with `indices` (the baselines of `evocomp.selection`); `needs` may name tokens and text only;
- an object with a `pick` method of the form above.

`visual` holds the image's tokens as the LLM would see them, without newline separators. `text` holds the
prompt's other embeddings (the whole template, without padding and without the answer; see `evocomp.compress`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from evocomp.compressor.config import EvoCompConfig
from evocomp.compressor.keep import selected_count, selected_tokens
from evocomp.compressor.lora import is_lora, load_lora
from evocomp.compressor.model import EvoCompCompressor
from evocomp.compressor.transfer import PooledCompressor
from evocomp.log import UserError, logger
from evocomp.mllm.context import owners
from evocomp.mllm.families import unwrap


class Pick(NamedTuple):
    """What a picker says of one image of n tokens: see above."""

    kept: Tensor
    scores: Tensor | None = None
    owner: Tensor | None = None


class Picker(Protocol):
    def pick(self, visual: list[Tensor], text: list[Tensor], keep: list[int]) -> list[Pick]: ...


def top_r(scores: Tensor, r: int) -> Pick:
    """The r highest of scores [n], in original order, and the scores; of equals the earlier token stays."""
    order = torch.argsort(scores, descending=True, stable=True)
    return Pick(order[:r].sort().values, scores)


class CompressorPicker:
    """Scores all images of a batch in one padded pass of the compressor."""

    def __init__(self, compressor: EvoCompCompressor | PooledCompressor):
        self.compressor = compressor

    def pick(self, visual: list[Tensor], text: list[Tensor], keep: list[int]) -> list[Pick]:
        weight = next(self.compressor.parameters())
        if weight.device != visual[0].device:
            self.compressor.to(visual[0].device)
        tokens, mask = _padded(visual, weight.dtype)
        prompt, prompt_mask = _padded(text, weight.dtype)
        config = self.compressor.config
        told = [selected_count(r, len(v), config) for r, v in zip(keep, visual, strict=True)]
        budget = torch.tensor(told, dtype=torch.float32, device=tokens.device)
        training = self.compressor.training
        self.compressor.eval()
        try:
            logits = self.compressor(tokens, prompt, prompt_mask, mask, budget=budget).logits.float()
        finally:
            self.compressor.train(training)  # it may be in the middle of its training
        return [self._one(row[: len(v)], v, r) for row, v, r in zip(logits, visual, keep, strict=True)]

    def _one(self, scores: Tensor, visual: Tensor, keep: int) -> Pick:
        selected, context = selected_tokens(scores, keep, self.compressor.config)
        if not context:
            return Pick(selected, scores)
        centres, owner = owners(visual, selected[None], context)
        return Pick(torch.cat([selected, centres[0]]).sort().values, scores, owner[0])


def _padded(rows: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """[B,n,D] and bool [B,n], or no mask if nothing was padded."""
    padded = pad_sequence([row.to(dtype) for row in rows], batch_first=True)
    sizes = torch.tensor([len(row) for row in rows])
    if bool((sizes == padded.shape[1]).all()):
        return padded, None
    return padded, (torch.arange(padded.shape[1]) < sizes[:, None]).to(padded.device)


class FunctionPicker:
    """Asks a scoring function once per image."""

    def __init__(self, function):
        self.function = function

    def pick(self, visual: list[Tensor], text: list[Tensor], keep: list[int]) -> list[Pick]:
        picks = []
        for v, t, r in zip(visual, text, keep, strict=True):
            scores = self.function(v, t, r)
            if not isinstance(scores, Tensor) or scores.shape != v.shape[:1]:
                shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise UserError(
                    f"the selector returned {shape} for {len(v)} visual tokens; return one score per token"
                )
            if bool(scores.isnan().any()):
                raise UserError(f"the selector returned NaN among its {len(v)} scores; return numbers")
            picks.append(top_r(scores.to(v.device), r))
        return picks


class SelectionPicker:
    """Asks a selector of `evocomp.selection` once per image."""

    offered = {"tokens", "grid", "text"}

    def __init__(self, method):
        self.method, self.name = method, getattr(method, "name", type(method).__name__)
        if missing := set(method.needs) - self.offered:
            raise UserError(
                f"{self.name} needs {', '.join(sorted(missing))}, which compress() does not have; "
                "use a method that needs tokens and text only"
            )

    def pick(self, visual: list[Tensor], text: list[Tensor], keep: list[int]) -> list[Pick]:
        return [self._one(v, t, r) for v, t, r in zip(visual, text, keep, strict=True)]

    def _one(self, visual: Tensor, text: Tensor, keep: int) -> Pick:
        if keep == 0:
            return Pick(torch.zeros(0, dtype=torch.long, device=visual.device))
        side = math.isqrt(len(visual))
        grid = (side, side) if side * side == len(visual) else (1, len(visual))
        selection = self.method(_selection_inputs()(tokens=visual, grid=grid, text=text), keep)
        if selection.indices is None:
            raise UserError(f"{self.name} merges tokens; compress() drops tokens only, use another method")
        return Pick(selection.indices.to(visual.device).sort().values)


def _selection_inputs():
    from evocomp.selection.base import SelectionInputs

    return SelectionInputs


def picker_for(selector, model: nn.Module) -> Picker:
    """Bring a selector for `model` to the common form.

    Raises UserError if it is no selector, or a compressor made for another hidden size.
    """
    if isinstance(selector, str | Path):
        selector = load_compressor(selector, model)
    if isinstance(unwrap(selector), EvoCompCompressor | PooledCompressor):
        made_for, size = unwrap(selector).hidden_size, unwrap(model).get_decoder().config.hidden_size
        if made_for != size:
            raise UserError(
                f"this compressor was made for hidden size {made_for}, the model has {size}; transfer it by "
                f"evocomp.compressor.transfer.PooledCompressor(compressor, {size}), or train a new one"
            )
        if isinstance(unwrap(selector), EvoCompCompressor):  # one that is pooled was moved to another model on purpose
            _warn_of_another_model(unwrap(selector), model)
        return CompressorPicker(selector)
    if hasattr(selector, "pick"):
        return selector
    if hasattr(selector, "needs"):
        return SelectionPicker(selector)
    if callable(selector):
        return FunctionPicker(selector)
    raise UserError(
        f"{selector!r} is no selector; "
        "give a compressor, its folder, or a function (visual, text, keep) -> scores"
    )


def _warn_of_another_model(compressor: EvoCompCompressor, model: nn.Module) -> None:
    """Models of one width cannot be told apart by their shapes; their names say more, where they are recorded."""
    trained_for = _last_part(compressor.config.base_model_name_or_path)
    given = _last_part(getattr(unwrap(model).config, "_name_or_path", None))
    if trained_for and given and trained_for != given:
        logger.warning("this compressor was trained for %s, the model is %s: expect worse answers", trained_for, given)


def _last_part(name: str | None) -> str:
    """Of a model's path or hub id, for it may lie elsewhere on this machine; in the hub's cache a hash comes last."""
    path = Path(name or "")
    return path.parent.parent.name.rsplit("--", 1)[-1] if path.parent.name == "snapshots" else path.name


def load_compressor(path: str | Path, model: nn.Module) -> EvoCompCompressor | PeftModel:
    """Load a compressor, or a LoRA adapter of one, from a folder or a hub id, in the dtype of `model`.

    The head stays in float32: scores in bfloat16 would tie.

    Raises UserError if there is none.
    """
    check_is_compressor(path)
    dtype = next(unwrap(model).get_decoder().parameters()).dtype
    with weights_of(path):
        if not is_lora(path):
            return EvoCompCompressor.from_pretrained(path, dtype=dtype)
        adapter = load_lora(path, model).to(dtype)
    for head in ("score", "head_norm"):
        getattr(adapter.get_base_model(), head).float()
    return adapter.eval()


def check_is_compressor(path: str | Path) -> None:
    """Raise `UserError`, with what to do, unless a folder or hub id holds the configuration of a compressor."""
    folder = Path(path)
    if not (folder / "config.json").is_file() and (folder / "compressor" / "config.json").is_file():
        raise UserError(f"{path} holds a run; give its compressor: {folder / 'compressor'}")
    config, reason = {}, "the folder has no config.json"
    try:
        config = EvoCompConfig.get_config_dict(path)[0]
    except OSError as error:
        reason = str(error).splitlines()[0]
    if not folder.is_dir() and not config:
        # transformers takes what is no folder for a hub id, and complains of its form
        may_be_id = not folder.is_absolute() and str(path)[0] not in ".~" and str(path).count("/") <= 1
        reason = f"no such folder, and as a hub id: {reason}" if may_be_id else "no such folder"
    if not config:
        raise UserError(f"no compressor at {path}: {reason}; give RUN/compressor of a run, or train one: evocomp train")
    if config.get("model_type") != EvoCompConfig.model_type:
        raise UserError(
            f"{path} holds a model of type {config.get('model_type')!r}, not an EvoComp compressor; "
            "give the folder that EvoCompCompressor.save_pretrained wrote"
        )


@contextmanager
def weights_of(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong while weights are read from a folder or hub id into a `UserError`."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"the weights in {path} cannot be read ({reason}); copy or train them again") from None
