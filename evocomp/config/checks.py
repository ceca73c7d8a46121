"""Constraints on settings, single and combined; each error is one line that says what to change."""

import math
from dataclasses import fields, is_dataclass
from typing import Any

from evocomp.log import UserError


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


MOST = {
    "seed": 2**32 - 1,
    "data.train_seed": 2**32 - 1,
    "data.val_seed": 2**32 - 1,
    "data.test_seed": 2**32 - 1,
    "threads": 1024,
    "model.shard": 100_000,
    "search.population": 1_000_000,
    "search.generations": 1_000_000,
    "labels.batch": 1_000_000,
    "labels.chunk_size": 1_000_000,
    "labels.credit_masks": 1_000_000,
    "labels.credit_sizes": 1_000_000,
    "labels.proposals": 1_000_000,
    "labels.proposal_sizes": 1_000_000,
    "compressor.layers": 1000,
    "compressor.width": 1_000_000,
    "compressor.init_layer": 1_000_000,
    "compressor.lora.r": 1_000_000,
    "loss.bins": 1_000_000,
    "optim.batch_size": 1_000_000,
    "eval.kept": 1_000_000,
    "eval.batch": 1_000_000,
    "eval.seeds": 10_000,
    "eval.resamples": 1_000_000,
    "eval.max_new_tokens": 1_000_000,
    "eval.sheet": 10_000,
}
"""Upper bounds of numbers: what is above them is a slip of the keyboard and would only exhaust the memory."""
LONGEST_TEXT = 4096
"""Characters of a text setting, as of a path on Linux."""


def require_bounded(config: Any, prefix: str = "") -> None:
    """Raise `UserError` for a number that is not finite or far too large, and for text that can be no name."""
    for item in fields(config):
        key, value = f"{prefix}{item.name}", getattr(config, item.name)
        if is_dataclass(value):
            require_bounded(value, f"{key}.")
        elif not isinstance(value, dict):
            for one in value if isinstance(value, tuple) else (value,):
                _require_bounded(key, one)


def _require_bounded(key: str, value: Any) -> None:
    if isinstance(value, bool):
        return
    if isinstance(value, str):
        require(len(value) <= LONGEST_TEXT, f"{key}: text of {len(value)} characters; at most {LONGEST_TEXT} are taken")
        printable = not any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in value)
        require(printable, f"{key}={value!r:.80}: holds control characters or half of a surrogate pair")
    elif isinstance(value, int | float) and key != "optim.lr":  # of which the training says that it has diverged
        most = MOST.get(key, 1_000_000_000)
        require(math.isfinite(value), f"{key}={value}: must be a finite number")
        require(abs(value) <= most, f"{key}={value:.6g}: must be at most {most}")


def numbers(config: Any, prefix: str, *names: str) -> None:
    """Raise `UserError` for a list setting of these names with an item that is no number."""
    for name in names:
        for item in getattr(config, name):
            is_number = isinstance(item, int | float) and not isinstance(item, bool)
            require(is_number, f"{prefix}{name}: an item is {str(item)[:40]}; give numbers")


def at_least(config: Any, least: float, prefix: str, *names: str) -> None:
    """Raise `UserError` if one of the named settings is smaller than `least`."""
    for name in names:
        value = getattr(config, name)
        what = "not be negative" if least == 0 else f"be at least {least}"
        require(value >= least, f"{prefix}{name}={value}: must {what}")


def require_consistent(config: Any) -> None:
    """Raise `UserError` if settings of a `RunConfig` are valid one by one but not in combination."""
    scenes = {"nano": "small", "nano576": "large"}.get(config.model.name, config.data.scenes)
    require(
        config.data.source != "scenes" or config.data.scenes == scenes,
        f"model.name={config.model.name} needs {scenes} scenes: set data.scenes={scenes}",
    )
    credit = config.labels.target == "credit"
    require(
        not credit or config.loss.name in ("listwise", "bce", "ghm", "ghm_cs"),
        f"loss.name={config.loss.name} needs hard labels: choose listwise, bce, ghm or ghm_cs with credits",
    )
    require(
        config.labels.refresh != "on_policy" or credit,
        "labels.refresh=on_policy requires labels.target=credit",
    )
    require(
        config.labels.refresh != "search" or not credit,
        "labels.refresh=search requires searched masks: with credits, set labels.refresh=on_policy or none",
    )
    require(
        not config.compressor.sharp or config.model.attention != "flash_attention_2",
        "compressor.sharp > 0 needs an attention bias, which flash_attention_2 does not support: set "
        "model.attention=sdpa or compressor.sharp=0",
    )
    at_random = credit and config.labels.credit_masks_from == "random"
    require(
        config.labels.credit_of != "group" or (at_random and config.loss.name == "listwise"),
        "labels.credit_of=group requires labels.target=credit, labels.credit_masks_from=random and loss.name=listwise",
    )
    require(
        config.loss.name != "listwise" or credit,
        f"loss.name=listwise needs labels.target=credit, not {config.labels.target}; for the paper's recipe set "
        "recipe=published, else choose another loss",
    )
