"""Generate one answer and time its stages: encoding, token selection, prefill and decoding."""

import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from evocomp.inference.handle import Handle
from evocomp.mllm import families


@dataclass(frozen=True)
class TimedAnswer:
    """An answer and its times in seconds, measured after the device has finished; the first call includes
    warm-up.

    text:         the answer
    new_tokens:   number of tokens of the answer
    prompt:       number of tokens of the prompt, visual tokens included
    before, after: number of visual tokens in the prompt, and number of kept ones
    encode:       time of vision tower and projector
    compressor:   time of token selection (0.0 without a handle)
    prefill:      time of the LLM from the prompt to the first new token, without token selection
    decode:       time of all further tokens
    """

    text: str
    new_tokens: int
    prompt: int
    before: int
    after: int
    encode: float
    compressor: float
    prefill: float
    decode: float

    @property
    def total(self) -> float:
        """Sum of all stages."""
        return self.encode + self.compressor + self.prefill + self.decode


class Stopwatch(BaseStreamer):
    """Records the time when `generate` starts and at every new token."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(now(self.device))

    def end(self) -> None:
        pass


def now(device: torch.device) -> float:
    """The time in seconds after all work queued on the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def timed_generate(
    model: nn.Module, processor, image, prompt: str, handle: Handle | None = None, max_new_tokens: int = 64
) -> TimedAnswer:
    """Answer a question about an image by greedy decoding, and time the stages.

    Args:
        model: a supported multimodal LLM; compressed if `handle` is the one that `compress` returned for it.
        image: a PIL image, or another form that the processor accepts.
        prompt: the question; the processor's chat template is applied, if it has one.
    """
    device = families.decoder(model).device
    inputs = question(processor, image, prompt).to(device, families.unwrap(model).dtype)
    start = now(device)
    encoded = families.encode(model, inputs)
    encode = now(device) - start
    given = {name: value for name, value in inputs.items() if name not in ("pixel_values", "pixel_values_videos")}
    watch, spent = Stopwatch(device), []
    with timed_picks(handle, device, spent):
        out = model.generate(
            **given,
            mm_encoder_outputs=encoded,
            streamer=watch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
    started, first, last = watch.times[0], watch.times[1], watch.times[-1]
    length = inputs["input_ids"].shape[1]
    before = int(families.visual_mask(model, inputs["input_ids"]).sum())
    return TimedAnswer(
        text=processor.batch_decode(out[:, length:], skip_special_tokens=True)[0].strip(),
        new_tokens=out.shape[1] - length,
        prompt=length,
        before=before,
        after=before if handle is None else sum(handle.last.after),
        encode=encode,
        compressor=sum(spent),
        prefill=first - started - sum(spent),
        decode=last - first,
    )


@contextmanager
def timed_picks(handle: Handle | None, device: torch.device, spent: list[float]):
    """Append to `spent` the seconds of every call of the handle's selector."""
    if handle is None:
        yield
        return
    picker = handle.picker

    class Timed:
        reads_llm_input = getattr(picker, "reads_llm_input", False)

        def pick(self, visual, text, keep, **given):
            start = now(device)
            picks = picker.pick(visual, text, keep, **given)
            spent.append(now(device) - start)
            return picks

    handle.picker = Timed()
    try:
        yield
    finally:
        handle.picker = picker


def question(processor, image, prompt: str):
    """Processor output for one image and a question, with the model's chat template if there is one."""
    if getattr(processor, "chat_template", None) is None:
        token = getattr(processor, "image_token", None)
        # PaliGemma's processor has no template and places the image itself
        named = token is None or token in prompt or "PaliGemma" in type(processor).__name__
        return processor(text=[prompt if named else f"{token}\n{prompt}"], images=[image], return_tensors="pt")
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    bos = getattr(processor.tokenizer, "bos_token", None)
    # if the template writes the start token, the tokenizer must not add a second one
    special = not (bos and text.startswith(bos))
    return processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=special)
