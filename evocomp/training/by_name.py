"""Callbacks and loggers that a configuration names by import path, as LightningCLI does.

trainer:
  callbacks:
    - class_path: lightning.pytorch.callbacks.EarlyStopping
      init_args: {monitor: accuracy/mean, mode: max, patience: 3}
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from evocomp.log import UserError

KINDS: dict[str, type] = {"callbacks": Callback, "logger": Logger}
"""Key below `trainer:` -> the class that its entries inherit from."""

_HOMES = {"callbacks": "lightning.pytorch.callbacks", "logger": "lightning.pytorch.loggers"}


def named_classes(key: str, entries: Any) -> list[tuple[type, dict[str, Any]]]:
    """Class and arguments of each entry of `trainer.KEY`; a single entry need not be a list.

    Args:
        key: "callbacks" or "logger".
        entries: mappings with `class_path` (a name without dots is one of Lightning's) and, optionally, `init_args`.

    Raises:
        UserError: an entry that is none, a path that leads nowhere, or a class of another kind.
    """
    listed = entries if isinstance(entries, list | tuple) else [entries]
    return [_named_class(key, entry) for entry in listed]


def create(key: str, entries: Any) -> list[Any]:
    """The objects that `trainer.KEY` describes.

    Raises:
        UserError: as `named_classes`, and arguments that the class refuses.
    """
    made = []
    for cls, arguments in named_classes(key, entries):
        try:
            made.append(cls(**arguments))
        except ModuleNotFoundError as error:
            raise UserError(f"trainer.{key}: {cls.__name__} needs a package that is not installed: {error}") from None
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise UserError(f"trainer.{key}: {cls.__name__}: {' '.join(str(error).split())}") from None
    return made


def _named_class(key: str, entry: Any) -> tuple[type, dict[str, Any]]:
    example = f"{{class_path: {_HOMES[key]}.NAME, init_args: {{...}}}}"
    if not isinstance(entry, Mapping) or not isinstance(entry.get("class_path"), str):
        hint = "; to log nothing, give --logger=none" if entry is False and key == "logger" else ""
        raise UserError(f"trainer.{key}: {entry!r} is no {example}{hint}")
    if unknown := sorted(set(entry) - {"class_path", "init_args"}):
        raise UserError(f"trainer.{key}: unknown key {unknown[0]}; write {example}")
    arguments = entry.get("init_args") or {}
    if not isinstance(arguments, Mapping):
        raise UserError(f"trainer.{key}: init_args of {entry['class_path']} must be names with values")
    return _find(key, entry["class_path"]), dict(arguments)


def _find(key: str, path: str) -> type:
    module, _, name = (path if "." in path else f"{_HOMES[key]}.{path}").rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"trainer.{key}: class_path={path} cannot be imported: {error}") from None
    if not isinstance(found, type) or not issubclass(found, KINDS[key]):
        raise UserError(f"trainer.{key}: {path} is no {KINDS[key].__name__} of Lightning")
    return found
