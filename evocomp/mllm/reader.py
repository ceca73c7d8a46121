"""From examples to features: what the processor, the tower and the projector of a frozen MLLM make of them."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evocomp.data.example import Example
from evocomp.log import UserError
from evocomp.mllm import families
from evocomp.mllm.feature_cache import FeatureCache
from evocomp.mllm.features import Features
from evocomp.mllm.image_span import ImageSpan, find_image_span

_PROMPTS = 200_000  # tokenised prompts remembered; a few kilobytes each


class Reader:
    """Reads pictures and questions for a frozen MLLM, each picture once while there is room.

    Args:
        model: any supported `...ForConditionalGeneration`, or the same wrapped by PEFT.
        processor: its processor.
        name: what to call it in records.
        cache_bytes: room for encoded pictures; those used least recently are encoded again when asked for.

    Attributes:
        cache: where the tower's features lie on disk, if anywhere.
    """

    def __init__(self, model: torch.nn.Module, processor, name: str = "", cache_bytes: int = 2 * 1024**3):
        families.check_supported(model)
        self.model = families.unwrap(model).eval().requires_grad_(False)
        self.processor = processor
        self.name = name
        self.cache: FeatureCache | None = None
        self.cache_bytes = cache_bytes
        self._bytes = 0
        self._pictures: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._prompts: dict[int, tuple[tuple, Features]] = {}
        self._spans: dict[str, ImageSpan | None] = {}

    @property
    def device(self) -> torch.device:
        return self.model.get_decoder().device

    @property
    def hidden_size(self) -> int:
        return self.vocabulary.shape[1]

    @property
    def vocabulary(self) -> Tensor:
        """The LLM's input embedding table [V, D]."""
        return self.model.get_input_embeddings().weight

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> embeddings [..., D], as the LLM sees them."""
        return self.model.get_input_embeddings()(ids)

    @torch.no_grad()
    def features(self, examples: Sequence[Example]) -> list[Features]:
        """Encode examples; a picture that several of them ask about is encoded once.

        Pictures are encoded one at a time: the tower's share of all work is small, and a picture's features then
        never depend, not even in the last bit, on what was encoded beside it.

        Raises:
            UserError: an answer without tokens, or a processor without a chat template.
        """
        return [self._features(example) for example in examples]

    def _text(self, example: Example) -> tuple[str, bool]:
        """The prompt's text with the image's placeholder, and whether the tokenizer adds special tokens to it."""
        if getattr(self.processor, "chat_template", None) is None:
            raise UserError(f"the processor of {self.name} has no chat template; add chat_template.jinja to its folder")
        text = self.processor.apply_chat_template(_messages(example), add_generation_prompt=True, tokenize=False)
        bos = getattr(self.processor.tokenizer, "bos_token", None)
        # as transformers itself does: templates that write the start mark must not get a second one
        return text, not (bos and text.startswith(bos))

    def _inputs(self, key: str, example: Example) -> dict[str, Tensor]:
        """What the LLM and, for a new image, the vision tower read.

        The image processor takes most of the time, so it runs once for an image; see `image_span`.
        """
        span = self._spans.get(key)
        if span is not None and key in self._pictures:
            inputs = span.insert(self._text_ids(example))
            if inputs is not None:
                return inputs
        inputs = self._process(example)
        if key not in self._spans:
            self._spans[key] = self._find_span(example, inputs)
        return inputs

    def _find_span(self, example: Example, inputs: dict[str, Tensor]) -> ImageSpan | None:
        if getattr(self.processor, "image_token", None) is None:
            return None
        return find_image_span(self.processor, self._text_ids(example), inputs)

    def _text_ids(self, example: Example) -> list[int]:
        text, add_special_tokens = self._text(example)
        return self.processor.tokenizer(text, add_special_tokens=add_special_tokens).input_ids

    def _process(self, example: Example) -> dict[str, Tensor]:
        text, add_special_tokens = self._text(example)
        picture = example.image
        image = Image.open(picture) if isinstance(picture, str) else Image.fromarray(picture)
        try:
            inputs = self.processor(
                text=[text],
                images=[image.convert("RGB")],
                return_tensors="pt",
                add_special_tokens=add_special_tokens,
            )
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            what = f"example {example.id} ({example.prompt!r})"
            raise UserError(f"{what}: {self.name}'s processor refuses it: {reason}") from None
        return inputs.to(self.device)

    def _picture(self, key: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The picture's rows [N + M, D] and which of them are separators [N + M]; remembered while there is room."""
        if key in self._pictures:
            self._pictures.move_to_end(key)
            return self._pictures[key]
        inputs = {**inputs, "pixel_values": inputs["pixel_values"].to(self.vocabulary.dtype)}
        encoded = self.cache.encode(inputs) if self.cache else families.encode(self.model, inputs)
        rows = families.visual_tokens(self.model, inputs["input_ids"], encoded)
        self._pictures[key] = (rows, families.newline_rows(self.model, rows))
        self._bytes += rows.numel() * rows.element_size()
        while self._bytes > self.cache_bytes and len(self._pictures) > 1:
            gone, (old, _) = self._pictures.popitem(last=False)
            self._spans.pop(gone, None)
            self._bytes -= old.numel() * old.element_size()
        return self._pictures[key]

    def _features(self, example: Example) -> Features:
        key, asked = picture_key(example), (example.prompt, example.answer, example.history)
        known = self._prompts.get(example.id)
        if known is not None and known[0] == asked and key in self._pictures:
            return _with_picture(known[1], *self._picture(key, {}))
        inputs = self._inputs(key, example)
        rows, is_separator = self._picture(key, inputs)
        answer = self.processor.tokenizer(example.answer, add_special_tokens=False, return_tensors="pt").input_ids[0]
        if answer.numel() == 0:
            raise UserError(f"the answer {example.answer!r} of example {example.id} has no token; leave it out")
        at = families.visual_mask(self.model, inputs["input_ids"])[0].nonzero()[:, 0]
        if len(at) != len(rows):
            raise UserError(
                f"example {example.id}: {len(at)} placeholders in the prompt, {len(rows)} visual tokens; "
                "does its text hold an image token?"
            )
        positions = families.position_ids(self.model, inputs)
        features = Features(
            id=example.id,
            image_id=example.image_id,
            visual=rows[:0],  # the picture has a place of its own
            prompt_ids=inputs["input_ids"][0],
            visual_at=at[~is_separator],
            positions=positions[..., 0, :],
            answer_ids=answer.to(self.device),
            separators_at=at[is_separator] if is_separator.any() else None,
        )
        if len(self._prompts) >= _PROMPTS:
            self._prompts.clear()
        self._prompts[example.id] = (asked, features)
        return _with_picture(features, rows, is_separator)

    @property
    def patch_size(self) -> int:
        """Side of the square of pixels that becomes one visual token."""
        vision = getattr(self.model.config, "vision_config", None)
        return int(getattr(vision, "patch_size", 14)) * int(getattr(vision, "spatial_merge_size", 1) or 1)

    @torch.no_grad()
    def encode_resized(self, example: Example, size: tuple[int, int] | None) -> Tensor:
        """Visual tokens [n, D] of the picture at another size (height, width) [pixels]; None = the processor's own.

        Position embeddings are interpolated. Raises `UserError` if the tower cannot take other sizes.
        """
        settings = {}
        if size is not None:
            if self.model.config.model_type != "llava":
                raise UserError(f"{self.model.config.model_type}: pictures of other sizes are made for LLaVA only yet")
            # from the size that the model was made for, so that only resolution is lost
            settings = {"size": {"height": size[0], "width": size[1]}, "do_center_crop": False}
        image = Image.fromarray(as_array(example.image))
        pixels = self.processor.image_processor(image, return_tensors="pt", **settings)["pixel_values"]
        output = self.model.base_model.get_image_features(
            pixel_values=pixels.to(self.device, self.vocabulary.dtype),
            interpolate_pos_encoding=size is not None,
            return_dict=True,
        )
        return torch.cat(families.entries(output))


def _with_picture(features: Features, rows: Tensor, is_separator: Tensor) -> Features:
    """Features with the rows [N + M, D] of their picture, sorted into visual tokens and separators."""
    if features.separators_at is None:
        return replace(features, visual=rows)
    return replace(features, visual=rows[~is_separator], separators=rows[is_separator])


def _messages(example: Example) -> list[dict]:
    """The conversation up to this turn; the picture goes with its first question."""
    questions = [question for question, _ in example.history] + [example.prompt]
    messages = []
    for number, question in enumerate(questions):
        content = [{"type": "image"}] if number == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        if number < len(example.history):
            answer = example.history[number][1]
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def picture_key(example: Example) -> str:
    """What a picture is remembered by: its file, for pictures of one name may lie in several folders."""
    return example.image if isinstance(example.image, str) else example.image_id


def as_array(image: str | np.ndarray) -> np.ndarray:
    """The picture as pixels [height, width, 3] uint8."""
    if isinstance(image, np.ndarray):
        return image
    with Image.open(image) as opened:
        return np.asarray(opened.convert("RGB"))
