"""Evaluates a finished run: the panel of methods on test questions, and the report."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from evocomp import distributed
from evocomp.compressor.model import EvoCompCompressor
from evocomp.config.schema import RunConfig
from evocomp.data.example import Example
from evocomp.data.splits import digest, test_questions
from evocomp.evaluation.k_token_merging import k_token_outcomes
from evocomp.evaluation.outcome import Outcome, Questions
from evocomp.evaluation.page import write_report
from evocomp.evaluation.panel import Panel, Rival, picture
from evocomp.evaluation.progress import EvaluationProgress
from evocomp.evaluation.report import make_report
from evocomp.evaluation.request import GIVEN_CONTEXT, check_request, rows_of
from evocomp.evaluation.rivals.staged import staged_outcomes
from evocomp.evaluation.terminal import terminal
from evocomp.files import write_whole
from evocomp.inference import card
from evocomp.inference.names import weights_of
from evocomp.log import UserError, logger
from evocomp.mllm.features import first_image
from evocomp.mllm.hf import FrozenMLLM
from evocomp.mllm.unknown_words import texts_of, warn_of_unknown_words
from evocomp.selection import selector, selector_for_depth
from evocomp.viz import SheetItem, kept_sheet
from evocomp.viz.names import display_name

JUDGED = "judged.json"
"""File in a folder of --out that records the run and the questions of its report."""


def evaluate_run(
    run_dir: Path,
    out: Path | None = None,
    questions: int | None = None,
    seed: int | None = None,
    panel: str | None = None,
    source: str | None = None,
) -> list[dict]:
    """Run the panel on a run's compressor and write report.json, report.md, report.html and kept.png.

    Args:
        run_dir: run folder written by `evocomp train`.
        out: folder for the report; it must be empty or contain an earlier report of this run on the same questions.
            Default: the run folder.
        questions, seed: number and seed of the test questions, if they differ from the run's settings.
        panel: "basic" (references and simple selectors, the default), "full" (all selectors and methods), or names of
            selectors separated by commas. Only "full" runs methods that drop tokens between the layers of the LLM;
            they are slow, because they process one prompt at a time. `NAME+context` adds as many context tokens to a
            selector as the run's compressor has; if it has any, "full" includes several such rows.
        source: overrides `data.test_source`, to evaluate a run on several benchmarks.

    Returns:
        The rows of report.json.
    """
    config, names = check_request(run_dir, out, questions, seed, panel, source)
    out = out or run_dir
    is_own = out.resolve() == run_dir.resolve()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compressor = read_compressor(run_dir).to(device)
    distributed.set_threads(config.threads)
    data = config.data if source is None else replace(config.data, test_source=source)
    examples = test_questions(data, questions, seed)
    if not examples:
        raise UserError("this run has no test questions (data.test_samples=0); give --questions N and --out DIR")
    judged = json.dumps({"run": str(run_dir.resolve()), "questions": digest(examples)}, indent=1) + "\n"
    if not is_own:
        check_place(out, judged)
    mllm = FrozenMLLM.load(config.model.name, config.model.dtype, config.model.attention, device)
    mllm.max_bad = config.data.max_bad
    mllm.max_tokens = config.data.max_tokens
    warn_of_unknown_words(mllm.processor.tokenizer, texts_of(examples), config.model.name)
    others, remarks = siblings(config, run_dir, compressor)
    logger.info("evaluation on %d questions", len(examples))
    own = own_share(examples, distributed.rank(), distributed.world_size())
    batch, longest = config.eval.batch, config.eval.max_new_tokens
    with EvaluationProgress(rows_of(config, len(names), len(others))) as shown:
        judge = Panel(mllm, [examples[i] for i in own], batch, longest, report=shown.row)
        outcomes = all_outcomes(judge, config, {"evocomp": compressor, **others}, names, inside=panel == "full")
        if panel == "full":
            outcomes += k_token_outcomes(judge, run_dir, config.eval.kept)
        if distributed.world_size() > 1:
            shares = distributed.gather((own, outcomes))
            if distributed.rank():
                return []
            judge = Panel(mllm, examples, batch, longest)
            outcomes = together(shares)
            outcomes.insert(2, judge.wrong_image())  # needs the images of all ranks
    apart = questions_apart(judge, config.eval.apart)
    main = ~np.logical_or.reduce([*apart.values(), np.zeros(len(judge.questions), dtype=bool)])
    subject = f"run {run_dir} · model {config.model.name} · recipe {config.recipe}"
    settings = {"resamples": config.eval.resamples, "seed": config.seed, "subject": subject, "remarks": remarks}
    report = make_report(*part(outcomes, judge.questions, main), **settings)
    sheet = out / "kept.png"
    out.mkdir(parents=True, exist_ok=True)
    if not is_own:
        write_whole(out / JUDGED, judged.encode())
    draw_sheet(judge, outcomes, compressor, config.eval.sheet, middle(config.eval.kept), sheet)
    write_report(report, out, sheet)
    if is_own:
        columns = ("method", "kept", "accuracy", "low", "high", "relative", "n")
        card.save(compressor, run_dir / "compressor", panel=[{c: row[c] for c in columns} for row in report.rows])
    print(terminal(report))
    for kind, own in apart.items():
        title = f"Accuracy with fewer visual tokens: {kind} questions"
        special = make_report(*part(outcomes, judge.questions, own), title=title, **settings)
        write_report(special, out / folder_name(kind))
        print(f"\n{kind} questions, reported separately\n{terminal(special)}")
    logger.info("written: %s", out / "report.html")
    return report.rows


def folder_name(kind: str) -> str:
    """Name of a folder for a question type, which is text from the data and may hold anything.

    >>> folder_name("relation"), folder_name("../../x").startswith("kind-x-")
    ('relation', True)
    """
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", kind):
        return kind
    plain = re.sub(r"[^A-Za-z0-9]+", "-", kind).strip("-")[:32]
    return f"kind-{plain}-{hashlib.sha256(kind.encode('utf-8', 'replace')).hexdigest()[:8]}"


def own_share(examples: Sequence[Example], rank: int, world: int) -> list[int]:
    """Indices of the examples that a rank evaluates: all questions about every world-th image."""
    numbers = {image: number for number, image in enumerate(dict.fromkeys(one.image_id for one in examples))}
    return [i for i, one in enumerate(examples) if numbers[one.image_id] % world == rank]


def together(shares: Sequence[tuple[list[int], list[Outcome]]]) -> list[Outcome]:
    """Join the outcomes of ranks that evaluated different questions.

    A method is not applicable if any of the ranks could not run it.
    """
    order = np.argsort(np.concatenate([own for own, _ in shares]))
    found = []
    for parts in zip(*(outcomes for _, outcomes in shares), strict=True):
        refused = next((part for part in parts if part.not_applicable is not None), None)
        if refused is not None:
            found.append(refused)
            continue
        answers = [answer for part in parts for answer in part.answers]
        correct = np.concatenate([part.correct for part in parts])[order]
        found.append(replace(parts[0], correct=correct, answers=[answers[i] for i in order] if answers else []))
    return found


def questions_apart(judge: Panel, kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """Masks [n] of the question types with a separate report; types that none or all questions have are left out."""
    found = {kind: np.array(judge.questions.kinds) == kind for kind in kinds}
    return {kind: own for kind, own in found.items() if own.any() and not own.all()}


def read_compressor(run_dir: Path) -> EvoCompCompressor:
    """The trained compressor of a run. Raises `UserError` if its weights cannot be read or are not finite."""
    folder = run_dir / "compressor"
    with weights_of(folder):
        return EvoCompCompressor.from_pretrained(folder).eval()


def check_place(out: Path, judged: str) -> None:
    """Raise `UserError` unless a folder is empty or has a report on the same run and questions, which is replaced."""
    try:
        earlier = (out / JUDGED).read_text()
    except (OSError, UnicodeDecodeError):
        earlier = ""
    if earlier != judged and out.is_dir() and any(out.iterdir()):
        what = "a report of another run or on other questions" if earlier else "other files"
        raise UserError(f"--out={out} contains {what}; choose another folder")


def part(outcomes: Sequence[Outcome], questions: Questions, own: np.ndarray) -> tuple[list[Outcome], Questions]:
    """Outcomes and questions restricted to the questions in the mask `own` [n]."""

    def pick(values: Sequence) -> list:
        return [value for value, marked in zip(values, own, strict=True) if marked] if len(values) else []

    some = [
        outcome
        if outcome.not_applicable
        else replace(outcome, correct=np.asarray(outcome.correct)[own], answers=pick(outcome.answers))
        for outcome in outcomes
    ]
    return some, Questions(pick(questions.images), pick(questions.kinds), pick(questions.gold), pick(questions.prompts))


def siblings(
    config: RunConfig, run_dir: Path, own: EvoCompCompressor
) -> tuple[dict[str, EvoCompCompressor], list[str]]:
    """Compressors of the run folders in `eval.beside` by name (recipe), and remarks, also on missing ones."""
    found: dict[str, EvoCompCompressor] = {}
    remarks = [f"EvoComp is this run: recipe {config.recipe}, {run_dir}{_cost(run_dir)}."]
    for place in config.eval.beside:
        folder = Path(place)
        if not (folder / "compressor" / "config.json").is_file():
            remarks.append(f"{folder} (setting eval.beside) has not been trained yet and is skipped.")
            continue
        other = read_compressor(folder).to(own.device)
        if other.config.hidden_size != own.config.hidden_size:
            remarks.append(f"{folder} (setting eval.beside) is for another model and is skipped.")
            continue
        name = f"evocomp_{other.config.metadata.get('recipe', folder.name)}"
        name = name if name not in found else f"evocomp_{folder.name}"
        found[name] = other
        remarks.append(f"{display_name(name)} is {folder}{_cost(folder)}.")
    return found, remarks


def _cost(run_dir: Path) -> str:
    """The cost of a run as text."""
    try:
        cost = json.loads((run_dir / "trained.json").read_text())["cost"]
    except (OSError, KeyError, ValueError, TypeError):
        return ""
    try:
        parts = []
        for purpose, share in cost.items():
            if isinstance(share, dict):
                work = f"{share['forwards']:,} scored pairs, {share['flops'] / 1e12:.2f} TFLOP"
                parts.append(f"{purpose} {share['cpu_seconds']:.0f} CPU s ({work})")
        return f"; {cost['labelled']:,} labelled questions; " + ", ".join(parts)
    except (KeyError, TypeError, ValueError, AttributeError):
        return ""  # not what a run writes


@torch.inference_mode()
def all_outcomes(
    judge: Panel,
    config: RunConfig,
    compressors: dict[str, EvoCompCompressor],
    names: Sequence[str],
    inside: bool = False,
) -> list[Outcome]:
    """Outcomes of all methods of the panel at all numbers of kept tokens.

    `inside` adds methods that drop tokens between the layers of the LLM. With several ranks the reference "wrong image"
    is left out, because it needs the images of all ranks.
    """
    kept = config.eval.kept
    rivals = [Rival(selector("random_tokens"), "random", seed) for seed in range(config.eval.seeds)]
    rivals += [build_rival(name, judge.mllm, compressors["evocomp"].config.sharp) for name in names]
    outcomes = [judge.full(), judge.no_image()]
    if distributed.world_size() == 1:
        outcomes.append(judge.wrong_image())
    outcomes += [judge.downsampling(count) for count in kept]
    outcomes += judge.selectors(rivals, kept)
    if inside:
        outcomes += staged_outcomes(judge, kept)
    for name, compressor in compressors.items():
        outcomes += [judge.compressor(compressor, count, name) for count in kept]
    return outcomes


def build_rival(name: str, mllm: FrozenMLLM, sharp: float = 0.0) -> Rival:
    """A training-free selector with its published settings; layer indices are clamped to the depth of the LLM.

    Args:
        name: name of the selector, with the suffix `GIVEN_CONTEXT` to add context tokens.
        sharp: maximum number of selected tokens if context tokens are added.
    """
    plain = name.removesuffix(GIVEN_CONTEXT)
    method = selector_for_depth(plain, len(mllm.decoder.layers))
    return Rival(method, name, sharp=sharp if name != plain else 0.0)


def middle(kept: Sequence[int]) -> int:
    """The middle one of the numbers of kept tokens."""
    return sorted(kept)[len(kept) // 2]


def draw_sheet(
    judge: Panel, outcomes: Sequence[Outcome], compressor: EvoCompCompressor, count: int, kept: int, path: Path
) -> None:
    """Draw a sheet of images with the kept tokens highlighted, and below each image its question and both answers."""
    answers = {(o.method, o.kept): o.answers for o in outcomes if o.not_applicable is None}
    full = next(o.answers for o in outcomes if o.method == "full")
    ours = answers["evocomp", kept]
    shown = judge.compressor_tokens(compressor, kept)
    # one question for each image
    by_image: dict[str, list[int]] = {}
    for i, asked in enumerate(judge.asked):
        by_image.setdefault(asked.example.image_id, []).append(i)
    items = []
    for number, own in enumerate(list(by_image.values())[:count]):
        i = own[number % len(own)]  # vary the index, so that all question types appear
        asked = judge.asked[i]
        lit, grid = first_image(asked.features, shown[i].alone.cpu().numpy())
        items.append(
            SheetItem(
                image=picture(asked.example),
                kept=lit,
                context=first_image(asked.features, shown[i].merged.cpu().numpy())[0],
                grid=grid,
                question=asked.example.prompt,
                full_answer=full[i],
                answer=ours[i],
                gold=asked.example.answer,
            )
        )
    kept_sheet(items, path)


def read_rows(path: Path) -> list[dict]:
    """The rows of a report.json."""
    return json.loads(path.read_text())
