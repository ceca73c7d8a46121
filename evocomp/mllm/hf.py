"""A frozen MLLM over transformers' uniform API: encodes examples, scores kept tokens and generates answers.

It runs the LLM's decoder on a shortened sequence: text and kept visual tokens at their original positions. It always
passes an all-ones attention mask. Without one, transformers takes gaps in the positions for boundaries of packed
sequences, and silently masks the attention across them.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache
from transformers.utils import logging as transformers_logging

from evocomp.distributed import ShardGroup
from evocomp.log import UserError
from evocomp.mllm import attention, families
from evocomp.mllm.beside_embeddings import BesideEmbeddings
from evocomp.mllm.cache_argument import CACHE
from evocomp.mllm.context import Shown, add_log_size, check_weighable
from evocomp.mllm.features import Features
from evocomp.mllm.reader import Reader
from evocomp.mllm.weights import load_complete, reason

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHIPPED_MODELS = ("nano", "nano576")
DTYPES = ("float32", "bfloat16", "float16")


class FrozenMLLM(Reader):
    """A multimodal LLM whose weights never change, for labelling and for evaluation.

    >>> from evocomp.data.scenes import scene_examples
    >>> mllm = FrozenMLLM.load("nano")
    >>> features = mllm.features(scene_examples(seed=1, start=0, count=1)[:1])[0]
    >>> features.visual.shape, len(features.answer_ids)
    (torch.Size([144, 96]), 1)

    Attributes:
        shard_group: the processes among which the decoder's layers are sharded, if they are.
    """

    def __init__(self, model: torch.nn.Module, processor, name: str = "", cache_bytes: int = 2 * 1024**3):
        super().__init__(model, processor, name, cache_bytes)
        self.shard_group = ShardGroup()
        self.decoder = families.decoder(self.model)
        self.head = self.model.get_output_embeddings()

    @classmethod
    def load(
        cls, name: str, dtype: str = "float32", attention: str = "sdpa", device: str | torch.device = "cpu"
    ) -> "FrozenMLLM":
        """Load `nano` or `nano576` (shipped), a folder, or a Hugging Face id."""
        if not isinstance(name, str | Path) or not str(name):
            what = repr(name)[:80]
            raise UserError(f"model.name={what} is no name; give `nano`, `nano576`, a folder or a Hugging Face id")
        if dtype not in DTYPES:
            raise UserError(f"model.dtype={dtype}: give one of {', '.join(DTYPES)}")
        name = str(name)
        transformers_logging.disable_progress_bar()
        try:
            path = ASSETS / name if (ASSETS / name / "config.json").is_file() else name
            model = load_complete(
                partial(AutoModelForImageTextToText.from_pretrained, path),
                f"model.name={name}",
                may_have_more=True,
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
            )
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        except UserError:
            raise
        except Exception as error:  # transformers raises whatever it meets in a foreign folder
            raise UserError(
                f"model.name={name:.300} does not load as an image-text-to-text model: {reason(error)}; give `nano`, "
                "`nano576`, a folder with weights and processor, or a Hugging Face id that this machine can reach"
            ) from None
        return cls(model.to(device), processor, name)

    def prompt_embeds(self, features: Features) -> Tensor:
        """Embeddings of the prompt's text tokens [T, D], the compressor's second input besides the visual tokens."""
        return self.embed(features.prompt_ids[features.text_at])

    def fingerprint(self) -> str:
        """Hash of configuration, processor and weights.

        Only a strided sample of each tensor is hashed, so that a 7B model takes seconds. A sharded model has the same
        fingerprint; all processes of its shard group must call this together.
        """
        parts = [self.model.config] if self.processor is None else [self.model.config, self.processor]
        # the processor makes pixels and prompts; its `to_dict` does not include the chat template
        settings = [part.to_dict() for part in parts] + [getattr(self.processor, "chat_template", None)]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for key, value in sorted(self.model.state_dict().items()):
            flat = families.gathered(value.detach()).flatten()
            sample = flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy()
            digest.update(key.encode() + sample.tobytes())
        return digest.hexdigest()[:16]

    # ------------------------------------------------------------ the LLM on a shortened sequence

    def assemble(self, features: Features, tokens: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Build LLM inputs with `tokens` instead of the image's visual tokens.

        Args:
            features: the encoded example.
            tokens: [Q, R, D].
            index: [Q, R] index (0 to N - 1) of the visual token whose position each row takes, ascending.

        Returns:
            Embeddings [Q, L, D] and position ids [Q, L] ([4, Q, L] with M-RoPE), where L = T + M + R (text,
            separators, kept tokens).
        """
        count = len(tokens)
        fixed = features.fixed_rows(self.embed).expand(count, -1, -1)
        at = torch.cat([features.fixed_at.expand(count, -1), features.visual_at[index]], dim=1)
        order = at.argsort(dim=1)
        embeds = torch.cat([fixed, tokens.to(fixed.dtype)], dim=1)
        embeds = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[2]))
        positions = features.positions[..., at.gather(1, order)]
        attention.check_rope(self.decoder.config, positions)
        if positions.ndim == 3:  # M-RoPE: transformers' mask infers packed sequences from gaps in the text row
            positions = positions.clone()
            positions[0] = torch.arange(positions.shape[-1], device=positions.device)
        return embeds, positions

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[tuple[Features, *tuple[Tensor | None, ...]]], max_new_tokens: int = 8
    ) -> tuple[list[str], Tensor]:
        """Generate answers greedily, in one batch.

        Args:
            prompts: for each prompt its features and the fields of `Shown`; `log_size` may be omitted. The prompts
                may differ in length.
            max_new_tokens: maximum length of an answer [tokens].

        Returns:
            The answers as text, and the logits [B, V] of the first answer token.
        """
        self.check_scorable()
        asked = [(features, Shown(*parts)) for features, *parts in prompts]
        rows = [self.assemble(features, shown.tokens[None], shown.places[None]) for features, shown in asked]
        attention.check_rope(self.decoder.config, max(p.max() for _, p in rows) + max_new_tokens - 1)
        longest = max(embeds.shape[1] for embeds, _ in rows)
        pads = [longest - embeds.shape[1] for embeds, _ in rows]
        embeds = torch.cat([torch.nn.functional.pad(e, (0, 0, n, 0)) for (e, _), n in zip(rows, pads, strict=True)])
        positions = torch.cat(
            [torch.nn.functional.pad(p, (n, 0)) for (_, p), n in zip(rows, pads, strict=True)], dim=-2
        )
        places = torch.arange(longest, device=embeds.device)
        mask = (places[None] >= torch.tensor(pads, device=embeds.device)[:, None]).long()
        log_size = None
        if any(shown.log_size is not None for _, shown in asked):
            self.check_weighable()
            sizes = [_log_sizes(features, shown) for features, shown in asked]
            log_size = torch.stack([torch.nn.functional.pad(s, (n, 0)) for s, n in zip(sizes, pads, strict=True)])
        beside = BesideEmbeddings.joined(
            [
                BesideEmbeddings.of(features, shown.places[None]).padded(n, 0)
                for (features, shown), n in zip(asked, pads, strict=True)
            ]
        )
        keywords = self._keywords(beside, mask, embeds)
        cache = DynamicCache(config=self.decoder.config)
        ended = torch.zeros(len(rows), dtype=torch.bool, device=embeds.device)
        stops = torch.tensor(self._stop_ids(), device=embeds.device)
        generated: list[Tensor] = []
        first = None
        for _ in range(max_new_tokens):
            hidden = self.decoder(
                inputs_embeds=embeds,
                **(keywords if log_size is None else {"attention_mask": _weighed(mask, log_size, embeds)}),
                position_ids=positions,
                use_cache=True,
                **{CACHE: cache},
            ).last_hidden_state
            logits = self.head(hidden[:, -1]).float()
            first = logits if first is None else first
            token = logits.argmax(-1)
            ended |= torch.isin(token, stops)
            generated.append(token.masked_fill(ended, self._pad_id()))
            if bool(ended.all()):
                break
            embeds, positions = self.embed(token)[:, None], positions[..., -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            keywords = {"attention_mask": mask}  # an answer has no blocks and no visual tokens
        texts = self.processor.tokenizer.batch_decode(torch.stack(generated, 1).tolist(), skip_special_tokens=True)
        return [text.strip() for text in texts], first

    def check_scorable(self) -> None:
        """Raise UserError if it is not known what this family's decoder reads of a shortened prompt."""
        kind, config = self.model.config.model_type, self.decoder.config
        if not families.in_table(self.model):
            raise UserError(
                f"{kind}: labels and panel are made for these families only: {', '.join(families.FAMILIES)}; "
                "evocomp.compress works with others too"
            )
        policy = families.policy(self.model)
        if policy.blocks == "prefix" and getattr(config, "final_logit_softcapping", None) is not None:
            raise UserError(f"{kind} with a cap on its logits: labels and panel are not made yet; use evocomp.compress")
        if policy.blocks is not None:
            attention.check_masks(config)

    def check_plain(self) -> None:
        """Raise UserError if the decoder needs more than embeddings and a causal mask."""
        self.check_scorable()
        policy = families.policy(self.model)
        if policy.deepstack or policy.blocks:
            raise UserError(
                f"{self.model.config.model_type}: its decoder needs more than embeddings (DeepStack, bidirectional "
                "blocks), which this method does not give it yet"
            )

    def _keywords(self, beside: BesideEmbeddings, real: Tensor, embeds: Tensor) -> dict[str, Any]:
        beyond_window = families.policy(self.model).blocks == "prefix"
        return beside.keywords(self.decoder.config, beyond_window, real, embeds.dtype)

    def check_weighable(self) -> None:
        """Raise UserError if context tokens cannot have their weights here."""
        self.check_plain()
        config = self.decoder.config
        check_weighable(config)
        if not attention.attends_fully(config):
            kinds = ", ".join(sorted(set(attention.layer_types(config)) - {attention.FULL}))
            raise UserError(
                f"{self.model.config.model_type}: labels and the panel do not support context tokens with {kinds} "
                "layers yet; set compressor.sharp=0, or use evocomp.compress, which supports them"
            )

    def _stop_ids(self) -> list[int]:
        stop = self.model.generation_config.eos_token_id
        stop = self.processor.tokenizer.eos_token_id if stop is None else stop
        return list(stop) if isinstance(stop, list | tuple) else [stop]

    def _pad_id(self) -> int:
        pad = self.processor.tokenizer.pad_token_id
        return self._stop_ids()[0] if pad is None else pad


def _log_sizes(features: Features, shown: Shown) -> Tensor:
    """Log cluster sizes [L] of the rows that `assemble` returns; 0 for text and separators."""
    fixed_at = features.fixed_at
    at = torch.cat([fixed_at, features.visual_at[shown.places]])
    sizes = torch.zeros(len(at), device=at.device)
    if shown.log_size is not None:
        sizes[len(fixed_at) :] = shown.log_size
    return sizes[at.argsort()]


def _weighed(real: Tensor, log_size: Tensor, embeds: Tensor) -> Tensor:
    """Additive attention mask [B, 1, q, keys] of the last q tokens.

    real: [B, keys], 0 for padding
    log_size: log cluster sizes of the first keys
    embeds: embeddings of the last q tokens [B, q, D]
    """
    new, keys = embeds.shape[1], real.shape[1]
    causal = torch.ones(new, keys, dtype=torch.bool, device=real.device).tril(keys - new)
    return add_log_size(causal & real[:, None, None, :].bool(), log_size, embeds.dtype)


def load_nano(name: str = "nano") -> tuple[torch.nn.Module, Any]:
    """Load a shipped multimodal LLM and its processor, as instances of transformers' own classes.

    Args:
        name: "nano" (96 x 96 pixels, 144 visual tokens) or "nano576" (192 x 192 pixels, 576 visual tokens).

    >>> model, processor = load_nano()
    >>> type(model).__name__, type(processor).__name__
    ('LlavaForConditionalGeneration', 'LlavaProcessor')
    """
    if name not in SHIPPED_MODELS:
        raise UserError(f"{name!r} is not a shipped model; use one of {', '.join(SHIPPED_MODELS)}")
    loaded = FrozenMLLM.load(name)
    return loaded.model, loaded.processor
