"""The handle of `compress`: hooks on the multimodal model, its decoder and the decoder's layers."""

import inspect
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from evocomp.inference.choose import Compression, Newline, Positions, check_keep, choose
from evocomp.inference.masks import causal_mask, gathered_mask, is_plain, is_sliding, padding_mask
from evocomp.inference.selectors import Picker
from evocomp.inference.state import Choice, Pass, Prompt, Shortened
from evocomp.log import UserError, warn_once
from evocomp.mllm import families
from evocomp.mllm.context import add_log_size, check_weighable


class Handle:
    """Compression of one model, made by `compress`; ends with `remove()` or its `with` block.

    keep: tokens kept per image, a number or a share; may be set at any time
    last: what the last prefill kept (`Compression`); None before the first and after prompts without images
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
    ):
        self.model = families.unwrap(model)
        self.picker, self.keep, self.layer = picker, keep, layer
        self.positions, self.newline, self.restore_length = positions, newline, restore_length
        self.last: Compression | None = None
        self._policy = families.policy(self.model)
        self._base, self._decoder = self.model.base_model, self.model.get_decoder()
        self._names = list(inspect.signature(type(self._base).forward).parameters)[1:]
        self._labels: Tensor | None = None
        self._pending: Prompt | Pass | None = None
        self._active: Pass | None = None
        self._choice: Choice | None = None
        self._hooks = [
            module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in self._places(model)
        ]
        for module in {model, self.model, self._base}:
            # even after an error: the next call of the decoder may be the caller's own
            self._hooks.append(module.register_forward_hook(self._forget, always_call=True))
        if restore_length:
            self._hooks.append(self._decoder.register_forward_hook(self._after_decoder))

    def _places(self, model: nn.Module) -> Iterator[tuple[nn.Module, object]]:
        # PEFT calls the wrapped model's `forward` past its hooks: hook wrapper and wrapped
        for outer in {id(m): m for m in (model, self.model) if m is not self._base}.values():
            yield outer, self._before_model
        yield self._base, self._before_base
        yield self._decoder, self._before_decoder
        for number, block in enumerate(self._decoder.layers):
            if number >= self.layer:
                yield block, partial(self._before_layer, number)

    @property
    def keep(self) -> int | float:
        return self._keep

    @keep.setter
    def keep(self, value: int | float) -> None:
        self._keep = check_keep(value)

    def remove(self) -> None:
        """Undo `compress`: the model is as it was before. Calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._pending, self._active, self._choice = [], None, None, None

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception) -> None:
        self.remove()

    # --- before the multimodal model: find the images ---

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._labels = kwargs.get("labels")

    def _before_base(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        labels, self._labels, self._pending = self._labels, None, None
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        seen = 0 if cache is None else int(cache.get_seq_length())
        several = ids is not None and ids.shape[1] > 1
        pictured = several and bool(families.visual_mask(self.model, ids).any())
        if seen:
            self._pending = self._continuation(kwargs, seen, pictured)
            return (), kwargs
        if hasattr(cache, "evocomp_state"):
            del cache.evocomp_state  # of what the cache held before its reset
        if pictured:
            self._pending = self._find_images(kwargs, labels)
        if self._pending is None:
            self.last = None
            if ids is None and kwargs.get("inputs_embeds") is not None:
                warn_once("compress() finds images by input_ids; prompts given as embeddings stay whole")
        return (), kwargs

    def _find_images(self, kwargs: dict, labels: Tensor | None) -> Prompt | None:
        encoded = kwargs.get("mm_encoder_outputs")
        pixels = [name for name in ("pixel_values", "pixel_values_videos") if kwargs.get(name) is not None]
        if not encoded and not pixels:
            return None  # placeholders without a picture are ordinary tokens
        if not encoded and self._policy.image == "entry":
            # the sizes of images are known once they are encoded; the model then takes the result as it is
            encoded = kwargs["mm_encoder_outputs"] = families.encode(self.model, kwargs)
            kwargs.update(dict.fromkeys(pixels))
        ids = kwargs["input_ids"]
        numbers = families.image_numbers(self.model, ids, encoded if isinstance(encoded, Mapping) else {})
        mask = kwargs.get("attention_mask")
        real = padding_mask(mask, ids.shape[1])
        own = isinstance(mask, Tensor) and mask.ndim == 4
        # a mask prepared for a static cache is no mask of the caller's own
        own = own and (self._policy.blocks is not None or not is_plain(mask, real, self._decoder.config))
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.to(ids.device)
        cached = kwargs.get("past_key_values") is not None
        return Prompt(ids, numbers, real, labels, cached, mask if own else None)

    def _continuation(self, kwargs: dict, seen: int, pictured: bool) -> Pass | None:
        """Decoding, or a further turn over a cache that holds `seen` tokens in layer 0."""
        state: Shortened | None = getattr(kwargs["past_key_values"], "evocomp_state", None)
        if state is not None:
            ids = kwargs.get("input_ids")
            new = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
            past = seen - (state.index.shape[1] if self.layer == 0 else state.full)
            if self.layer == 0:
                state.continue_positions(kwargs, past, new, dense=self.positions == "dense")
        if pictured:
            raise UserError(
                "a prompt with images must start with an empty cache; leave out past_key_values and give the "
                "whole conversation again"
            )
        if state is None:
            return None
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 4 and not kwargs["past_key_values"].is_compileable:
            raise UserError("a 4-D attention_mask does not fit a compressed cache; give one of shape [batch, tokens]")
        return Pass.further(state, mask, seen, past, new)

    def _forget(self, *call) -> None:
        self._labels, self._pending = None, None

    # --- before the decoder: choose ---

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        pending, self._pending, self._active = self._pending, None, None
        if isinstance(pending, Prompt):
            kwargs = dict(kwargs)
            self._active = self._shorten(pending, kwargs)
        elif pending is not None:
            self._active = pending
        return args, kwargs

    def _shorten(self, prompt: Prompt, kwargs: dict) -> Pass:
        kept, owner = self._choose(prompt, kwargs)
        if owner is not None:
            check_weighable(self._decoder.config)
        state = Shortened.make(prompt, kept, owner)
        if prompt.labels is not None and state.index.shape[1] != state.full and not self.restore_length:
            raise UserError("labels need logits of the original length; use compress(restore_length=True)")
        if self.positions == "dense":
            ranks = (prompt.real & (kept | ~prompt.visual)).cumsum(1) - 1
            kwargs["position_ids"] = ranks.clamp(min=0) + self._policy.forward_offset
        if kwargs.get("position_ids") is not None:
            state.next_position = kwargs["position_ids"][..., -1:] + 1
        run = Pass(state, prefill=True, real=None if state.all_real else state.valid)
        run.given_mask, run.windowed = prompt.mask, prompt.mask is None
        if prompt.mask is None and self._policy.blocks:
            mask = kwargs.get("attention_mask")
            mask = mask.get("full_attention") if isinstance(mask, dict) else mask
            run.given_mask = mask if isinstance(mask, Tensor) and mask.ndim == 4 else None
        if kwargs.get("deepstack_visual_embeds") is not None:
            assert len(kwargs["deepstack_visual_embeds"]) < len(self._decoder.layers)
            run.take_over_deepstack(kwargs, self.layer)
        return run

    def _choose(self, prompt: Prompt, kwargs: dict) -> tuple[Tensor, Tensor | None]:
        embeds = kwargs["inputs_embeds"]
        tokens, choice = embeds[prompt.visual].detach(), self._choice
        known = None if choice is None else choice.for_next_step(prompt, tokens, self.keep)
        if known is None:
            *known, self.last = choose(
                self.model,
                self.picker,
                self.keep,
                self.newline,
                embeds,
                prompt.numbers,
                prompt.text,
                kwargs.get("position_ids"),
            )
            for merged in self.last.merged:
                merged.write(kwargs)
            length = prompt.ids.shape[1]
            # a step's embeddings are new, so merged tokens are made anew
            forget = prompt.cached or self.last.merged
            self._choice = None if forget else Choice(prompt, length, tokens, self.keep, *known)
        return known

    # --- before the layers: shorten ---

    def _before_layer(self, number: int, module: nn.Module, args: tuple, kwargs: dict):
        run = self._active
        if run is None:
            return None
        hidden, kwargs = args[0], dict(kwargs)
        cache = kwargs.get("past_key_values")
        if run.prefill:
            if number == self.layer:
                hidden = run.state.shorten(hidden)
                if cache is not None:
                    cache.evocomp_state = run.state
            hidden = run.add_deepstack(hidden, number)
            run.shorten_positions(kwargs)
        kwargs["attention_mask"] = self._mask(run, number, hidden, cache)
        if number == len(self._decoder.layers) - 1:
            run.memo.clear()
        return (hidden, *args[1:]), kwargs

    def _mask(self, run: Pass, number: int, hidden: Tensor, cache):
        config, sliding = self._decoder.config, is_sliding(self._decoder.config, number)
        if sliding in run.memo:
            return run.memo[sliding]
        if run.given_mask is not None:
            length = hidden.shape[1]
            mask = gathered_mask(
                run.given_mask,
                run.state.index,
                run.state.valid,
                window=config.sliding_window if sliding and run.windowed else None,
                window_spares_blocks=self._policy.blocks == "prefix",
                columns=length if cache is None else cache.get_mask_sizes(length, number)[0],
            )
        else:
            real = None if run.real is None else run.real.to(hidden.device)
            mask = causal_mask(config, number, hidden, real, cache, always=run.state.log_size is not None)
        if run.state.log_size is not None:
            # a sliding window's cache has forgotten the first keys
            first = 0 if cache is None else cache.get_mask_sizes(hidden.shape[1], number)[1]
            mask = add_log_size(mask, run.state.log_size[:, first:].to(hidden.device), hidden.dtype)
        run.memo[sliding] = mask
        return mask

    def _after_decoder(self, module: nn.Module, args: tuple, output):
        run = self._active
        if run is None or not run.prefill:
            return output
        output.last_hidden_state = run.state.restored(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            # the first is what layer 0 read, number i what layer i - 1 gave; None: not asked for
            first = self.layer + 1 if self.layer else 0
            output.hidden_states = tuple(
                state if state is None or number < first else run.state.restored(state)
                for number, state in enumerate(output.hidden_states)
            )
        return output
