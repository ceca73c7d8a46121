"""Build a frozen `RunConfig` from YAML files and the command line; each error is one line."""

import difflib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evocomp.config import options
from evocomp.config.recipes import RECIPES
from evocomp.config.schema import RunConfig
from evocomp.log import UserError

SHIPPED = Path(__file__).resolve().parent.parent / "experiments"
"""In a checkout, a link to its folder `experiments`; in an installed package, a folder of files."""


NOT_SETTINGS = (OmegaConfBaseException, ValueError, TypeError, IndexError, RecursionError)
"""What OmegaConf and YAML raise, beside errors of syntax, for text that does not hold settings."""
_DEEPEST = 50


def shipped() -> list[str]:
    """Names of the configuration files that are installed with the package, for `--config NAME`."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load(files: Sequence[str | Path] = (), settings: Sequence[str] = ()) -> RunConfig:
    """Merge defaults, the recipe's settings, the YAML files in order and then `settings`; resolve, check and freeze.

    The recipe is the last one named in a file or on the command line.

    Args:
        files: YAML files, or names of installed ones (see `shipped`).
        settings: items of the form `section.key=value`.

    Raises:
        UserError: unknown key (with a suggestion), wrong type, invalid value, unreadable file.

    >>> load(settings=["search.population=24", "eval.kept=[16,8]"]).eval.kept
    (16, 8)
    """
    changes = [(_read(_find(file)), str(file)) for file in files]
    changes += [(_setting(setting), "command line") for setting in settings]
    recipe = next((str(node["recipe"]) for node, _ in reversed(changes) if "recipe" in node), RunConfig.recipe)
    config = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(RunConfig), RECIPES.get(recipe, {})))
    for node, origin in changes:
        config = _merge(config, node, origin)
    try:
        return cast(RunConfig, OmegaConf.to_object(config))  # resolves ${...} on the way
    except RecursionError:
        raise UserError("settings refer to one another without an end") from None
    except OmegaConfBaseException as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(_one_line(error)) from None


def load_saved(folder: Path) -> RunConfig:
    """The settings that a run saved. Raises UserError for a file that was emptied or is no longer whole."""
    path = folder / "config.yaml"
    if "run_dir" not in _read(path):
        raise UserError(f"{path} no longer holds the settings of a run; restore it, or choose another --run_dir")
    return load([path])


def save(config: RunConfig, path: Path) -> None:
    """Write the resolved config as YAML."""
    OmegaConf.save(OmegaConf.structured(config), path)


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved config as plain nested dictionaries."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def _find(file: str | Path) -> Path:
    """The file of this name, else the installed configuration of this name."""
    path = Path(file)
    if path.is_file():
        return path
    if path.name == str(file) and (SHIPPED / f"{path.name.removesuffix('.yaml')}.yaml").is_file():
        return SHIPPED / f"{path.name.removesuffix('.yaml')}.yaml"
    near = difflib.get_close_matches(path.stem, shipped(), 1)
    hint = f"did you mean {near[0]}?" if near else f"give a YAML file, or one of {', '.join(shipped())}"
    raise UserError(f"--config={file}: no such file and no configuration of this name is installed; {hint}")


def _read(path: Path) -> DictConfig:
    try:
        content = OmegaConf.load(path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: not valid YAML ({problem})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); give a file with settings") from None
    except NOT_SETTINGS as error:
        raise UserError(f"{path}: does not hold settings ({_reason(error)})") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"{path}: must hold settings (key: value), not a {type(content).__name__}")
    return content


def _setting(text: str) -> DictConfig:
    key, _, value = text.partition("=")
    try:
        return OmegaConf.from_dotlist([f"{key}={value}"])
    except (OmegaConfBaseException, yaml.YAMLError):
        return _plain_setting(key, value)
    except NOT_SETTINGS as error:
        raise _not_understood(key, value, error) from None


def _plain_setting(key: str, value: str) -> DictConfig:
    """A setting whose value is text, though it looks like YAML."""
    try:
        return OmegaConf.create(_nested(key.split("."), value))
    except NOT_SETTINGS as error:
        raise _not_understood(key, value, error) from None


def _not_understood(key: str, value: str, error: Exception) -> UserError:
    return UserError(f"command line: {_short(key)}={_short(value)} is not understood ({_reason(error)})")


def _merge(config: DictConfig, change: DictConfig, origin: str) -> DictConfig:
    try:
        leaves = dict(_leaves(OmegaConf.to_container(change)))
    except NOT_SETTINGS as error:
        raise UserError(f"{origin}: {_reason(error)}") from None
    keys = list(leaves)
    for key in keys:
        check_known(key, origin)
        if leaves[key] == "???":  # OmegaConf takes it for a value that is still missing, and keeps the default
            raise UserError(f"{origin}: {key}=??? is not a value")
    try:
        return cast(DictConfig, OmegaConf.merge(config, change))
    except OmegaConfBaseException as error:
        text = _one_line(error)
        # OmegaConf does not always name the key; a setting of the command line has a single one
        named = text if len(keys) != 1 or text.startswith(keys[0]) else f"{keys[0]}: {text}"
        raise UserError(f"{origin}: {named}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{origin}: {keys[0] if len(keys) == 1 else 'settings'}: {_reason(error)}") from None


@cache
def _known() -> list[str]:
    """Dotted keys of all settings; cached, because a saved run checks about a hundred keys."""
    return [setting.key for setting in options.settings()]


def check_known(key: str, origin: str) -> None:
    """Raise `UserError`, with a suggestion, unless a setting or a section has this dotted key."""
    known = _known()
    sections = {name.rsplit(".", depth)[0] for name in known for depth in range(1, name.count(".") + 1)}
    if key in known or key in sections or key.startswith("trainer."):
        return
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    if not near:
        near = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    hint = f"did you mean {near[0]}?" if near else "evocomp config lists them"
    raise UserError(f"{origin}: unknown setting {_short(key)}; {hint}")


def _leaves(tree: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values."""
    if depth > _DEEPEST:
        raise ValueError(f"{_short(prefix)} lies more than {_DEEPEST} levels deep")
    if isinstance(tree, dict) and (tree or not prefix):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    else:
        yield prefix, tree


def _short(text: str) -> str:
    """Text for a message: on one line, of limited length, and printable."""
    text = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 80 else f"{text[:77]}..."


def _reason(error: BaseException) -> str:
    if isinstance(error, OmegaConfBaseException):
        return _one_line(error)
    if isinstance(error, RecursionError):
        return "settings lie too deeply within one another"
    return _short(str(error)) or type(error).__name__


def _nested(path: list[str], value: str) -> dict[str, Any]:
    return {path[0]: _nested(path[1:], value)} if len(path) > 1 else {path[0]: value}


def _one_line(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", "") or ""
    text = re.sub(r"\s+", " ", str(error).split("full_key")[0]).strip()
    if "$VALUE" in text:  # OmegaConf leaves its template unfilled for items of a tuple
        text = f"an item has the wrong type ({text.rsplit(' ', 1)[-1].lower()} expected)"
    text = f"{key}: {text}" if key else text
    return text if len(text) <= 400 else f"{text[:397]}..."
