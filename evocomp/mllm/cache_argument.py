"""Name of the key-value cache among a model's arguments: `cache` since transformers 5.24, `past_key_values` before."""

from collections.abc import Mapping
from typing import Any

import transformers
from packaging.version import Version

CACHE = "cache" if Version(Version(transformers.__version__).base_version) >= Version("5.24") else "past_key_values"
"""Give a cache to a model as `model(..., **{CACHE: cache})`: newer versions warn of the old name."""


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a model's or a layer's forward, under either name; None without one.

    >>> cache_of({"past_key_values": 3}), cache_of({"cache": 4}), cache_of({})
    (3, 4, None)
    """
    found = arguments.get("cache")
    return arguments.get("past_key_values") if found is None else found
