"""The part of a label store's fingerprint that the settings alone determine."""

from typing import Any

from evocomp.config import load as config_files
from evocomp.config.schema import RunConfig

IRRELEVANT = ("dir", "overwrite", "batch", "passes", "samples_per_epoch")
"""Label settings that do not affect the labels."""


def from_settings(config: RunConfig) -> dict[str, Any]:
    """Settings that the labels of round 0 depend on, as JSON values."""
    settings = config_files.to_dict(config)
    return {
        "model": config.model.name,
        "dtype": config.model.dtype,
        "grouping": settings["grouping"],
        "search": settings["search"],
        "labels": {key: value for key, value in settings["labels"].items() if key not in IRRELEVANT},
        "target_of": "probabilities" if config.loss.name != "listwise" else "credits",
        "seed": config.seed,
    }
