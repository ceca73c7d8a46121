"""Rules of the architecture, checked in the source code: which package may import which, and size limits."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "evocomp"

# a package imports only packages of lower tiers
TIERS = [
    ("config", "log", "files", "launch", "distributed", "progress"),
    ("ops", "data", "selection"),
    ("viz",),
    ("mllm", "grouping", "losses", "compressor"),
    ("scoring", "search"),
    ("labels", "inference"),
    ("runs",),
    ("training", "evaluation", "bench"),
    ("arguments",),
    ("cli",),
]
TIER = {part: tier for tier, parts in enumerate(TIERS) for part in parts}

# exceptions within a tier, with reasons
ALLOWED = {
    ("config", "log"): "errors in settings are `UserError`s",
    ("launch", "log"): "the start and the failure of worker processes are logged",
    ("distributed", "launch"): "processes that share the cores of a CPU have one thread each",
    ("distributed", "log"): "ranks without heartbeat are logged",
    ("progress", "log"): "messages and progress bars share one terminal",
    ("compressor", "mllm"): "the layer is copied from the target's decoder, which the table of families finds",
}

# which modules may import a third-party library: patterns of paths below evocomp/
OUTSIDE = {
    "lightning": r"training/.*",
    "pytorch_lightning": r"(?!)",
    "torchmetrics": r"training/.*|evaluation/.*",
    "torch.distributed": r"distributed/.*|training/.*",
    "transformers": r"mllm/.*|scoring/.*|compressor/.*|inference/.*",
    "peft": r"mllm/.*|compressor/.*|inference/.*",
    "triton": r"ops/[^/]*/triton\.py",
    "omegaconf": r"config/.*",
    "matplotlib": r"viz/.*|viz\.py",
    "lmms_eval": r"evaluation/.*",
}


def imports(tree: ast.AST, module: str, is_package: bool) -> list[tuple[str, int]]:
    """Every module that the source imports, anywhere (also in functions and under TYPE_CHECKING), with its line.

    `from a import b` gives both a and a.b: b may be a module.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                inside = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*inside, *([base] if base else [])])
            found += [(base, node.lineno)]
            found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            found += _named_by_call(node)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            found += [("torch.distributed", node.lineno)]
    return found


def _name(function: ast.AST) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def _named_by_call(node: ast.Call) -> list[tuple[str, int]]:
    """import_module("a.b") or import_module(f"a.b.{c}"): the constant beginning."""
    first = node.args[0]
    if isinstance(first, ast.JoinedStr):
        first = first.values[0]
    text = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""
    return [(text.rstrip("."), node.lineno)]


@cache
def sources() -> list[tuple[Path, str, ast.AST]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found.append((path, module, ast.parse(path.read_text())))
    return found


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def forbidden(module: str, target: str) -> str | None:
    """Why `module` may not import `target`; None if it may."""
    here, there = part_of(module), part_of(target)
    if not target.startswith("evocomp.") or there not in TIER or here == there:
        return None
    if here in ("", "__main__"):
        return None if module == "evocomp.__main__" and there == "cli" else "the package itself imports nothing at once"
    if here not in TIER:
        return f"{here} has no place among the tiers of this test"
    if TIER[there] < TIER[here] or (here, there) in ALLOWED:
        return None
    return f"{there} is not below {here}"


def test_packages_import_only_lower_tiers():
    wrong = set()
    for path, module, tree in sources():
        for target, line in imports(tree, module, path.name == "__init__.py"):
            if reason := forbidden(module, target):
                wrong.add(f"{path.relative_to(ROOT)}:{line} imports {target}: {reason}")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_cycle_between_modules():
    modules = {module for _, module, _ in sources()}
    imported = {}
    for path, module, tree in sources():
        targets = {target for target, _ in imports(tree, module, path.name == "__init__.py")} & modules
        # `from package import module` needs the module; it needs the package only for other names
        packages = {target.rpartition(".")[0] for target in targets}
        imported[module] = {t for t in targets if t not in packages or not module.startswith(f"{t}.")} - {module}
    while leaves := [module for module, targets in imported.items() if not targets & imported.keys()]:
        for module in leaves:
            del imported[module]
    assert not imported, f"cycle among {sorted(imported)}"


def test_every_exception_is_in_use():
    used = set()
    for path, module, tree in sources():
        for target, _ in imports(tree, module, path.name == "__init__.py"):
            if target.startswith("evocomp."):
                used.add((part_of(module), part_of(target)))
    assert set(ALLOWED) <= used


def test_every_package_has_a_tier():
    parts = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert parts - {"__init__", "__main__"} <= TIER.keys()


@pytest.mark.parametrize("library", OUTSIDE)
def test_libraries_are_imported_only_where_allowed(library):
    wrong = set()
    for path, module, tree in sources():
        inside = path.relative_to(PACKAGE).as_posix()
        for target, line in imports(tree, module, path.name == "__init__.py"):
            if (target == library or target.startswith(f"{library}.")) and not re.fullmatch(OUTSIDE[library], inside):
                wrong.add(f"evocomp/{inside}:{line} imports {library}")
    assert not wrong, "\n".join(sorted(wrong))


def test_public_names_lead_to_modules_that_define_them():
    import importlib

    import evocomp

    for name, module in evocomp._PUBLIC.items():
        assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"


def test_no_module_is_a_collection_of_utilities():
    names = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert [str(p) for p in PACKAGE.rglob("*") if p.stem in names] == []


def tracked() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


# concatenated, so that this file does not contain them
HOMES = ["/" + "work/", "/" + r"home/\w", "/" + r"Users/\w", r"[A-Z]:\\" + r"Users\\", "/" + "root/"]
MACHINE_PATHS = re.compile("|".join(HOMES))


def test_no_tracked_file_names_a_path_of_some_machine():
    wrong = []
    for path in tracked():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        name = path.relative_to(ROOT)
        wrong += [f"{name}:{i}: {line}" for i, line in enumerate(lines, 1) if MACHINE_PATHS.search(line)]
    assert not wrong, "\n".join(wrong)


def test_the_nano_assets_are_small_enough_to_ship():
    sizes = {p.relative_to(PACKAGE): p.stat().st_size for p in (PACKAGE / "assets").rglob("*") if p.is_file()}
    assert sizes and max(sizes.values()) < 4_000_000 and sum(sizes.values()) < 7_000_000, sizes


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("evocomp.search.run", "def f():\n    from evocomp.labels import store", "evocomp.labels"),
        ("evocomp.search.run", "if TYPE_CHECKING:\n    import evocomp.training.module", "evocomp.training.module"),
        ("evocomp.search.run", "from ..labels.store import LabelStore", "evocomp.labels.store"),
        ("evocomp.search.run", "from evocomp import labels", "evocomp.labels"),
        ("evocomp.search.run", "import_module(f'evocomp.labels.{x}')", "evocomp.labels"),
        ("evocomp.losses.ghm", "from evocomp.grouping import groups", "evocomp.grouping"),
    ],
)
def test_hidden_imports_are_found(module, source, expected):
    found = [target for target, _ in imports(ast.parse(source), module, is_package=False)]
    assert expected in found
    assert any(forbidden(module, target) for target in found)
