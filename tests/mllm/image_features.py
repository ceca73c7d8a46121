"""Visual tokens image by image, as an oracle of tests."""

from collections.abc import Mapping

from torch import Tensor, nn

from evocomp.mllm import families


def image_features(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Visual tokens of every image (or video), in order of appearance over the batch: list of [n_i,D].

    `inputs` is what the processor returned. Rows include `image_newline` separators; see `families.newline_rows`.
    """
    encoded = families.encode(model, inputs)
    if not encoded:
        return []
    numbers = families.image_numbers(model, inputs["input_ids"], encoded)
    counts = numbers[numbers >= 0].bincount().tolist()
    return list(families.visual_tokens(model, inputs["input_ids"], encoded).split(counts))
