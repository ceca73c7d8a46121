"""`evocomp generate`: answer one question about one image, with and without compression."""

from pathlib import Path

import numpy as np
from PIL import Image

from evocomp.data.images import read_image
from evocomp.distributed import set_threads
from evocomp.files import whole_file
from evocomp.inference.choose import check_keep
from evocomp.inference.generate import TimedAnswer, timed_generate
from evocomp.inference.hooks import compress
from evocomp.inference.names import check_name
from evocomp.inference.selectors import check_context
from evocomp.log import UserError
from evocomp.mllm.hf import FrozenMLLM
from evocomp.mllm.unknown_words import warn_of_unknown_words
from evocomp.viz import light_up


def answer_from_command_line(
    model: str,
    compressor: str,
    image: Path,
    prompt: str,
    keep: int | float,
    layer: int,
    compare: bool,
    save: Path | None,
    max_new_tokens: int,
    context: float | None = None,
) -> None:
    """Print the answer, the number of tokens before and after, and the time of each stage; see the command's help.

    compressor: a name as for `evocomp.compress`: a selector ("divprune"), a shipped compressor, a folder or an id.
    """
    check_keep(keep)  # before anything is loaded
    try:
        pil_image = read_image(image)
    except UserError as error:
        raise UserError(f"--image: {error}") from None
    if save is not None and save.exists():
        raise UserError(f"--save={save} exists; give another name")
    if save is not None and Image.registered_extensions().get(save.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--save={save} has no known image extension; give a name that ends in .png")
    check_name(compressor)
    check_context(context)
    set_threads(0)
    mllm = FrozenMLLM.load(model)
    token, templated = getattr(mllm.processor, "image_token", None), getattr(mllm.processor, "chat_template", None)
    if token and prompt.count(token) > (0 if templated else 1):  # without a template the prompt may place the image
        raise UserError(f"--prompt contains the image placeholder {token}; remove it, it is inserted automatically")
    warn_of_unknown_words(mllm.processor.tokenizer, [prompt], model)
    full = _timed(mllm, pil_image, prompt, None, max_new_tokens) if compare else None
    with compress(mllm.model, compressor, keep=keep, layer=layer, context=context) as handle:
        ours = _timed(mllm, pil_image, prompt, handle, max_new_tokens)
        kept = handle.last.indices[0][0].cpu().numpy()
    print(ours.text)
    print(_describe("compressed", ours))
    if full is not None:
        print(_describe("full model", full) + f"   answer: {full.text}")
        prefill = full.prefill / max(1e-9, ours.prefill)
        print(f"{'ratio':12} {full.total / ours.total:.2f}x in all, prefill {prefill:.2f}x")
        if full.total < ours.total:
            print("This LLM, or its prompt, is too small for compression to save time; large LLMs gain.")
    if save is not None:
        _draw(pil_image, kept, ours.before, save)
        print(f"kept tokens drawn in {save}")


def _timed(mllm: FrozenMLLM, pil_image: Image.Image, prompt: str, handle, max_new_tokens: int) -> TimedAnswer:
    timed_generate(mllm.model, mllm.processor, pil_image, prompt, handle, 1)  # warm up
    return timed_generate(mllm.model, mllm.processor, pil_image, prompt, handle, max_new_tokens)


def _describe(name: str, answer: TimedAnswer) -> str:
    parts = ("encode", "compressor", "prefill", "decode")
    times = "  ".join(f"{part} {1e3 * getattr(answer, part):.1f} ms" for part in parts)
    return f"{name:12} {answer.before} -> {answer.after} visual tokens   {times}"


def _draw(pil_image: Image.Image, kept: np.ndarray, tokens: int, path: Path) -> None:
    side = round(tokens**0.5)
    if side * side != tokens:
        raise UserError(f"--save draws square grids of tokens only; this image has {tokens}")
    pixels = np.asarray(pil_image.resize((side * 28, side * 28), Image.Resampling.BICUBIC))
    kind = Image.registered_extensions()[path.suffix.lower()]
    with whole_file(path) as file:
        Image.fromarray(light_up(pixels, kept, (side, side))).save(file, kind)
