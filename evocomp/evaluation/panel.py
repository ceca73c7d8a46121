"""The panel: all methods answer the same questions with the same numbers of visual tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evocomp.compressor.keep import selected_count, shown_tokens
from evocomp.compressor.model import EvoCompCompressor
from evocomp.data.example import Example, image_groups
from evocomp.data.images import as_array
from evocomp.data.scoring import score_answer
from evocomp.evaluation.outcome import REFERENCE, WITH_CONTEXT, Outcome, Questions
from evocomp.evaluation.rivals.probes import Probes
from evocomp.log import UserError
from evocomp.mllm.context import Shown, shown, split
from evocomp.mllm.features import Features, grid_of, pad_right
from evocomp.mllm.hf import FrozenMLLM
from evocomp.mllm.reader import PictureKey, picture_key
from evocomp.selection.base import NotApplicable, SelectionInputs, Selector
from evocomp.selection.downsample import downsample


@dataclass
class Asked:
    """One question with the features that the frozen MLLM computed for it."""

    example: Example
    features: Features


@dataclass(frozen=True)
class Rival:
    """A training-free selector with its settings in the table.

    Attributes:
        method: the selector.
        label: name in the table.
        seed: seed of selectors that draw random numbers.
        note: note in the report.
        sharp: maximum number of selected tokens; the other kept tokens are context tokens, means of dropped tokens (see
            `evocomp.mllm.context.split`). This is our addition, a control for the effect of context tokens without
            training. 0: no context tokens, as published.
    """

    method: Selector
    label: str
    seed: int = 0
    note: str = ""
    sharp: float = 0.0


class Panel:
    """Runs methods on one set of questions.

    Args:
        mllm: the frozen model.
        examples: the questions; those whose images cannot be decoded are left out.
        batch: number of questions that are answered in one batch.
        max_new_tokens: largest number of tokens of an answer.
        report: called with the name of each row when it starts, to show progress.
    """

    def __init__(
        self,
        mllm: FrozenMLLM,
        examples: Sequence[Example],
        batch: int = 100,
        max_new_tokens: int = 8,
        report: Callable[[str], None] = lambda text: None,
    ):
        self.mllm = mllm
        self.batch = batch
        self.max_new_tokens = max_new_tokens
        self.report = report
        self.asked = [Asked(example, features) for example, features in mllm.readable(examples)]
        if not self.asked:
            raise UserError("none of the images of the questions can be decoded; check the data")
        self.probes = Probes(mllm)

    @property
    def questions(self) -> Questions:
        """The questions that all outcomes answer."""
        examples = [asked.example for asked in self.asked]
        group = image_groups(examples)
        return Questions(
            images=[group[e.names[0]] for e in examples],
            kinds=[e.kind or "all" for e in examples],
            gold=[e.answer for e in examples],
            prompts=[e.prompt for e in examples],
        )

    # ------------------------------------------------------------ references

    def full(self) -> Outcome:
        """All visual tokens, uncompressed."""
        return self._outcome("full", self._tokens(), lambda i, asked: _everything(asked.features), group=REFERENCE)

    def no_image(self) -> Outcome:
        """No visual token: the accuracy that the question alone allows."""

        def nothing(i: int, asked: Asked) -> Shown:
            visual = asked.features.visual
            return Shown(visual[:0], torch.zeros(0, dtype=torch.long, device=visual.device))

        return self._outcome("no_image", 0, nothing, group=REFERENCE)

    def wrong_image(self) -> Outcome:
        """All tokens of another question's image: the accuracy with an image that has no useful information."""
        by_size: dict[int, list[int]] = {}
        alone: list[int] = []
        for i, asked in enumerate(self.asked):
            by_size.setdefault(len(asked.features.visual), []).append(i)

        def other(i: int, asked: Asked) -> Shown:
            alike = by_size[len(asked.features.visual)]
            start = alike.index(i) + len(alike) // 2
            for step in range(len(alike)):
                candidate = self.asked[alike[(start + step) % len(alike)]]
                if not set(candidate.example.names) & set(asked.example.names):
                    return _everything(candidate.features)
            alone.append(i)
            return _everything(asked.features)

        outcome = self._outcome("wrong_image", self._tokens(), other, group=REFERENCE)
        if len(alone) == len(self.asked):
            return _not_applicable("wrong_image", self._tokens(), "no other image has the same number of tokens")
        note = f"{len(alone)} questions used their own image: no other one has as many tokens" if alone else ""
        return replace(outcome, note=note)

    # ------------------------------------------------------------ methods

    def downsampling(self, kept: int) -> Outcome:
        """The image downsampled before the vision tower, to at most `kept` tokens."""
        sizes: list[int] = []
        known: dict[str, Tensor] = {}

        def smaller(i: int, asked: Asked) -> Shown:
            grid = grid_of(asked.features)
            target = downsample(grid, kept, self.mllm.patch_size)
            if asked.example.image_id not in known:
                known[asked.example.image_id] = self.mllm.encode_resized(asked.example, target.size)
            tokens = known[asked.example.image_id]
            sizes.append(len(tokens))
            return Shown(tokens, _spread(grid, target.grid))

        try:
            outcome = self._outcome("downsampling", kept, smaller)
        except UserError as error:
            return _not_applicable("downsampling", kept, str(error))
        return replace(outcome, note=f"image resized to {max(sizes)} tokens (the largest size of at most {kept})")

    def selectors(self, methods: Sequence[Rival], kept: Sequence[int]) -> list[Outcome]:
        """Outcomes of training-free selectors at several numbers of kept tokens, applied before the LLM.

        Runs question by question, so that inputs that several selectors need (attention, keys) are computed once.
        """
        self.report(f"selecting with {len(methods)} selectors")
        chosen: dict[tuple[int, int], list[Shown]] = {}
        reasons: dict[int, str] = {}
        known: dict[tuple[int, int], tuple[PictureKey, Shown]] = {}
        for asked in self.asked:
            for number, rival in enumerate(methods):
                if number in reasons:
                    continue
                try:
                    for count in kept:
                        place, key = (number, count), picture_key(asked.example)
                        # depends neither on the question nor on random numbers: one selection for each image
                        by_image = not rival.method.text_aware and "generator" not in rival.method.needs
                        if not by_image or known.get(place, ("",))[0] != key:
                            known[place] = (key, self._select(rival, asked, count))
                        chosen.setdefault(place, []).append(known[place][1])
                except NotApplicable as error:
                    reasons[number] = str(error)
        outcomes = []
        for number, rival in enumerate(methods):
            for count in kept:
                if number in reasons:
                    outcomes.append(_not_applicable(rival.label, count, reasons[number]))
                    continue
                rows = chosen.pop((number, count))
                outcome = self._outcome(rival.label, count, lambda i, asked, rows=rows: rows[i])
                most = max(len(row.places) for row in rows)
                note = rival.note + (f"; {most} tokens at {count}" if most != count else "")
                outcome = replace(outcome, needs_llm=rival.method.needs_llm, note=note.lstrip("; "))
                outcomes.append(replace(outcome, group=WITH_CONTEXT) if rival.sharp else outcome)
        return outcomes

    def _select(self, rival: Rival, asked: Asked, kept: int) -> Shown:
        visual = asked.features.visual
        generator = torch.Generator().manual_seed((asked.example.id + rival.seed * 1_000_003) % 2**63)
        known = self.probes.gather(asked.example, asked.features, rival.method.needs)
        grid = grid_of(asked.features)
        inputs = SelectionInputs(tokens=visual, grid=grid, generator=generator, **known)
        count, context = split(min(kept, len(visual)), len(visual), rival.sharp)
        selection = rival.method(inputs, count)
        if selection.indices is not None:
            return shown(visual, selection.indices, context)
        if context:
            raise UserError(f"{rival.method.name} merges tokens itself; context tokens need one that drops tokens")
        order = selection.positions.argsort(stable=True)
        return Shown(selection.tokens[order], selection.positions[order])

    def given(self, label: str, kept: int, choose: Callable[[int, Asked, int], Tensor], sharp: float = 0.0) -> Outcome:
        """Outcome of a selection made by the caller, for instance an oracle that knows where the answer is.

        Args:
            choose: (index of the question, the question, R) -> indices [R] of the selected tokens.
            sharp: maximum number of selected tokens; see `Rival`.
        """

        def compressed(i: int, asked: Asked) -> Shown:
            total = len(asked.features.visual)
            count, context = split(min(kept, total), total, sharp)
            return shown(asked.features.visual, choose(i, asked, count), context)

        return self._outcome(label, kept, compressed, group=WITH_CONTEXT if sharp else "")

    @torch.no_grad()
    def chosen(self, rival: Rival, kept: int) -> list[Tensor]:
        """Indices [R] of the tokens that a training-free selector keeps, for each question.

        Raises:
            NotApplicable: the model does not provide an input of the selector.
        """
        return [self._select(rival, asked, kept).places for asked in self.asked]

    def compressor(self, compressor: EvoCompCompressor, kept: int, name: str = "evocomp") -> Outcome:
        """Outcome of a trained compressor with its own share of context tokens."""
        rows = self.compressor_tokens(compressor, kept)
        group = WITH_CONTEXT if compressor.config.sharp else ""
        return self._outcome(name, kept, lambda i, asked: rows[i], group)

    @torch.no_grad()
    def compressor_tokens(self, compressor: EvoCompCompressor, kept: int) -> list[Shown]:
        """The kept tokens of each question with a trained compressor."""
        compressor.eval()
        config = compressor.config
        found: list[Shown] = []
        for start in range(0, len(self.asked), self.batch):
            batch = self.asked[start : start + self.batch]
            part = [asked.features for asked in batch]
            visual, visual_mask = pad_right([f.visual.float() for f in part])
            prompt, prompt_mask = pad_right([self.mllm.prompt_embeds(f).float() for f in part])
            budgets = torch.tensor([float(selected_count(kept, len(f.visual), config)) for f in part])
            logits = compressor(
                visual,
                prompt,
                None if bool(prompt_mask.all()) else prompt_mask,
                None if bool(visual_mask.all()) else visual_mask,
                budget=budgets.to(visual.device) if config.budget_input else None,
            ).logits
            for row, asked in zip(logits, batch, strict=True):
                visual, order = asked.features.visual, None
                if config.hedge:
                    order = self.mllm.priority(asked.example, asked.features, config.hedge_by)
                found.append(shown_tokens(row[: len(visual)], visual, kept, config, order))
        return found

    # ------------------------------------------------------------ private

    def _tokens(self) -> int:
        return max(len(asked.features.visual) for asked in self.asked)

    def _outcome(self, method: str, kept: int, compressed: Callable[[int, Asked], Shown], group: str = "") -> Outcome:
        self.report(f"{method} at {kept}")
        answers: list[str] = []
        for start in range(0, len(self.asked), self.batch):
            part = self.asked[start : start + self.batch]
            prompts = [(asked.features, *compressed(start + i, asked)) for i, asked in enumerate(part)]
            texts, logits = self.mllm.answer(prompts, self.max_new_tokens)
            if bool(logits.isnan().any()):
                raise UserError(
                    f"the logits of {self.mllm.name} are not finite ({method} at {kept} tokens): its dtype overflows "
                    "or its weights are damaged; try model.dtype=float32"
                )
            answers.extend(texts)
        scores = [score_answer(asked.example, text) for asked, text in zip(self.asked, answers, strict=True)]
        return Outcome(method, kept, np.array(scores), answers, group=group)


def _everything(features: Features) -> Shown:
    return Shown(features.visual, torch.arange(len(features.visual), device=features.visual.device))


def _spread(grid: tuple[int, int], smaller: tuple[int, int]) -> Tensor:
    """Indices of the cells of `grid` that contain the centres of the cells of `smaller`, row-major."""
    rows = ((torch.arange(smaller[0]) + 0.5) * grid[0] / smaller[0]).long()
    columns = ((torch.arange(smaller[1]) + 0.5) * grid[1] / smaller[1]).long()
    return (rows[:, None] * grid[1] + columns).flatten()


def _not_applicable(method: str, kept: int, reason: str) -> Outcome:
    return Outcome(method, kept, np.zeros(0), not_applicable=reason)


def picture(example: Example) -> np.ndarray:
    """The first image of an example as pixels [height, width, 3], at most 448 pixels wide and high."""
    pixels = as_array(example.image)
    longest = max(pixels.shape[:2])
    if longest <= 448:
        return pixels
    scale = 448 / longest
    size = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
