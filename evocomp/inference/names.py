"""Resolve a name given to `compress`: a selector, a shipped compressor, a folder or a Hugging Face id."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evocomp.compressor.config import EvoCompConfig
from evocomp.log import UserError
from evocomp.mllm.hf import ASSETS
from evocomp.mllm.weights import reason
from evocomp.selection import SELECTORS

SHIPPED = {"nano": ASSETS / "nano_compressor"}
"""Compressors installed with the package: name -> folder with weights, configuration and model card (README.md)."""


def is_selector(name: str | Path) -> bool:
    """Whether a name is that of a training-free selector. To use a folder of the same name, give ./NAME."""
    return isinstance(name, str) and name in SELECTORS


def compressor_folder(name: str | Path) -> str | Path:
    """The folder of a shipped compressor; a folder or Hugging Face id is returned unchanged.

    Raises UserError for a name that is none of these.
    """
    if not isinstance(name, str):
        return name
    if name in SHIPPED:
        if not (SHIPPED[name] / "config.json").is_file():
            raise UserError(f"the compressor {name!r} is missing from this installation; install evocomp again")
        return SHIPPED[name]
    if not name or not (set(name) & set("/\\") or name[0] in ".~" or Path(name).exists()):
        raise UserError(unknown(name))
    return name


def unknown(name: str) -> str:
    """Error message for an unknown name."""
    near = difflib.get_close_matches(name, [*SELECTORS, *SHIPPED], n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return (
        f"{name!r} is no selector, shipped compressor or folder{hint}; selectors: {', '.join(SELECTORS)}; shipped "
        f"compressors: {', '.join(SHIPPED)}; else give a compressor's folder or its Hugging Face id (owner/name)"
    )


def check_name(name: str | Path) -> None:
    """Raise `UserError` unless `compress` accepts the name. Loads no weights."""
    if not is_selector(name):
        check_is_compressor(compressor_folder(name))


def check_is_compressor(path: str | Path) -> None:
    """Raise `UserError` unless a folder or hub id holds the configuration of a compressor."""
    folder = Path(path)
    if not (folder / "config.json").is_file() and (folder / "compressor" / "config.json").is_file():
        raise UserError(f"{path} holds a run; give its compressor: {folder / 'compressor'}")
    config, reason = {}, "the folder has no config.json"
    try:
        config = EvoCompConfig.get_config_dict(path)[0]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    if not folder.is_dir() and not config:
        # transformers treats a missing folder as a hub id, and its error would be about the form of the id
        may_be_id = not folder.is_absolute() and str(path)[0] not in ".~" and str(path).count("/") == 1
        reason = f"no such folder, and as a hub id: {reason}" if may_be_id else "no such folder"
    if not config:
        raise UserError(f"no compressor at {path}: {reason}; give RUN/compressor of a run, or train one: evocomp train")
    if not isinstance(config, dict):
        raise UserError(f"{path}/config.json holds no configuration; copy or train the compressor again")
    if config.get("model_type") != EvoCompConfig.model_type:
        raise UserError(
            f"{path} holds a model of type {config.get('model_type')!r}, not an EvoComp compressor; "
            "give the folder that EvoCompCompressor.save_pretrained wrote"
        )


@contextmanager
def weights_of(path: str | Path) -> Iterator[None]:
    """Turn errors of reading weights from a folder or hub id into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers raises whatever it meets in a foreign folder
        raise UserError(f"the weights in {path} cannot be read ({reason(error)}); copy or train them again") from None
