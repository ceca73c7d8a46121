"""Encodes examples with the processor, the vision tower and the projector of a frozen MLLM."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from evocomp.data.example import Example
from evocomp.data.images import BrokenImage, as_array, is_base64, read_image
from evocomp.log import UserError, logger
from evocomp.mllm import families
from evocomp.mllm.feature_cache import FeatureCache
from evocomp.mllm.features import Features
from evocomp.mllm.image_span import ImageSpan, find_image_span
from evocomp.mllm.observe import ClipTower, TowerObserver
from evocomp.selection.priority import priority_order

__all__ = ["PictureKey", "Reader", "as_array", "picture_key"]

PictureKey = str | tuple[str, ...]
"""Cache key of an image, or of the several images of a question."""

_PROMPTS = 200_000  # tokenised prompts remembered; a few kilobytes each
_MOST_CHARACTERS = 64  # a token has; no vocabulary in use has longer words


class EncodedImage(NamedTuple):
    """What the vision tower and the projector make of an image, or of several images of a question together.

    rows: visual tokens and separators [N + M, D]
    is_separator: which of them are separators [N + M]
    counts: visual tokens of each image, empty for one image
    deepstack: what the first decoder layers add to the visual tokens [layers, N, D], None: nothing
    """

    rows: Tensor
    is_separator: Tensor
    counts: tuple[int, ...]
    deepstack: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that the features hold."""
        return self.rows.nbytes + (0 if self.deepstack is None else self.deepstack.nbytes)


