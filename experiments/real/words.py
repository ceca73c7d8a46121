"""First stage of the alignment, without the LLM: the projector is trained to classify tokens."""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration

from experiments.real.features import EncodedScenes, scene_words
from experiments.real.recipe import Recipe
from experiments.real.ridge import as_projector, place_vectors, ridge_projector, training_pairs, word_embeddings


def train_words(model: LlavaForConditionalGeneration, encoded: EncodedScenes, recipe: Recipe, tokenizer) -> float:
    """Initialise the projector in closed form and train it, on the device of model and scenes.

    The target of a token is that its nearest word embedding is the word for the object that it shows. Returns the share
    of tokens for which this is so.
    """
    table = model.get_input_embeddings().weight.detach().float()
    spec, projector, tower = recipe.spec(), model.model.multi_modal_projector, model.model.vision_tower
    mean, scale, weight, bias = ridge_projector(encoded, spec, tokenizer, table)
    tower.mean.copy_(mean)
    tower.scale.copy_(scale)
    places = place_vectors(recipe.side, tokenizer, table)
    projector.load_state_dict(as_projector(torch.cat([weight, places]), bias, projector.state_dict()))
    projector.requires_grad_(True)
    own = word_embeddings(scene_words(spec), tokenizer, table)
    at, names = training_pairs(encoded, spec)
    side, generator = recipe.side, torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=recipe.lr_words, weight_decay=0.01)
    hits: list[torch.Tensor] = []
    for step in range(recipe.word_steps):
        optimizer.param_groups[0]["lr"] = recipe.lr_words * (1 - step / recipe.word_steps)
        rows = torch.randint(len(at), (recipe.word_batch,), generator=generator).to(at.device)
        scene, token = at[rows].unbind(1)
        inputs = (encoded.raw[scene, token].float() - mean) * scale
        place = torch.cat([F.one_hot(token // side, side), F.one_hot(token % side, side)], dim=1)
        tokens = projector(torch.cat([inputs, place], dim=1)) - places[token // side] - places[side + token % side]
        # a Gaussian around each word: the correct word must be close, not only closest
        logits = -0.5 * torch.cdist(tokens, own).square()
        loss = F.cross_entropy(logits, names[rows]) + 0.05 * (tokens - own[names[rows]]).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hits = [*hits[-19:], (logits.argmax(1) == names[rows]).float().mean()]
    return float(np.mean([float(hit) for hit in hits])) if hits else float("nan")
