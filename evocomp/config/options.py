"""Settings as command-line options: `--section.key` for each, with choices, default and description."""

import argparse
import ast
import inspect
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from evocomp.config import schema
from evocomp.config.schema import RunConfig

COMMON = (
    "recipe",
    "run_dir",
    "seed",
    "model.name",
    "model.dtype",
    "data.source",
    "data.max_samples",
    "data.val_samples",
    "data.test_samples",
    "labels.dir",
    "labels.overwrite",
    "labels.batch",
    "compressor.init",
    "optim.lr",
    "optim.batch_size",
    "eval.kept",
    "trainer",
)
"""Settings that the short help shows."""

TITLES = {
    "": "run",
    "model": "model (the frozen multimodal LLM)",
    "data": "data (questions and images)",
    "grouping": "grouping (groups of visual tokens, for searched labels)",
    "search": "search (masks of kept tokens, for searched labels)",
    "labels": "labels (what the compressor learns from)",
    "scorer": "scorer (speed of scoring; losses change by rounding only)",
    "compressor": "compressor (the network that is trained)",
    "loss": "loss",
    "optim": "optim (optimizer and schedule)",
    "eval": "eval (the evaluation after training)",
}
SECTIONS = tuple(title for title in TITLES if title)


@dataclass(frozen=True)
class Setting:
    """One leaf of `RunConfig`: dotted key, type, default, and the docstring that follows it in the schema."""

    key: str
    kind: Any
    default: Any
    meaning: str

    @property
    def section(self) -> str:
        """The part before the first dot; empty for settings of the run itself."""
        return self.key.partition(".")[0] if "." in self.key else ""

    @property
    def placeholder(self) -> str:
        """Placeholder of the value in the help text."""
        if typing.get_origin(self.kind) is typing.Literal:
            return "NAME"
        if typing.get_origin(self.kind) is tuple:
            return "LIST"
        return {int: "N", float: "X", bool: "BOOL"}.get(self.kind, "TEXT")

    @property
    def help(self) -> str:
        """Description, choices and default in one paragraph."""
        choices = typing.get_args(self.kind) if typing.get_origin(self.kind) is typing.Literal else ()
        listed = f" Choices: {', '.join(choices)}." if choices else ""
        default = f" (default: {readable(self.default)})" if self.default not in (None, {}) else ""
        return f"{self.meaning}{listed}{default}"


def settings(cls: type = RunConfig, prefix: str = "") -> Iterator[Setting]:
    """All settings, in the order of the schema."""
    kinds, texts = typing.get_type_hints(cls), _attribute_docstrings(cls.__name__)
    for item in fields(cls):
        default = item.default_factory() if callable(item.default_factory) else item.default
        if is_dataclass(default):
            yield from settings(type(default), f"{prefix}{item.name}.")
        else:
            yield Setting(f"{prefix}{item.name}", kinds[item.name], default, texts.get(item.name, ""))


def readable(value: Any) -> str:
    """A value in command-line syntax, floats with three digits.

    >>> readable((1 / 18, 4)), readable(True), readable(2e-3)
    ('[0.0556,4]', 'true', '0.002')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, tuple):
        return f"[{','.join(map(readable, value))}]"
    return str(value)


def add_settings(parser: argparse.ArgumentParser, words: Sequence[str], shown: str = "common") -> None:
    """Add all settings to a parser; given ones are collected in the namespace's `settings` as `key=value`.

    Args:
        words: words of the command line; arguments of Lightning's Trainer (`trainer.NAME`, with or without
            dashes) become options too.
        shown: which settings the help shows: "common", "all", or one section.
    """
    parser.set_defaults(settings=())
    groups = {section: parser.add_argument_group(title) for section, title in TITLES.items()}
    for setting in settings():
        visible = shown == "all" or shown == (setting.section or "run") or (shown == "common" and setting.key in COMMON)
        group = groups[setting.section]
        name = "trainer.NAME" if setting.key == "trainer" else setting.key  # its entries are options, not itself
        _add(group, name, setting.placeholder, setting.help if visible else argparse.SUPPRESS)
    for name in sorted({found[1] for word in words if (found := re.match(r"(?:--)?(trainer\.[\w.]+)(=|$)", word))}):
        _add(parser, name, "TEXT", argparse.SUPPRESS)


def with_dashes(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Rewrite `key=value` as `--key=value`, unless it is the value of the preceding option."""
    known = parser._option_string_actions
    found = []
    for before, word in zip(["", *words], words, strict=False):
        takes_value = before.startswith("--") and "=" not in before
        takes_value = takes_value and (before not in known or known[before].nargs != 0)
        found.append(f"--{word}" if not takes_value and re.match(r"[a-z_][\w.]*=", word) else word)
    return found


def _add(group: argparse._ActionsContainer, key: str, placeholder: str, text: str) -> None:
    # a key without a value means true
    text = text if text is argparse.SUPPRESS else text.replace("%", "%%")
    group.add_argument(f"--{key}", nargs="?", const="true", metavar=placeholder, help=text, action=_Collect)


class _Collect(argparse.Action):
    """Collects settings in the given order, because later ones override earlier ones."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.settings = (*namespace.settings, f"{(option_string or '')[2:]}={values}")


@cache
def _schema() -> ast.Module:
    return ast.parse(inspect.getsource(schema))


def _attribute_docstrings(name: str) -> dict[str, str]:
    """The string that follows each field of a class in the source of `schema.py`."""
    body = next(node.body for node in _schema().body if isinstance(node, ast.ClassDef) and node.name == name)
    found = {}
    for here, after in zip(body, body[1:], strict=False):
        if isinstance(here, ast.AnnAssign) and isinstance(here.target, ast.Name) and isinstance(after, ast.Expr):
            found[here.target.id] = " ".join(ast.literal_eval(after.value).split())
    return found
