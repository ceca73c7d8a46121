"""Checks the request for an evaluation (run, panel, output folder) before torch is imported."""

import json
from pathlib import Path

from evocomp.config import load as config_files
from evocomp.config.schema import RunConfig
from evocomp.log import UserError

BASIC = ("uniform_stride", "average_pool", "cls_attention", "divprune")
FULL = (
    *BASIC,
    "tome",
    "prumerge",
    "prumerge_plus",
    "hired",
    "visionzip",
    "vispruner",
    "fastv",
    "sparsevlm",
    "pyramiddrop",
    "dart",
)
GIVEN_CONTEXT = "+context"
"""Suffix of a selector's name that adds context tokens to it: a control for their effect without training."""


def check_request(
    run_dir: Path,
    out: Path | None = None,
    questions: int | None = None,
    seed: int | None = None,
    panel: str | None = None,
    source: str | None = None,
) -> tuple[RunConfig, tuple[str, ...]]:
    """The settings of a run and the names of the panel's selectors; see `evocomp.evaluation.run.evaluate_run`.

    Raises:
        UserError: the run has no compressor, a selector is unknown, or questions other than the run's own are requested
            without `out`.
    """
    config = config_files.load_saved(run_dir)
    compressor = run_dir / "compressor" / "config.json"
    if not compressor.is_file():
        raise UserError(f"{run_dir} has no trained compressor; finish it: evocomp train --config {run_dir}/config.yaml")
    is_own = out is None or out.resolve() == run_dir.resolve()
    if is_own and (questions is not None or seed is not None or source is not None):
        raise UserError("a report on questions other than the run's own needs its own folder: give --out DIR")
    return config, panel_names(panel or "basic", _has_context_tokens(compressor))


def _has_context_tokens(compressor: Path) -> bool:
    try:
        return bool(json.loads(compressor.read_text()).get("sharp", 0))
    except (OSError, ValueError, AttributeError, RecursionError):
        raise UserError(f"{compressor} cannot be read; restore it, or train the run again") from None


def panel_names(panel: str, context: bool = False) -> tuple[str, ...]:
    """Names of the selectors of a panel.

    Args:
        panel: "basic", "full", or names separated by commas.
        context: whether the compressor of the run has context tokens.

    Raises:
        UserError: a name is unknown or cannot be used.
    """
    if panel in ("basic", "full"):
        with_context = ("random_tokens", "uniform_stride", "cls_attention", "divprune")
        controls = tuple(f"{name}{GIVEN_CONTEXT}" for name in with_context)
        return BASIC if panel == "basic" else FULL + controls * context
    names = tuple(panel.split(","))
    if "cdpruner" in names:
        raise UserError(
            f"--panel={panel}: cdpruner compares image and question in CLIP's joint space, but MLLMs do not contain "
            "CLIP's text tower; leave it out, or call evocomp.selection.selector('cdpruner') with SelectionInputs that "
            "contain clip_image_embeds and clip_text_embeds"
        )
    unknown = [name for name in names if name.removesuffix(GIVEN_CONTEXT) not in (*FULL, "random_tokens")]
    if not unknown and not context and any(name.endswith(GIVEN_CONTEXT) for name in names):
        raise UserError(f"--panel={panel}: this run's compressor has no context tokens; leave out {GIVEN_CONTEXT}")
    if unknown:
        raise UserError(
            f"--panel={panel}: {unknown[0]!r} is unknown; choose basic, full, or names from random_tokens, "
            f"{', '.join(FULL)}"
        )
    return names


def rows_of(config: RunConfig, methods: int, others: int = 0) -> int:
    """Number of rows of a table: three references, and every method at every number of kept tokens.

    Args:
        methods: number of selectors of the panel, without the compressor, image downsampling and random tokens.
        others: number of compressors of other runs.
    """
    return 3 + len(config.eval.kept) * (2 + config.eval.seeds + methods + others)
