"""Reuse of a known image's token ids in other prompts about the same image.

A processor replaces an image's placeholder by token ids that depend on the image alone. They are taken from the first
prompt, so that later prompts need only the tokenizer, not the image processor. Where this may not be exact there is no
span, and the processor prepares every prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageSpan:
    """The tokens that a processor inserts for an image.

    Attributes:
        placeholder: token id of the image's placeholder in a prompt.
        ids: token ids that replace the placeholder [K].
        along: other inputs of the prompt's length, such as `attention_mask`: their values at `ids` [K], and their
            single value at all other tokens.
        others: inputs that describe the image, without its pixels.
    """

    placeholder: int
    ids: Tensor
    along: Mapping[str, tuple[Tensor, Tensor]]
    others: Mapping[str, Any]

    def insert(self, text_ids: list[int]) -> dict[str, Tensor] | None:
        """The inputs [1, S] of another prompt about the image; None unless it has exactly one placeholder.

        Args:
            text_ids: token ids of the prompt with the placeholder.
        """
        if text_ids.count(self.placeholder) != 1:
            return None
        start = text_ids.index(self.placeholder)
        before, after = (self.ids.new_tensor(part) for part in (text_ids[:start], text_ids[start + 1 :]))
        inputs = {"input_ids": torch.cat([before, self.ids, after])[None]}
        for name, (inside, outside) in self.along.items():
            parts = [outside.expand(len(before)), inside, outside.expand(len(after))]
            inputs[name] = torch.cat(parts)[None]
        return inputs | dict(self.others)


def find_image_span(processor: Any, text_ids: list[int], inputs: Mapping[str, Any]) -> ImageSpan | None:
    """Find the span of a prompt's only image.

    Args:
        processor: the model's processor.
        text_ids: token ids of the prompt with the placeholder.
        inputs: the processor's output for the same prompt and the image.

    Returns:
        None if the processor changes more of a prompt than the placeholder, or if text next to the span could be
        tokenized differently than text next to the placeholder.
    """
    tokenizer = processor.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {})
    placeholder = _placeholder(processor)
    if placeholder not in added or text_ids.count(placeholder) != 1:
        return None
    ids = inputs["input_ids"]
    start = text_ids.index(placeholder)
    after = text_ids[start + 1 :]
    stop = ids.shape[1] - len(after)
    row = ids[0].tolist()
    if stop <= start or row[:start] != text_ids[:start] or row[stop:] != after:
        return None
    if not _separates_alike(added, placeholder, row[start], row[stop - 1]):
        return None
    along, others = {}, {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == ids.shape:
            outside = torch.cat([value[0, :start], value[0, stop:]])
            if name != "input_ids" and (len(outside) == 0 or (outside != outside[0]).any()):
                return None
            along[name] = (value[0, start:stop], outside[:1])
        elif not name.startswith("pixel_"):
            others[name] = value
    del along["input_ids"]
    return ImageSpan(placeholder, ids[0, start:stop], along, others)


def _placeholder(processor: Any) -> int | None:
    token = getattr(processor, "image_token", None)
    return None if token is None else processor.tokenizer.convert_tokens_to_ids(str(token))


def _separates_alike(added: Mapping[int, Any], placeholder: int, first: int, last: int) -> bool:
    """Whether a span from token `first` to `last` splits the text around it as the placeholder does.

    Text is split at added tokens before it is tokenized; one with `lstrip` or `rstrip` removes the spaces next to it.
    """
    if first not in added or last not in added:
        return False
    alike = added[placeholder].lstrip == added[first].lstrip and added[placeholder].rstrip == added[last].rstrip
    return alike and not any(added[token].single_word for token in (placeholder, first, last))