class Reader:
    """Encodes images and questions for a frozen MLLM, with a least-recently-used cache of encoded images.

    Args:
        model: any supported `...ForConditionalGeneration`, also wrapped by PEFT.
        processor: its processor.
        name: the model's name in records and messages.
        cache_bytes: size of the cache of encoded images [bytes].

    Attributes:
        cache: where the tower's features lie on disk, if anywhere.
        priority_by: name of the order that features carry as `priority`; empty: none. See `evocomp.selection.priority`.
        max_bad: records with an image that does not decode that are left out before `leave_out` gives up.
        max_tokens: longest prompt with its answer; 0: the positions that the LLM was made for.
    """

    def __init__(self, model: torch.nn.Module, processor, name: str = "", cache_bytes: int = 2 * 1024**3):
        families.check_supported(model)
        self.model = families.unwrap(model).eval().requires_grad_(False)
        self.processor = processor
        self.name = name
        self.cache: FeatureCache | None = None
        self.priority_by = ""
        self.cache_bytes = cache_bytes
        self.max_bad = 10
        self.max_tokens = 0
        self._left_out: set[str] = set()
        self._bytes = 0
        self._pictures: OrderedDict[PictureKey, EncodedImage] = OrderedDict()
        self._prompts: dict[int, tuple[tuple, Features]] = {}
        self._priorities: dict[tuple[PictureKey, str], Tensor] = {}
        self._spans: dict[PictureKey, ImageSpan | None] = {}

    @property
    def longest(self) -> int:
        """Longest prompt with its answer [tokens]; 0 where neither a setting nor the model's configuration says."""
        text = self.model.config.get_text_config(decoder=True)
        return self.max_tokens or int(getattr(text, "max_position_embeddings", 0) or 0)

    def check_text(self, example: Example) -> None:
        """Raise `UserError` for a text that cannot fit, before it is tokenized: that would take memory and time."""
        size = len(example.prompt) + len(example.answer) + sum(len(text) for turn in example.history for text in turn)
        if self.longest and size > _MOST_CHARACTERS * self.longest:
            raise UserError(f"{example.record}: its text has {size} characters; {self._advice()}")

    def _advice(self) -> str:
        of = "data.max_tokens" if self.max_tokens else "the model's positions"
        return f"{of} allow {self.longest} tokens: shorten or leave out the record, or see data.max_tokens"

    @property
    def device(self) -> torch.device:
        return families.decoder(self.model).device

    @property
    def hidden_size(self) -> int:
        return self.vocabulary.shape[1]

    @property
    def vocabulary(self) -> Tensor:
        """The LLM's input embedding table [V, D]."""
        return self.model.get_input_embeddings().weight

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> the LLM's input embeddings [..., D]."""
        return self.model.get_input_embeddings()(ids)

    @torch.no_grad()
    def features(self, examples: Sequence[Example]) -> list[Features]:
        """Encode examples; an image that several of them share is encoded once.

        Images are encoded one at a time, so that their features do not depend on the batch, not even in the last bit.
        This costs little, because the tower takes a small share of the time.

        Raises:
            BrokenImage: an image cannot be decoded.
            UserError: an image file cannot be read, an answer has no tokens, or the processor has no chat template.
        """
        encoded = [self._features(example) for example in examples]
        if not self.priority_by:
            return encoded
        pairs = zip(encoded, examples, strict=True)
        return [replace(one, priority=self.priority(example, one, self.priority_by)) for one, example in pairs]

    @torch.no_grad()
    def priority(self, example: Example, features: Features, name: str) -> Tensor:
        """Indices [N] of the example's visual tokens sorted by the score `name`, best first; computed once per image.

        Raises:
            UserError: the vision tower lacks what the score needs.
        """
        key = (picture_key(example), name)
        if key not in self._priorities:
            attention = None
            clip = ClipTower.of(self.model) if name == "cls_attention" else None
            if clip is not None and not example.further_images:
                with TowerObserver(clip) as observer:
                    self.encode_resized(example, None)
                    attention = observer.record.fields(0)["cls_attention"]
            order = priority_order(name, features.visual, attention)
            self._priorities[key] = order.to(torch.int32)  # half the memory
        return self._priorities[key].long()

    def readable(self, examples: Iterable[Example], most: int | None = None) -> list[tuple[Example, Features]]:
        """Encode examples, skipping those whose image cannot be decoded; see `leave_out`.

        Args:
            examples: the examples.
            most: maximum number of examples to return; None: all.
        """
        found: list[tuple[Example, Features]] = []
        for example in examples:
            try:
                found.extend(zip([example], self.features([example]), strict=True))
            except BrokenImage as error:
                self.leave_out(example, error)
            if most is not None and len(found) >= most:
                break
        return found

    def leave_out(self, example: Example, error: BrokenImage) -> None:
        """Log that an example is skipped because its image cannot be decoded, once per record.

        All processes find the same images broken, so they skip the same examples.

        Raises:
            UserError: more than `max_bad` records were skipped.
        """
        if example.record in self._left_out:
            return
        self._left_out.add(example.record)
        logger.warning("left out %s", error)
        if len(self._left_out) > self.max_bad:
            raise UserError(
                f"more than data.max_bad={self.max_bad} records have an image that does not decode "
                f"(last: {error}); correct the data or raise data.max_bad"
            ) from None

    def _text(self, example: Example) -> tuple[str, bool]:
        """The prompt's text with image placeholders, and whether the tokenizer should add special tokens."""
        if getattr(self.processor, "chat_template", None) is None:
            raise UserError(f"the processor of {self.name} has no chat template; add chat_template.jinja to its folder")
        text = self.processor.apply_chat_template(_messages(example), add_generation_prompt=True, tokenize=False)
        bos = getattr(self.processor.tokenizer, "bos_token", None)
        # as in transformers: a template that writes the bos token itself must not get a second one
        return text, not (bos and text.startswith(bos))

    def _inputs(self, key: PictureKey, example: Example) -> dict[str, Tensor]:
        """Inputs of the LLM and, for a new image, of the vision tower.

        The image processor takes most of the time, so it runs once per image; see `image_span`.
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
        images = [_read(example, number) for number in range(len(example.images))]
        try:
            inputs = self.processor(
                text=[text],
                images=images,
                return_tensors="pt",
                add_special_tokens=add_special_tokens,
            )
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            what = f"{example.record} ({example.prompt!r})"
            raise UserError(
                f"{what}: the processor of {self.name} rejects it: {reason}; correct or remove this record"
            ) from None
        return inputs.to(self.device)

    def _picture(self, key: PictureKey, inputs: dict[str, Tensor]) -> EncodedImage:
        """The encoded images, remembered while there is room."""
        if key in self._pictures:
            self._pictures.move_to_end(key)
            return self._pictures[key]
        inputs = {**inputs, "pixel_values": inputs["pixel_values"].to(self.vocabulary.dtype)}
        encoded = self.cache.encode(inputs) if self.cache else families.encode(self.model, inputs)
        rows = families.visual_tokens(self.model, inputs["input_ids"], encoded)
        is_separator = families.newline_rows(self.model, rows)
        deepstack = families.deepstack_rows(encoded)
        counts = self._counts(key, inputs, encoded, is_separator)
        self._pictures[key] = EncodedImage(rows, is_separator, counts, deepstack)
        self._bytes += self._pictures[key].nbytes
        while self._bytes > self.cache_bytes and len(self._pictures) > 1:
            gone, old = self._pictures.popitem(last=False)
            self._spans.pop(gone, None)
            self._bytes -= old.nbytes
        return self._pictures[key]

    def _counts(self, key: PictureKey, inputs: dict, encoded: dict, is_separator: Tensor) -> tuple[int, ...]:
        """Number of visual tokens of each image, without separators; empty for a single image."""
        if isinstance(key, str):
            return ()
        numbers = families.image_numbers(self.model, inputs["input_ids"], encoded)
        counts = numbers[numbers >= 0][~is_separator].bincount().tolist()
        if len(counts) != len(key):
            raise UserError(
                f"{self.model.config.model_type}: the processor turned {len(key)} images into {len(counts)}; give "
                "this model questions about one image only"
            )
        return tuple(counts)

    def _features(self, example: Example) -> Features:
        key, asked = picture_key(example), (example.prompt, example.answer, example.history, example.placed)
        known = self._prompts.get(example.id)
        if known is not None and known[0] == asked and key in self._pictures:
            return _with_picture(known[1], self._picture(key, {}))
        self.check_text(example)
        inputs = self._inputs(key, example)
        image = self._picture(key, inputs)
        rows, is_separator = image.rows, image.is_separator
        answer = self.processor.tokenizer(example.answer, add_special_tokens=False, return_tensors="pt").input_ids[0]
        if answer.numel() == 0:
            raise UserError(f"the answer {example.answer!r} of {example.record} has no token; leave it out")
        count = inputs["input_ids"].shape[-1] + answer.numel()
        if self.longest and count > self.longest:
            raise UserError(f"{example.record}: prompt and answer take {count} tokens; {self._advice()}")
        at = families.visual_mask(self.model, inputs["input_ids"])[0].nonzero()[:, 0]
        if len(at) != len(rows):
            raise UserError(
                f"{example.record}: the prompt has {len(at)} image placeholders for {len(rows)} visual tokens; "
                "remove image tokens from its text"
            )
        positions = families.position_ids(self.model, inputs, forward=True)
        features = Features(
            id=example.id,
            image_id=example.image_id,
            visual=rows[:0],  # images are cached separately
            prompt_ids=inputs["input_ids"][0],
            visual_at=at[~is_separator],
            positions=positions[..., 0, :],
            answer_ids=answer.to(self.device),
            separators_at=at[is_separator] if is_separator.any() else None,
            blocks=families.block_ids(self.model, inputs["input_ids"][0]),
            counts=image.counts,
        )
        if len(self._prompts) >= _PROMPTS:
            self._prompts.clear()
        self._prompts[example.id] = (asked, features)
        return _with_picture(features, image)

    @property
    def patch_size(self) -> int:
        """Side [pixels] of the image square that one visual token covers."""
        vision = getattr(self.model.config, "vision_config", None)
        return int(getattr(vision, "patch_size", 14)) * int(getattr(vision, "spatial_merge_size", 1) or 1)

    @torch.no_grad()
    def encode_resized(self, example: Example, size: tuple[int, int] | None) -> Tensor:
        """Visual tokens [n, D] of the example's image, resized to (height, width) [pixels]; None: the processor's size.

        Position embeddings are interpolated.

        Raises:
            UserError: the model does not support other image sizes, or the example has several images.
        """
        settings = {}
        if example.further_images:
            raise UserError(
                "questions about several images are not supported by selectors that encode the image again; "
                "remove these questions or these selectors"
            )
        if size is not None:
            if self.model.config.model_type != "llava":
                raise UserError(
                    f"{self.model.config.model_type}: only LLaVA supports images of another size; "
                    "remove the selectors that resize the image"
                )
            # without a crop, so that only resolution is lost
            settings = {"size": {"height": size[0], "width": size[1]}, "do_center_crop": False}
        image = _read(example, 0)
        pixels = self.processor.image_processor(image, return_tensors="pt", **settings)["pixel_values"]
        output = families.base(self.model).get_image_features(
            pixel_values=pixels.to(self.device, self.vocabulary.dtype),
            interpolate_pos_encoding=size is not None,
            return_dict=True,
        )
        return torch.cat(families.entries(output))


def _with_picture(features: Features, image: EncodedImage) -> Features:
    """Features with the rows of their image, sorted into visual tokens and separators."""
    if features.separators_at is None:
        return replace(features, visual=image.rows, deepstack=image.deepstack)
    return replace(features, visual=image.rows[~image.is_separator], separators=image.rows[image.is_separator])


def _messages(example: Example) -> list[dict]:
    """The conversation up to this turn as chat messages, with images at the positions in `example.placed`."""
    questions = [question for question, _ in example.history] + [example.prompt]
    placed = example.placed or ((0, 0),) * len(example.images)
    messages = []
    for number, question in enumerate(questions):
        content = _content(question, [at for turn, at in placed if turn == number])
        messages.append({"role": "user", "content": content})
        if number < len(example.history):
            answer = example.history[number][1]
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def _content(question: str, images_at: Sequence[int]) -> list[dict]:
    """Split a question into text and image parts, with an image before each character index in `images_at`."""
    content: list[dict] = []
    start = 0
    for at in images_at:
        if at > start:
            content.append({"type": "text", "text": question[start:at]})
        content.append({"type": "image"})
        start = at
    if start < len(question) or not question:
        content.append({"type": "text", "text": question[start:]})
    return content


def _read(example: Example, number: int) -> Image.Image:
    """Read one of the example's images; error messages name the record."""
    try:
        return read_image(example.images[number])
    except UserError as error:
        raise type(error)(f"{example.record}: {error}") from None


def picture_key(example: Example) -> PictureKey:
    """Cache key of the example's images: their file paths, because images in several folders may share a name."""
    keys = tuple(
        image if isinstance(image, str) and not is_base64(image) else name
        for image, name in zip(example.images, example.names, strict=True)
    )
    return keys if example.further_images else keys[0]
