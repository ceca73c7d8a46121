"""The handle of `compress`: hooks on the multimodal model, its decoder and the decoder's layers."""

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from evocomp.inference.calls import Calls, Generation, PromptLength, check_whole, prompt_lengths
from evocomp.inference.choose import Compression, Newline, Positions, check_keep, choose
from evocomp.inference.compiled import drop_compiled_code, in_python, no_full_graph, without_compile
from evocomp.inference.masks import always_masks, block_mask, causal_mask, gathered_mask, is_plain, padding_mask
from evocomp.inference.selectors import Picker
from evocomp.inference.self_check import check_exact
from evocomp.inference.state import Choice, Pass, Prompt, Shortened
from evocomp.log import UserError, warn_once
from evocomp.mllm import attention, families
from evocomp.mllm.cache_argument import cache_of
from evocomp.mllm.context import add_log_size, check_weighable

Trust = Literal["table", "checked"]
PASS = "evocomp_pass"  # the keyword with which the decoder's hook gives a `Pass` to the hooks of its layers


class Handle:
    """Compression of one model, made by `compress`; ends with `remove()` or its `with` block.

    keep: tokens kept per image, a number or a share; may be set at any time
    prompt_length: columns of `input_ids` that are the prompt, one number or one for each row, where neither `generate`
        nor `labels` nor `logits_to_keep` tell; may be set at any time, None: not given. The selector reads no token
        after them. `model(..., prompt_length=n)` says it for one call.
    trust: "table" if the family is in the table of supported ones, "checked" if its policy was derived from the model
        and is checked on the first prompt with images
    last: what the last prefill of this thread kept (`Compression`), or of any thread if this one has made no call;
        None before the first prefill, after prompts without images and after a prefill that failed

    Calls from several threads are independent of each other.
    """

    def __init__(
        self,
        model: nn.Module,
        picker: Picker,
        keep: int | float,
        layer: int,
        positions: Positions,
        newline: Newline,
        restore_length: bool,
        prompt_length: PromptLength | None,
    ):
        self.model = without_compile(families.unwrap(model))
        self.picker, self.keep, self.layer = picker, keep, layer
        self.positions, self.newline, self.restore_length = positions, newline, restore_length
        self.prompt_length = prompt_length
        self._policy = families.policy(self.model)
        self.trust: Trust = "table" if families.in_table(self.model) else "checked"
        self._exact = self.trust == "table"
        self._base, self._decoder = families.base(self.model), families.decoder(self.model)
        # whether the length that a cache tells is that of the kept tokens
        self._counts_kept = attention.first_attention(self._decoder.config) >= layer
        self._always_masks = always_masks(self._decoder)
        self._names = list(inspect.signature(type(without_compile(self._base)).forward).parameters)[1:]
        self._calls, self._latest = Calls(), None
        self._hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in self._places(model)]
        self._hooks.append(self._base.register_forward_hook(self._after_base))
        for module in {model, self.model, self._base}:
            # also after an error: the next call of the decoder may be a direct one by the caller
            self._hooks.append(module.register_forward_hook(self._forget, always_call=True))
        self._hooks.append(self._decoder.register_forward_hook(self._after_decoder, with_kwargs=True))
        # only `generate` knows the whole prompt: hooks see parts of it, or drafts and answer tokens after it
        self._generate_before = vars(self.model).get("generate")
        self.model.generate = self._generate
        drop_compiled_code()

    def _places(self, model: nn.Module) -> Iterator[tuple[nn.Module, object]]:
        # PEFT calls the wrapped model's `forward` directly, without its hooks: hook both models
        for outer in {id(m): m for m in (model, self.model) if m is not self._base}.values():
            yield outer, self._before_model
        yield self._base, self._before_base
        yield self._decoder, self._before_decoder
        for number, block in enumerate(self._decoder.layers):
            yield block, partial(self._before_layer, number)

    @property
    def keep(self) -> int | float:
        return self._keep

    @keep.setter
    def keep(self, value: int | float) -> None:
        self._keep = check_keep(value)

    @property
    def last(self) -> Compression | None:
        return self._calls.last if self._calls.known else self._latest

    def _record(self, last: Compression | None) -> None:
        self._calls.known, self._calls.last, self._latest = True, last, last

    def remove(self) -> None:
        """Undo `compress` and restore the model. Further calls do nothing."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._calls.forget()
        if vars(self.model).get("generate") == self._generate:
            del self.model.generate
            if self._generate_before is not None:
                self.model.generate = self._generate_before
        drop_compiled_code()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception) -> None:
        self.remove()

    # --- around `generate`: record where the prompt ends ---

    def _generate(self, *args, **kwargs):
        """Call the model's own `generate`, with the length of the prompt recorded."""
        generate = self._generate_before or partial(type(self.model).generate, self.model)
        if not self._hooks:  # removed, but code that wrapped `generate` later still calls this one
            return generate(*args, **kwargs)
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        known = isinstance(ids, Tensor) and ids.ndim == 2
        pictured = known and bool(families.visual_mask(self.model, ids).any())
        outer = self._calls.generation
        self._calls.generation = Generation(ids.shape[1] if known else None, pictured)
        if not _tokens_in(cache_of(kwargs)):
            self._record(None)
        try:
            with no_full_graph():
                return generate(*args, **kwargs)
        finally:
            self._calls.generation = outer

    # --- before the multimodal model: find the images ---

    @in_python
    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        calls = self._calls
        calls.labels, calls.logits_to_keep = kwargs.get("labels"), kwargs.get("logits_to_keep")
        calls.prompt_length = kwargs.pop("prompt_length", calls.prompt_length)
        return args, kwargs

    @in_python
    def _before_base(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        calls = self._calls
        calls.pending = None
        ids, cache = kwargs.get("input_ids"), cache_of(kwargs)
        seen = _tokens_in(cache)
        if seen:
            calls.pending = self._continuation(kwargs, seen)
            return (), kwargs
        self._record(None)
        if hasattr(cache, "evocomp_state"):
            del cache.evocomp_state  # it belongs to the content before the cache was reset
        if ids is not None:
            check_whole(calls.generation, ids.shape[1])
        if ids is not None and ids.shape[1] > 1 and bool(families.visual_mask(self.model, ids).any()):
            prompt = self._find_images(kwargs, module.training)
            if prompt is not None and not self._exact:
                try:
                    check_exact(self, prompt, kwargs)
                finally:
                    self._record(None)
                self._exact = True
            calls.pending = prompt
        elif ids is None and kwargs.get("inputs_embeds") is not None:
            warn_once("compress() finds images by input_ids; prompts given as embeddings are not compressed")
        return (), kwargs

    def _find_images(self, kwargs: dict, training: bool) -> Prompt | None:
        encoded = kwargs.get("mm_encoder_outputs")
        pixels = _pixels(kwargs)
        if not encoded and not pixels:
            return None  # placeholders without an image are ordinary tokens
        ids = kwargs["input_ids"]
        lengths = prompt_lengths(self._calls, self.prompt_length, ids, training)
        if not encoded and self._policy.image == "entry":
            # the number of tokens per image is known only after encoding; the model then reuses the encoded images
            encoded = kwargs["mm_encoder_outputs"] = families.encode(self.model, kwargs)
            kwargs.update(dict.fromkeys(pixels))
        numbers = families.image_numbers(self.model, ids, encoded if isinstance(encoded, Mapping) else {})
        mask = kwargs.get("attention_mask")
        real = padding_mask(mask, ids.shape[1])
        own = isinstance(mask, Tensor) and mask.ndim == 4
        # a plain causal mask that was prepared for a static cache does not count as the caller's own
        own = own and (self._policy.blocks is not None or not is_plain(mask, real, self._decoder.config))
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.to(ids.device)
        cached = cache_of(kwargs) is not None
        # like the model, which treats a prompt without token types as text
        in_blocks = self._policy.blocks == "sliding" and kwargs.get("mm_token_type_ids") is not None
        blocks = families.runs(numbers >= 0) if in_blocks and not own else None
        return Prompt(ids, numbers, real, self._calls.labels, cached, mask if own else None, lengths, blocks)

    def _continuation(self, kwargs: dict, seen: int) -> Pass | None:
        """Decoding, or a further turn over a cache that holds `seen` tokens in its first attention layer."""
        cache, ids = cache_of(kwargs), kwargs.get("input_ids")
        if ids is not None and (_pixels(kwargs) or kwargs.get("mm_encoder_outputs")):
            # without pixels a placeholder is an ordinary token, which may occur in a draft or an answer
            if bool(families.visual_mask(self.model, ids).any()):
                raise UserError(
                    "a prompt with images must start with an empty cache; leave out past_key_values and give the "
                    "whole conversation again"
                )
        state: Shortened | None = getattr(cache, "evocomp_state", None)
        if state is None:
            return None
        new = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
        past = seen - (state.index.shape[1] if self._counts_kept else state.full)
        if self._counts_kept:
            state.continue_positions(kwargs, past, new, dense=self.positions == "dense")
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 4 and not cache.is_compileable:
            raise UserError("a 4-D attention_mask does not fit a compressed cache; give one of shape [batch, tokens]")
        return Pass.further(state, mask, seen, past, new)

    @in_python
    def _after_base(self, *call) -> None:
        if self._calls.pending is not None:
            self._record(None)
            raise UserError(
                "the decoder ran without the hooks of compress(), so nothing was dropped; call remove() on the handle, "
                "and compress() again once the model is complete"
            )

    @in_python
    def _forget(self, *call) -> None:
        self._calls.forget()

    # --- before the decoder: choose the kept tokens ---

    @in_python
    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        pending, self._calls.pending = self._calls.pending, None
        kwargs = dict(kwargs)
        if pending is not None:
            kwargs[PASS] = self._shorten(pending, kwargs) if isinstance(pending, Prompt) else pending
        return args, kwargs

    def _shorten(self, prompt: Prompt, kwargs: dict) -> Pass:
        kept, owner, record = self._choose(prompt, kwargs)
        for merged in record.merged:
            merged.write(kwargs)
        if owner is not None:
            check_weighable(self._decoder.config)
        state = Shortened.make(prompt, kept, owner)
        if state.index.shape[1] != state.full and not self.restore_length:
            if prompt.labels is not None:
                raise UserError("labels need logits of the original length; use compress(restore_length=True)")
            state.check_logits(self._calls.logits_to_keep)
        if self.positions == "dense":
            ranks = (prompt.real & (kept | ~prompt.visual)).cumsum(1) - 1
            kwargs["position_ids"] = ranks.clamp(min=0) + self._policy.forward_offset
        if kwargs.get("position_ids") is not None:
            state.next_position = kwargs["position_ids"][..., -1:] + 1
        run = Pass(state, prefill=True, real=None if state.all_real else state.valid, record=record)
        run.given_mask, run.windowed = prompt.mask, prompt.mask is None
        if prompt.blocks is not None:
            run.blocks = prompt.blocks.gather(1, state.index).masked_fill(~state.valid, -1)
        if prompt.mask is None and self._policy.blocks in ("image", "prefix"):
            mask = kwargs.get("attention_mask")
            mask = mask.get("full_attention") if isinstance(mask, dict) else mask
            run.given_mask = mask if isinstance(mask, Tensor) and mask.ndim == 4 else None
        if kwargs.get("deepstack_visual_embeds") is not None:
            assert len(kwargs["deepstack_visual_embeds"]) < len(self._decoder.layers)
            run.take_over_deepstack(kwargs, self.layer)
        return run

    def _choose(self, prompt: Prompt, kwargs: dict) -> tuple[Tensor, Tensor | None, Compression]:
        if self._calls.forced is not None:
            return self._calls.forced, None, Compression([], [], [], [], [], [])
        embeds, generation = kwargs["inputs_embeds"], self._calls.generation
        tokens = embeds[prompt.visual].detach()
        if generation is not None and generation.choice is not None:
            known = generation.choice.for_next_step(prompt, tokens, self.keep)
            if known is not None:
                return known
        positions = kwargs.get("position_ids")
        chosen = choose(
            self.model, self.picker, self.keep, self.newline, embeds, prompt.numbers, prompt.text, positions
        )
        if generation is not None and generation.length is not None and not prompt.cached:
            generation.choice = Choice.make(prompt, generation.length, tokens, self.keep, *chosen)
        return chosen

    # --- before the layers: shorten the sequence ---

    @in_python
    def _before_layer(self, number: int, module: nn.Module, args: tuple, kwargs: dict):
        kwargs = dict(kwargs)
        run = kwargs.pop(PASS, None)
        if run is None:
            return None
        hidden, cache = args[0], cache_of(kwargs)
        run.layers.add(number)
        if number < self.layer:
            return args, kwargs
        if run.prefill:
            if number == self.layer:
                hidden = run.state.shorten(hidden)
                if run.record is not None:  # not again when gradient checkpointing recomputes the layer
                    self._record(run.record)
                    run.record = None
                if cache is not None:
                    cache.evocomp_state = run.state
            hidden = run.add_deepstack(hidden, number)
            args = run.shorten_arguments(args, kwargs)
        kwargs["attention_mask"] = self._mask(run, number, hidden, cache)
        if number == len(self._decoder.layers) - 1:
            run.memo.clear()
        return (hidden, *args[1:]), kwargs

    def _mask(self, run: Pass, number: int, hidden: Tensor, cache):
        config, length = self._decoder.config, hidden.shape[-2]
        kind = attention.layer_types(config)[number]
        if kind in run.memo:
            mask = run.memo[kind]
            # layers that use other layers' keys may run on the last tokens only (Gemma 4)
            return mask if mask is None or mask.ndim != 4 else mask[..., -length:, :]
        # recurrent layers hold a state, not keys: their cache has no length
        keyed = cache is not None and kind not in attention.RECURRENT_TYPES
        columns, first = cache.get_mask_sizes(length, number) if keyed else (length, 0)
        if run.blocks is not None and kind == "sliding_attention":
            mask = block_mask(config, run.blocks, run.state.valid, columns, hidden)
        elif run.given_mask is not None and kind not in attention.RECURRENT_TYPES:
            mask = gathered_mask(
                run.given_mask,
                run.state.index,
                run.state.valid,
                window=config.sliding_window if kind == "sliding_attention" and run.windowed else None,
                window_spares_blocks=self._policy.blocks == "prefix",
                columns=columns,
            )
        else:
            real = None if run.real is None else run.real.to(hidden.device)
            always = self._always_masks or run.state.log_size is not None
            mask = causal_mask(config, number, hidden, real, cache, always)
        if run.state.log_size is not None:
            # a sliding window's cache has forgotten the first keys
            mask = add_log_size(mask, run.state.log_size[:, first:].to(hidden.device), hidden.dtype)
        run.memo[kind] = mask
        return mask

    @in_python
    def _after_decoder(self, module: nn.Module, args: tuple, kwargs: dict, output):
        run: Pass | None = kwargs.get(PASS)
        if run is None:
            return output
        if len(run.layers) < min(len(self._decoder.layers), self._decoder.config.num_hidden_layers):
            self._record(None)
            raise UserError(
                "some layers of the decoder ran without the hooks of compress(); call remove() on the handle, and "
                "compress() again once the model is complete"
            )
        if not run.prefill or not self.restore_length:
            return output
        output.last_hidden_state = run.state.restored(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            # item 0 is the input of layer 0, item i the output of layer i - 1; None: not requested
            first = self.layer + 1 if self.layer else 0
            output.hidden_states = tuple(
                state if state is None or number < first else run.state.restored(state)
                for number, state in enumerate(output.hidden_states)
            )
        return output


def _tokens_in(cache) -> int:
    """Tokens that the first attention layer of a cache holds."""
    return 0 if cache is None else int(cache.get_seq_length())


def _pixels(kwargs: Mapping) -> list[str]:
    """Names of the inputs with pixels."""
    return [name for names in families.PIXELS.values() for name in names if kwargs.get(name) is not None]
