"""Reference implementation: one prompt through the decoder layers in a loop, without hooks, cache, padding or masks.

Dropped tokens are removed before layer `layer`. The decoder's inputs are captured from the unmodified model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.testing import assert_close

from evocomp.mllm.families import policy
from tests.inference.tiny_models import IMAGE, VIDEO, quiet


@dataclass
class Row:
    """One prompt as input of the unmodified model's decoder, without padding."""

    ids: Tensor  # [S]
    embeds: Tensor  # [S,D]
    positions: Tensor  # [S], or [3,S]
    deepstack: list[Tensor]  # [S,D] each, zeros at text


def rows(model, inputs) -> list[Row]:
    """Capture the decoder's inputs in the prefill of `generate`."""
    seen = {}
    hook = model.get_decoder().register_forward_pre_hook(lambda _, __, kw: seen.update(kw), with_kwargs=True)
    model.generate(**inputs, max_new_tokens=1, **quiet(model))
    hook.remove()
    embeds, positions = seen["inputs_embeds"], seen["position_ids"]
    positions = positions[-3:] if positions.ndim == 3 else positions.expand(len(embeds), -1)
    features = []
    for part in seen.get("deepstack_visual_embeds") or []:
        whole = torch.zeros_like(embeds)
        whole[seen["visual_pos_masks"]] = part
        features.append(whole)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    return [
        Row(
            inputs["input_ids"][b, real],
            embeds[b, real],
            positions[..., b, real],
            [f[b, real] for f in features],
        )
        for b, real in enumerate(mask)
    ]


def extend(model, row: Row, new_ids: Tensor) -> Row:
    """The prompt followed by text tokens, one position each."""
    embeds = model.get_input_embeddings()(new_ids)
    step = torch.arange(1, len(new_ids) + 1)
    return Row(
        ids=torch.cat([row.ids, new_ids]),
        embeds=torch.cat([row.embeds, embeds]),
        positions=torch.cat([row.positions, row.positions[..., -1:] + step], dim=-1),
        deepstack=[torch.cat([f, torch.zeros_like(embeds)]) for f in row.deepstack],
    )


def attends(model, ids: Tensor, index: Tensor, prompt: int, layer: int) -> Tensor:
    """bool [L,L]: which token attends to which; index [L]: indices in the full sequence; prompt: length of
    the prompt."""
    length, blocks = len(index), policy(model).blocks
    config = model.get_decoder().config
    place = torch.arange(length)
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] != "sliding_attention":
        window = None
    visible, near = place[:, None] >= place[None, :], torch.tensor(True)
    if window is not None:
        near = place[:, None] - place[None, :] < window
    if blocks == "prefix":  # reaches beyond the window
        return visible & near | (index[:, None] < prompt) & (index[None, :] < prompt)
    if blocks == "image":  # stays within the window
        is_image = (ids == IMAGE) & (torch.arange(len(ids)) < prompt)
        run = (is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:-1]).cumsum(0)
        block = torch.where(is_image, run, -1)[index]
        visible |= (block[:, None] == block[None, :]) & (block[:, None] >= 0)
    return visible & near


@torch.no_grad()
def logits(model, row: Row, prompt: int, stays: Tensor, layer: int, assignment: list[int]) -> Tensor:
    """Logits [L,V] at the kept tokens. stays bool [S]: kept tokens; the others are dropped before layer `layer`.

    assignment [S]: index of the kept token of each token's cluster. A kept token becomes the mean of its cluster and is
    weighted in the attention by the cluster's size.
    """
    llm, policies = model.get_decoder(), policy(model)
    hidden, index = row.embeds[None], torch.arange(len(row.ids))
    for number, block in enumerate(llm.layers):
        if number == layer:
            index = stays.nonzero().squeeze(1)
            members = [[i for i, owner in enumerate(assignment) if owner == place] for place in index.tolist()]
            hidden = torch.stack([hidden[0, own].mean(0) for own in members])[None]
            often = torch.tensor([float(len(own)) for own in members])
        positions = row.positions[..., index]
        positions = positions[:, None] if positions.ndim == 2 else positions[None]
        extra = (llm.config.layer_types[number],) if policies.blocks == "image" else ()
        mask = torch.zeros(len(index), len(index)).masked_fill(
            ~attends(model, row.ids, index, prompt, number), torch.finfo(torch.float32).min
        )
        if number >= layer:
            mask = mask + often.log()[None, :]
        hidden = block(
            hidden,
            attention_mask=mask[None, None],
            position_embeddings=llm.rotary_emb(hidden, positions, *extra),
            position_ids=row.positions[..., index][None] if row.positions.ndim == 1 else None,
        )
        if number < len(row.deepstack):
            added = row.deepstack[number]
            later = number >= layer
            hidden = hidden + (torch.stack([added[own].mean(0) for own in members]) if later else added)
    scores = model.lm_head(llm.norm(hidden))[0]
    cap = getattr(llm.config, "final_logit_softcapping", None)
    return scores if cap is None else cap * torch.tanh(scores / cap)


def assert_by_hand(out, expected: list[Tensor]) -> None:
    """Assert that logits returned by `generate` equal those of `expected_logits`, within 1e-4 of their spread."""
    for row, wanted in enumerate(expected):
        got = torch.stack([step[row] for step in out.logits])
        assert_close(got, wanted, rtol=1e-4, atol=1e-4 * wanted.std().item())


def expected_logits(model, inputs, sizes, last, sequences: Tensor, layer: int, owners=None) -> list[Tensor]:
    """For every row, logits [new,V] that should have produced the new tokens of `sequences` [B,S+new].

    sizes [row][image]: visual tokens of the images; last: the record whose kept indices are taken as given.
    owners [row][image]: cluster assignment of an image's tokens; None: no clusters.
    """
    new = sequences[:, inputs["input_ids"].shape[1] :]
    found = []
    for number, (row, of_row, kept, tail) in enumerate(zip(rows(model, inputs), sizes, last.indices, new, strict=True)):
        prompt = len(row.ids)
        visual = ((row.ids == IMAGE) | (row.ids == VIDEO)).nonzero().squeeze(1)
        offset, stays = 0, torch.ones(prompt + len(tail) - 1, dtype=torch.bool)
        stays[visual] = False
        assignment = list(range(len(stays)))
        for place, (image, size) in enumerate(zip(kept, of_row, strict=True)):
            own = visual[offset : offset + size]
            stays[own[image]] = True
            if owners is not None:
                for token, owner in enumerate(owners[number][place].tolist()):
                    assignment[int(own[token])] = int(own[owner])
            offset += size
        assert offset == len(visual)
        whole = extend(model, row, tail[:-1])
        found.append(logits(model, whole, prompt, stays, layer, assignment)[-len(tail) :])
    return found
