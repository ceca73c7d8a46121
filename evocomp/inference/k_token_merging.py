"""K-Token Merging at inference: an LLM with LoRA reads each block of K visual tokens as one (arXiv 2604.15153)."""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evocomp.log import UserError
from evocomp.mllm.features import Features
from evocomp.mllm.hf import FrozenMLLM
from evocomp.selection.k_token_merging import BlockMerger


class KTokenMerger:
    """A merger of token blocks and an LLM with LoRA. The base weights are shared with `mllm` and never changed.

    The merger is that of the authors' code. Their code also has LoRA of rank 4 (alpha 16, dropout 0.05) on the output
    head; here the head stays frozen, because its vocabulary does not change.

    Args:
        mllm: the frozen model to adapt; it is not modified and can still be used.
        block: K, number of visual tokens that are merged into one.
        r: rank of LoRA on every linear layer of the LLM's decoder layers.

    Attributes:
        mllm: the adapted model: the same tower and weights, with LoRA.
        merger: the block encoder, in float32.
    """

    def __init__(self, mllm: FrozenMLLM, block: int, r: int = 8):
        mllm.check_plain()
        weights = {id(tensor): tensor for tensor in (*mllm.model.parameters(), *mllm.model.buffers())}
        self.mllm = FrozenMLLM(copy.deepcopy(mllm.model, weights), mllm.processor, mllm.name)
        layers = self.mllm.decoder.layers
        names = sorted({n.rsplit(".", 1)[-1] for n, m in layers.named_modules() if isinstance(m, nn.Linear)})
        inject_adapter_in_model(LoraConfig(r=r, lora_alpha=2 * r, target_modules=names), layers)
        self.lora = {name: p for name, p in layers.named_parameters() if "lora_" in name}
        self.merger = BlockMerger(mllm.hidden_size, block).to(mllm.device)
        self.block, self.r = block, r
        self.train(False)

    def train(self, on: bool = True) -> None:
        """Enable or disable gradients of merger and LoRA; all other weights stay frozen."""
        for weight in (*self.lora.values(), *self.merger.parameters()):
            weight.requires_grad_(on)

    def merge(self, features: Features) -> tuple[Tensor, Tensor]:
        """Merged tokens [ceil(N / K), D] and their indices among the N tokens, ascending."""
        visual = features.visual
        merged = self.merger(visual.float()).to(visual.dtype)
        return merged, self.merger.positions(len(visual)).to(visual.device)

    def losses(self, features: Sequence[Features]) -> Tensor:
        """Mean negative log-likelihood of each question's answer and end token [B], float32 [nats], with gradients.

        Without the end token in the loss, the adapted LLM would no longer end its answers.
        """
        stop = features[0].answer_ids.new_tensor(self.mllm._stop_ids()[:1])
        features = [replace(one, answer_ids=torch.cat([one.answer_ids, stop])) for one in features]
        rows, ends = [], []
        for one in features:
            tokens, index = self.merge(one)
            embeds, positions = self.mllm.assemble(one, tokens[None], index[None])
            tail = self.mllm.embed(one.answer_ids[:-1])[None]
            after = torch.arange(1, tail.shape[1] + 1, device=positions.device)
            positions = torch.cat([positions, positions[..., -1:] + after], dim=-1)
            rows.append((torch.cat([embeds, tail], dim=1), positions))
            ends.append(rows[-1][0].shape[1])
        longest = max(ends)
        # padding on the right has no influence on earlier tokens in a causal decoder
        embeds = torch.cat([F.pad(e, (0, 0, 0, longest - end)) for (e, _), end in zip(rows, ends, strict=True)])
        positions = torch.cat([F.pad(p, (0, longest - end)) for (_, p), end in zip(rows, ends, strict=True)], -2)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        hidden = self.mllm.decoder(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        counts = [len(one.answer_ids) for one in features]
        answers = [row[end - count : end] for row, end, count in zip(hidden, ends, counts, strict=True)]
        target = torch.cat([one.answer_ids for one in features])
        each = F.cross_entropy(self.mllm.head(torch.cat(answers)).float(), target, reduction="none")
        return torch.stack([part.mean() for part in each.split(counts)])

    @torch.no_grad()
    def answer(self, features: Sequence[Features], max_new_tokens: int = 8) -> list[str]:
        """Greedy answers to one batch of questions."""
        texts, _ = self.mllm.answer([(one, *self.merge(one)) for one in features], max_new_tokens)
        return texts

    def save(self, folder: Path) -> None:
        """Write merger and LoRA (a few megabytes) to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {f"merger.{name}": tensor for name, tensor in self.merger.state_dict().items()}
        weights |= {f"lora.{name}": tensor.detach() for name, tensor in self.lora.items()}
        save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, folder / "weights.safetensors")
        (folder / "config.json").write_text(json.dumps({"block": self.block, "r": self.r, "model": self.mllm.name}))

    @classmethod
    def load(cls, folder: Path, mllm: FrozenMLLM) -> "KTokenMerger":
        """Load what `save` wrote. Raises UserError if it was trained on another model."""
        config = json.loads((folder / "config.json").read_text())
        if config["model"] != mllm.name:
            raise UserError(f"{folder} was trained for model.name={config['model']}, not {mllm.name}")
        found = cls(mllm, config["block"], config["r"])
        weights = load_file(folder / "weights.safetensors")
        merger = {name.removeprefix("merger."): t for name, t in weights.items() if name.startswith("merger.")}
        expected = {name: tensor.shape for name, tensor in found.merger.state_dict().items()}
        if {name: tensor.shape for name, tensor in merger.items()} != expected:
            raise UserError(
                f"{folder} holds a merger of an earlier version with other weights; delete it and train again"
            )
        found.merger.load_state_dict(merger)
        for name, weight in found.lora.items():
            weight.data.copy_(weights[f"lora.{name}"])
        return found
