"""The two recipes as settings: `plus` has the defaults of `RunConfig`, `published` lists the differences."""

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
"""Name -> settings that it changes. Files and the command line may override them."""
