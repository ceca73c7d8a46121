"""The two recipes as settings: `plus` is what `RunConfig` begins with, `published` is what differs from it."""

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "plus": {},
    "published": {
        "labels": {"target": "hard", "refresh": "search", "refresh_start": 1},
        "compressor": {"budget_input": False, "sharp": 0.0},
        "loss": {"name": "ghm_cs"},
        "optim": {"refresh_lr": 0.0, "ema": 0.0},
    },
}
"""Name -> settings that it changes. A file or the command line may change them again."""
