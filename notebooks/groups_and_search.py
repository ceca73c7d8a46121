# %% [markdown]
# # Groups and search: the labels of the published recipe
#
# Visual tokens that are nearest to the same word of the LLM's vocabulary form a group. A mask keeps one token of each
# group, and an evolutionary search finds the mask with the lowest answer loss of the frozen MLLM (EvoComp,
# arXiv 2604.17087, section 3). The recipe `plus` does without groups and search: it scores random masks.
#
# Needs no trained run. `EVOCOMP_QUESTIONS` and `EVOCOMP_GENERATIONS` set how much is searched.

# %%
# %matplotlib inline
import json
import os

import numpy as np
from safetensors.torch import load_file

import evocomp
from evocomp.config.schema import SearchConfig
from evocomp.data.scenes import scene_examples
from evocomp.evaluation.reading import agreement, find_path
from evocomp.grouping.groups import Groups
from evocomp.grouping.vocabulary import nearest_words
from evocomp.mllm.features import grid_of
from evocomp.scoring.scorer import CandidateScorer
from evocomp.search import run, stream
from evocomp.search.build import build_strategy
from evocomp.viz import fitness_spread, groups_over_image, heat, search_trace
from evocomp.viz.tokens import kept_tokens

QUESTIONS = int(os.environ.get("EVOCOMP_QUESTIONS", "8"))
GENERATIONS = int(os.environ.get("EVOCOMP_GENERATIONS", "10"))

mllm = evocomp.FrozenMLLM.load("nano")
examples = [e for e in scene_examples(seed=7, start=0, count=QUESTIONS) if e.kind == "digit"][:QUESTIONS]
features = mllm.features(examples)
grid = grid_of(features[0])

# %% [markdown]
# ## Groups of one image, with their nearest words
#
# Most background tokens fall into a few large groups, tokens of objects into many small ones. The number of groups, and
# with it the number of tokens that a label keeps, depends on the image.

# %%
words = [nearest_words(one.visual, mllm.vocabulary)[0].numpy() for one in features]
groups = [Groups.from_ids(ids) for ids in words]
tokenizer = mllm.processor.tokenizer
names = dict(zip(groups[0].of.tolist(), tokenizer.convert_ids_to_tokens(words[0].tolist()), strict=True))
print("number of groups in each image:", [g.count for g in groups])
groups_over_image(examples[0].image, groups[0].of, grid, names)

# %% [markdown]
# ## The same with a real vocabulary
#
# The nano MLLM has 54 words, SmolLM2 has 49,152 tokens. Here: four scenes of named objects, 196 visual tokens each,
# encoded by an EfficientNet and projected into the space of SmolLM2's input embeddings (see `experiments/real`; 2,048
# rows of the embeddings are part of the repository). With all rows allowed, as published, many visual tokens are
# nearest to rows that were never trained: those rows are nearly equal and act as hubs. Each line below excludes more
# rows.

# %%
fixture = find_path("experiments/real/vocabulary")
real, texts = load_file(fixture / "vocabulary.safetensors"), json.loads((fixture / "vocabulary.json").read_text())
images = real["features"].float() @ real["weight"].float() + real["bias"].float()
table, shown = real["table"].float(), texts["words"]
masks = {"all rows": None, "no reserved rows": real["special"], "trained rows": real["trained"]}
masks["plain words"] = real["words"]
for name, mask in masks.items():
    nearest = [nearest_words(image_tokens, table, mask)[0] for image_tokens in images]
    hubs = np.mean([(~real["trained"][ids]).float().mean().item() for ids in nearest])
    groups_of = [Groups.from_ids(ids.numpy()).count for ids in nearest]
    print(f"{name:>16}: {groups_of} groups per image, {100 * hubs:.1f} % of the tokens in groups of untrained rows")
for number, image_tokens in enumerate(images):
    there = [shown[i] for i in real["shown"][number].unique().tolist() if i >= 0]
    lines = []
    for mask in (None, real["words"]):
        ids, times = nearest_words(image_tokens, table, mask)[0].unique(return_counts=True)
        lines.append([texts["texts"][ids[i]] for i in times.argsort(descending=True)[:8]])
    print(f"\nobjects: {', '.join(there)}\n  all rows    {lines[0]}\n  plain words {lines[1]}")

# %% [markdown]
# Groups of the first scene on its grid of tokens, with all rows allowed (the image itself is not in the repository).

# %%
ids = nearest_words(images[0], table)[0]
real_groups = Groups.from_ids(ids.numpy())
names = [text if text.isascii() else "?" for text in texts["texts"]]  # the font of the figure has no other glyphs
named = {group: names[word] for group, word in zip(real_groups.of.tolist(), ids.tolist(), strict=True)}
groups_over_image(np.full((224, 224, 3), 255, np.uint8), real_groups.of, (14, 14), named)

# %% [markdown]
# ## The search
#
# Answer loss by generation: lowest and mean loss of the population, and the lowest loss so far.

# %%
scorer = CandidateScorer(mllm)
strategy = build_strategy(SearchConfig())
results = [
    run(strategy, one_groups, lambda kept, one=one: scorer(one, kept), stream(0, one.id, 0), GENERATIONS)
    for one, one_groups in zip(features, groups, strict=True)
]
known = sum(result.saved for result in results)
print(f"{scorer.forwards} masks scored; {known} candidates had been scored in an earlier generation")
search_trace(np.stack([result.trace for result in results]))

# %% [markdown]
# ## How much better is the best mask?
#
# For every question, the share of scored masks whose loss exceeds the best one by at most the value on the horizontal
# axis. If many masks are nearly as good as the best one, it is a matter of chance which of them becomes the label.

# %%
losses = [result.scored_losses for result in results]
near = np.mean([np.mean(one < one.min() + 0.05) for one in losses])
print(f"{100 * near:.0f} % of the scored masks are within 0.05 nats of the best mask of their question")
fitness_spread(losses)

# %% [markdown]
# ## Tokens that most masks keep
#
# Share of the masks in the last population that keep each token, as ranks from blue to orange. Outlined: the best mask.

# %%
records = [{"groups": g.of, "population": r.population} for g, r in zip(groups, results, strict=True)]
share = agreement(records[:1], len(groups[0].of))
print(f"question: {examples[0].prompt}; correct answer: {examples[0].answer}")
print("tokens that at least 90 % of the masks keep:", np.flatnonzero(share >= 0.9).tolist())
kept_tokens(heat(examples[0].image, share, grid), results[0].kept, grid)
