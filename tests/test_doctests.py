"""The examples in docstrings give their stated output."""

import doctest
import importlib
from pathlib import Path

import pytest

import evocomp

PACKAGE = Path(evocomp.__file__).resolve().parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed


def test_the_public_entry_points_have_an_example():
    from evocomp.config.load import load
    from evocomp.data.scenes import draw_scene
    from evocomp.grouping.groups import Groups
    from evocomp.selection.top_r import top_r

    for thing in (evocomp.compress, evocomp.FrozenMLLM, evocomp.LabelStore, Groups, draw_scene, load, top_r):
        assert ">>> " in (thing.__doc__ or ""), thing
