"""`compress`: drop visual tokens inside an unmodified Hugging Face MLLM, by forward pre-hooks.

Hooks are registered on the multimodal model (its `input_ids` show where the images are), on its decoder (its input
embeddings are what the selector reads) and on every decoder layer from `layer` on (where the sequence, its rotary
embedding and its mask are shortened). No class is changed: `generate`, pipelines, PEFT and `save_pretrained` work as
before, and `handle.remove()` removes everything. Only `generate` of this one model is wrapped: it knows the whole
prompt, whereas hooks may see a draft after it, a chunk of it, or a prompt that grows without a cache.
"""

from torch import nn

from evocomp.inference.calls import PromptLength
from evocomp.inference.choose import Newline, Positions, Settings
from evocomp.inference.compiled import without_compile
from evocomp.inference.handle import Handle, Trust
from evocomp.inference.masks import check_layers, check_shared_keys
from evocomp.inference.selectors import picker_for, watched
from evocomp.log import UserError
from evocomp.mllm import families


def compress(
    model: nn.Module,
    selector,
    keep: int | float | None = None,
    layer: int | None = None,
    positions: Positions | None = None,
    newline: Newline = "keep",
    restore_length: bool = False,
    context: float | None = None,
    prompt_length: PromptLength | None = None,
    trust: Trust = "checked",
) -> Handle:
    """Compress the visual tokens of a multimodal LLM until the returned handle is removed.

    >>> from evocomp import load_nano
    >>> model, processor = load_nano()
    >>> with compress(model, "divprune", keep=16) as handle:
    ...     handle.keep, handle.layer
    (16, 0)

    With a trained compressor and the model's own `generate`:

        with evocomp.compress(model, "path/to/compressor", keep=192) as handle:
            model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
            print(handle.last.after)

    Args:
        model: any supported `...ForConditionalGeneration` (see `evocomp.mllm.families`), PEFT-wrapped or not.
            It may be compiled with `torch.compile`, before or after: compiled code is dropped when hooks are added
            or removed, and compiled again at the next call. `fullgraph=True` is refused.
        selector: the name of a training-free selector (`evocomp.selection.SELECTORS`) or of a shipped compressor
            ("nano"), a compressor, its folder or hub id, or a function: see `evocomp.inference.selectors`.
        keep: visual tokens kept per image: a number, or a fraction in (0, 1]. Images with fewer keep all.
        layer: decoder layer before which tokens are dropped (the paper's l): 0 is fastest, 2 is more accurate.
        positions: position ids of kept tokens: "original", or "dense" without gaps (layer 0, no M-RoPE).
        newline: whether `image_newline` separators are kept, in addition to `keep`, or dropped (LLaVA-NeXT and
            LLaVA-OneVision).
        restore_length: return logits and hidden states (of every layer) in the original length, with zeros at
            dropped tokens, for callers that compute a loss or slice by the prompt's length.
        context: use context tokens: of R kept tokens R S / (R + S) are selected, and the others are means of dropped
            tokens, weighted in the attention by the number of tokens in each (`handle.last.sizes`). `context` is S, a
            fraction of the image's tokens (below 1) or a number; 0: none. See `evocomp.mllm.context`.
        prompt_length: number of columns of `input_ids` that are the prompt, for calls whose input also contains an
            answer; see below.

        trust: which models are taken: with "table" those of the families in `evocomp.mllm.policy.FAMILIES`; with
            "checked" also similar ones, whose policy is derived from the model. The first prompt with images then
            costs three more prefills, which check that compression is exact on this model; `handle.trust` says which
            of the two holds.

    The selector reads the prompt and never an answer or a draft of one. Where the prompt ends is known inside
    `generate`; in other calls from `labels`, from `logits_to_keep=k` (k > 1: the last k - 1 tokens are the answer), or
    from `prompt_length`, of the call (`model(..., prompt_length=n)`), the handle or this function. Without any of them
    the whole input is the prompt, except in training mode, where that is refused.

    `keep`, `layer`, `positions` and `context` default to the values saved with the compressor, else to 192, 0,
    "original" and 0.

    Raises:
        UserError: unsupported family or transformers version, a second handle on the same model, a compressor
            made for another hidden size, a selector that needs what the model lacks, a decoder with other layers than
            attention, bad settings; and at call time: a model outside the table on which compression is not exact,
            images over an old cache, `labels` or a `logits_to_keep` that reaches back to the images without
            `restore_length`, an unlabelled input in training mode, a prefill in chunks, context tokens with an
            attention that takes no weights (use `sdpa` or `eager`), a 4-D attention mask, or one with too few columns,
            over a compressed cache.
    """
    model = without_compile(model)
    families.check_supported(model)
    if trust not in ("table", "checked"):
        raise UserError(f"trust={trust!r}: use 'checked' or 'table'")
    if trust == "table" and not families.in_table(model):
        raise UserError(
            f"{families.unwrap(model).config.model_type} is not in the table of families; use trust='checked', which "
            "checks the model on its first prompt"
        )
    base = families.base(model)
    if any(isinstance(getattr(hook, "__self__", None), Handle) for hook in base._forward_pre_hooks.values()):
        raise UserError("this model is compressed already; call remove() on its handle first")
    picker = picker_for(selector, model, context)
    settings = Settings.of(model, picker, keep, layer, positions, newline)
    decoder = without_compile(families.decoder(model))
    check_layers(decoder)
    check_shared_keys(decoder.config, settings.layer)
    attention = decoder.config._attn_implementation
    if families.policy(model).blocks and attention == "flex_attention":
        raise UserError("flex_attention masks of this family cannot be shortened; load the model with 'sdpa'")
    handle = Handle(model, picker, *settings, restore_length, prompt_length)
    handle._hooks += watched(picker)
    return handle
