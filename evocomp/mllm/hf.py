"""One adapter over transformers' uniform API: a frozen MLLM that encodes, scores kept tokens, and answers.

It runs the LLM's decoder body on a shortened sequence: text and kept visual tokens at their original positions.
An all-ones attention mask always goes with it: without one, transformers takes gaps in the positions for the
borders of packed sequences and silently masks attention across them.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache
from transformers.utils import logging as transformers_logging

from evocomp.data.example import Example
from evocomp.distributed import Team
from evocomp.log import UserError
from evocomp.mllm import families
from evocomp.mllm.context import Shown, add_log_size, check_weighable
from evocomp.mllm.feature_cache import FeatureCache
from evocomp.mllm.features import Features

_PROMPTS = 200_000  # tokenised prompts remembered; a few kilobytes each

ASSETS = Path(__file__).resolve().parent.parent / "assets"


class FrozenMLLM:
    """A multimodal LLM whose weights never change, for labelling and for judging.

    >>> from evocomp.data.scenes import scene_examples
    >>> mllm = FrozenMLLM.load("nano")
    >>> features = mllm.features(scene_examples(seed=1, start=0, count=1)[:1])[0]
    >>> features.visual.shape, len(features.answer_ids)
    (torch.Size([144, 96]), 1)

    Args:
        model: any supported `...ForConditionalGeneration`, or the same wrapped by PEFT.
        processor: its processor.
        name: what to call it in records.
        cache_bytes: room for encoded pictures; those used least recently are encoded again when asked for.

    Attributes:
        team: the processes that hold the decoder's layers together, if it is sharded.
        cache: where the tower's features lie on disk, if anywhere.
    """

    def __init__(self, model: torch.nn.Module, processor, name: str = "", cache_bytes: int = 2 * 1024**3):
        families.check_supported(model)
        self.model = families.unwrap(model).eval().requires_grad_(False)
        self.processor = processor
        self.name = name
        self.team = Team()
        self.cache: FeatureCache | None = None
        self.decoder = self.model.get_decoder()
        self.head = self.model.get_output_embeddings()
        self.cache_bytes = cache_bytes
        self._bytes = 0
        self._pictures: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._prompts: dict[int, Features] = {}

    @classmethod
    def load(
        cls, name: str, dtype: str = "float32", attention: str = "sdpa", device: str | torch.device = "cpu"
    ) -> "FrozenMLLM":
        """Load `nano` or `nano576` (shipped), a folder, or a Hugging Face id."""
        path = ASSETS / name if (ASSETS / name / "config.json").is_file() else name
        transformers_logging.disable_progress_bar()
        try:
            model = AutoModelForImageTextToText.from_pretrained(
                path, dtype=getattr(torch, dtype), attn_implementation=attention
            )
            processor = AutoProcessor.from_pretrained(path)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"model.name={name} does not load as an image-text-to-text model: {reason}; give `nano`, `nano576`, a "
                "folder with weights and processor, or a Hugging Face id that this machine can reach"
            ) from None
        return cls(model.to(device), processor, name)

    @property
    def device(self) -> torch.device:
        return self.decoder.device

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

    def prompt_embeds(self, features: Features) -> Tensor:
        """Embeddings of the prompt's text tokens [T, D]: what the compressor reads beside the picture."""
        return self.embed(features.prompt_ids[features.text_at])

    def fingerprint(self) -> str:
        """Hash of configuration and weights (a strided sample of each tensor, so that 7B takes seconds).

        The same for a sharded model, whose processes call it together.
        """
        digest = hashlib.sha256(json.dumps(self.model.config.to_dict(), sort_keys=True, default=str).encode())
        for key, value in sorted(self.model.state_dict().items()):
            flat = families.gathered(value.detach()).flatten()
            sample = flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy()
            digest.update(key.encode() + sample.tobytes())
        return digest.hexdigest()[:16]

    # ------------------------------------------------------------ encoding

    @torch.no_grad()
    def features(self, examples: Sequence[Example]) -> list[Features]:
        """Encode examples; a picture that several of them ask about is encoded once.

        Pictures are encoded one at a time: the tower's share of all work is small, and a picture's features then
        never depend, not even in the last bit, on what was encoded beside it.

        Raises:
            UserError: an answer without tokens, or a processor without a chat template.
        """
        return [self._features(example) for example in examples]

    def _process(self, example: Example) -> dict[str, Tensor]:
        if getattr(self.processor, "chat_template", None) is None:
            raise UserError(f"the processor of {self.name} has no chat template; add chat_template.jinja to its folder")
        text = self.processor.apply_chat_template(_messages(example), add_generation_prompt=True, tokenize=False)
        bos = getattr(self.processor.tokenizer, "bos_token", None)
        picture = example.image
        image = Image.open(picture) if isinstance(picture, str) else Image.fromarray(picture)
        try:
            inputs = self.processor(
                text=[text],
                images=[image.convert("RGB")],
                return_tensors="pt",
                # as transformers itself does: templates that write the start mark must not get a second one
                add_special_tokens=not (bos and text.startswith(bos)),
            )
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            what = f"example {example.id} ({example.prompt!r})"
            raise UserError(f"{what}: {self.name}'s processor refuses it: {reason}") from None
        return inputs.to(self.device)

    def _picture(self, key: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Visual tokens [N, D] and the number of the image that each belongs to [N]; remembered while there is room."""
        if key in self._pictures:
            self._pictures.move_to_end(key)
            return self._pictures[key]
        inputs = {**inputs, "pixel_values": inputs["pixel_values"].to(self.vocabulary.dtype)}
        encoded = self.cache.encode(inputs) if self.cache else families.encode(self.model, inputs)
        numbers = families.image_numbers(self.model, inputs["input_ids"], encoded)[0]
        tokens = families.visual_tokens(self.model, inputs["input_ids"], encoded)
        self._pictures[key] = (tokens, numbers[numbers >= 0])
        self._bytes += tokens.numel() * tokens.element_size()
        while self._bytes > self.cache_bytes and len(self._pictures) > 1:
            _, (old, _) = self._pictures.popitem(last=False)
            self._bytes -= old.numel() * old.element_size()
        return self._pictures[key]

    def _features(self, example: Example) -> Features:
        known, key = self._prompts.get(example.id), picture_key(example)
        if known is not None and key in self._pictures:
            return replace(known, visual=self._picture(key, {})[0])
        inputs = self._process(example)
        visual, numbers = self._picture(key, inputs)
        answer = self.processor.tokenizer(example.answer, add_special_tokens=False, return_tensors="pt").input_ids[0]
        if answer.numel() == 0:
            raise UserError(f"the answer {example.answer!r} of example {example.id} has no token; leave it out")
        at = families.visual_mask(self.model, inputs["input_ids"])[0].nonzero()[:, 0]
        if len(at) != len(visual):
            raise UserError(
                f"example {example.id}: {len(at)} placeholders in the prompt, {len(visual)} visual tokens; "
                "does its text hold an image token?"
            )
        positions = families.position_ids(self.model, inputs)
        features = Features(
            id=example.id,
            image_id=example.image_id,
            visual=visual,
            prompt_ids=inputs["input_ids"][0],
            visual_at=at,
            positions=positions[..., 0, :],
            answer_ids=answer.to(self.device),
            image_numbers=numbers,
        )
        if len(self._prompts) >= _PROMPTS:
            self._prompts.clear()
        # without its picture, which has a place of its own
        self._prompts[example.id] = replace(features, visual=visual[:0])
        return features

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

    # ------------------------------------------------------------ the LLM on a shortened sequence

    def assemble(self, features: Features, tokens: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts with `tokens` [Q, R, D] in place of the visual tokens.

        Args:
            index: [Q, R] which visual token's place (0..N-1) each row takes, ascending.

        Returns:
            Embeddings [Q, L, D] and position ids [Q, L] ([4, Q, L] with M-RoPE), L = T + R.
        """
        count = len(tokens)
        text_at = features.text_at
        text = self.embed(features.prompt_ids[text_at]).expand(count, -1, -1)
        at = torch.cat([text_at.expand(count, -1), features.visual_at[index]], dim=1)
        order = at.argsort(dim=1)
        embeds = torch.cat([text, tokens.to(text.dtype)], dim=1)
        embeds = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[2]))
        positions = features.positions[..., at.gather(1, order)]
        if positions.ndim == 3:  # M-RoPE: the text row tells the mask where sequences start; keep it dense
            positions = positions.clone()
            positions[0] = torch.arange(positions.shape[-1], device=positions.device)
        return embeds, positions

    @torch.no_grad()
    def answer_logits(self, features: Features, tokens: Tensor, index: Tensor) -> Tensor:
        """Teacher-forced logits [Q, A, V] (float32) at the answer's positions, for visual `tokens` [Q, R, D]."""
        self.check_scorable()
        embeds, positions = self.assemble(features, tokens, index)
        answer = features.answer_ids
        if len(answer) > 1:
            tail = self.embed(answer[:-1]).expand(len(tokens), -1, -1)
            embeds = torch.cat([embeds, tail], dim=1)
            step = torch.arange(1, len(answer), device=positions.device)
            positions = torch.cat([positions, positions[..., -1:] + step], dim=-1)
        hidden = self.decoder(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        return self.head(hidden[:, -len(answer) :].contiguous()).float()

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[tuple[Features, *tuple[Tensor | None, ...]]], max_new_tokens: int = 8
    ) -> tuple[list[str], Tensor]:
        """Greedy answers for (features, and the fields of what is `Shown` of its picture), in one batch.

        Args:
            prompts: of any lengths; log sizes may be left out.

        Returns:
            The answers as text, and the logits [B, V] of the first answer token.
        """
        self.check_scorable()
        asked = [(features, Shown(*parts)) for features, *parts in prompts]
        rows = [self.assemble(features, shown.tokens[None], shown.places[None]) for features, shown in asked]
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
        cache = DynamicCache(config=self.decoder.config)
        ended = torch.zeros(len(rows), dtype=torch.bool, device=embeds.device)
        stops = torch.tensor(self._stop_ids(), device=embeds.device)
        said: list[Tensor] = []
        first = None
        for _ in range(max_new_tokens):
            hidden = self.decoder(
                inputs_embeds=embeds,
                attention_mask=mask if log_size is None else _weighed(mask, log_size, embeds),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            logits = self.head(hidden[:, -1]).float()
            first = logits if first is None else first
            token = logits.argmax(-1)
            ended |= torch.isin(token, stops)
            said.append(token.masked_fill(ended, self._pad_id()))
            if bool(ended.all()):
                break
            embeds, positions = self.embed(token)[:, None], positions[..., -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        texts = self.processor.tokenizer.batch_decode(torch.stack(said, 1).tolist(), skip_special_tokens=True)
        return [text.strip() for text in texts], first

    def check_scorable(self) -> None:
        """Raise UserError if this family's decoder cannot be run on shortened embeddings alone."""
        policy = families.policy(self.model)
        if policy.deepstack or policy.blocks:
            raise UserError(
                f"{self.model.config.model_type}: labels and panel are not made for families whose decoder needs more "
                "than embeddings (DeepStack, bidirectional image blocks) yet; evocomp.compress works with them"
            )

    def check_weighable(self) -> None:
        """Raise UserError if context tokens cannot have their weights here."""
        config = self.decoder.config
        check_weighable(config)
        types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
        if "sliding_attention" in types if types else window is not None:
            raise UserError(
                f"{self.model.config.model_type}: labels and panel with context tokens are not made for decoders with "
                "sliding windows yet; set compressor.sharp=0, or use evocomp.compress, which works with them"
            )

    def _stop_ids(self) -> list[int]:
        stop = self.model.generation_config.eos_token_id
        stop = self.processor.tokenizer.eos_token_id if stop is None else stop
        return list(stop) if isinstance(stop, list | tuple) else [stop]

    def _pad_id(self) -> int:
        pad = self.processor.tokenizer.pad_token_id
        return self._stop_ids()[0] if pad is None else pad


def _log_sizes(features: Features, shown: Shown) -> Tensor:
    """Log sizes of the rows that `assemble` makes [L]; text tokens stand for themselves."""
    at = torch.cat([features.text_at, features.visual_at[shown.places]])
    sizes = torch.zeros(len(at), device=at.device)
    if shown.log_size is not None:
        sizes[len(features.text_at) :] = shown.log_size
    return sizes[at.argsort()]


def _weighed(real: Tensor, log_size: Tensor, embeds: Tensor) -> Tensor:
    """Attention mask [B, 1, q, keys] of the newest q tokens: real [B, keys] are seen, keys have sizes."""
    new, keys = embeds.shape[1], real.shape[1]
    causal = torch.ones(new, keys, dtype=torch.bool, device=real.device).tril(keys - new)
    return add_log_size(causal & real[:, None, None, :].bool(), log_size, embeds.dtype)


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
