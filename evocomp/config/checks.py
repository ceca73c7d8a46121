"""Constraints on settings, single and combined; each error is one line that says what to change."""

from typing import Any

from evocomp.log import UserError


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


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
