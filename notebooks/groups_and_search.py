# %% [markdown]
# # Groups and search: where the labels come from
#
# Visual tokens whose nearest word is the same form a group; a mask keeps one token of each group; an evolutionary
# search finds the mask with which the frozen MLLM answers best (EvoComp, arXiv 2604.17087, section 3).

# %%
# %matplotlib inline
import json
import os
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

import evocomp
from evocomp.config.schema import SearchConfig
from evocomp.data.scenes import scene_examples
from evocomp.evaluation.reading import agreement
from evocomp.grouping.groups import Groups
from evocomp.grouping.vocabulary import nearest_words
from evocomp.labels.scorer import CandidateScorer
from evocomp.mllm.features import grid_of
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
# ## Groups over the picture, with their nearest words
#
# Uncentred cosine puts most of the background into a few groups; objects fall apart into many small ones. The number
# of groups G, and with it the number of tokens a label keeps, follows from the picture.

# %%
words = [nearest_words(one.visual, mllm.vocabulary)[0].numpy() for one in features]
groups = [Groups.from_ids(ids) for ids in words]
tokenizer = mllm.processor.tokenizer
names = dict(zip(groups[0].of.tolist(), tokenizer.convert_ids_to_tokens(words[0].tolist()), strict=True))
print("groups in each picture:", [g.count for g in groups])
groups_over_image(examples[0].image, groups[0].of, grid, names)

# %% [markdown]
# ## The same on a real vocabulary
#
# Nano has 54 words, SmolLM2 49,152. Four scenes of named pictures, 196 tokens each, seen by an EfficientNet through a
# closed-form projector onto SmolLM2's word embeddings (`experiments/real`; here 2,048 of the rows, from the test
# fixture, so that nothing has to be installed). Left: what the tokens are nearest to with no word left out, as
# published. Rows that were never trained all point one way, and tokens that resemble no word fall on them: hubs.

# %%
fixture = Path(evocomp.__file__).parents[1] / "tests" / "real" / "data"
real, texts = load_file(fixture / "vocabulary.safetensors"), json.loads((fixture / "vocabulary.json").read_text())
pictures = real["features"].float() @ real["weight"].float() + real["bias"].float()
table, shown = real["table"].float(), texts["words"]
masks = {"none left out": None, "reserved": real["special"], "never trained": real["trained"]}
masks["no plain word"] = real["words"]
for name, mask in masks.items():
    nearest = [nearest_words(picture, table, mask)[0] for picture in pictures]
    hubs = np.mean([(~real["trained"][ids]).float().mean().item() for ids in nearest])
    groups_of = [Groups.from_ids(ids.numpy()).count for ids in nearest]
    print(f"{name:>14}: {groups_of} groups a picture, {100 * hubs:.1f} % of the tokens on hubs")
for number, picture in enumerate(pictures):
    there = [shown[i] for i in real["shown"][number].unique().tolist() if i >= 0]
    lines = []
    for mask in (None, real["words"]):
        ids, times = nearest_words(picture, table, mask)[0].unique(return_counts=True)
        lines.append([texts["texts"][ids[i]] for i in times.argsort(descending=True)[:8]])
    print(f"\nshown: {', '.join(there)}\n  all rows    {lines[0]}\n  plain words {lines[1]}")

# %% [markdown]
# Groups of the first scene's tokens over its grid, no word left out (the picture itself is not part of the fixture).

# %%
ids = nearest_words(pictures[0], table)[0]
real_groups = Groups.from_ids(ids.numpy())
named = {group: texts["texts"][word] for group, word in zip(real_groups.of.tolist(), ids.tolist(), strict=True)}
groups_over_image(np.full((224, 224, 3), 255, np.uint8), real_groups.of, (14, 14), named)

# %% [markdown]
# ## The search, generation by generation

# %%
scorer = CandidateScorer(mllm)
strategy = build_strategy(SearchConfig())
results = [
    run(strategy, one_groups, lambda kept, one=one: scorer(one, kept), stream(0, one.id, 0), GENERATIONS)
    for one, one_groups in zip(features, groups, strict=True)
]
print(f"{scorer.forwards} masks scored; {sum(r.saved for r in results)} candidates had been scored before")
search_trace(np.stack([result.trace for result in results]))

# %% [markdown]
# ## How flat is the fitness?
#
# Every mask that was scored, by how much worse than the question's best it is. Where many masks are as good as the
# best, the exact label is chance, and the agreement below says more than any single mask.

# %%
losses = [result.scored_losses for result in results]
near = np.mean([np.mean(one < one.min() + 0.05) for one in losses])
print(f"{100 * near:.0f} % of the masks scored lie within 0.05 nats of their question's best")
fitness_spread(losses)

# %% [markdown]
# ## Which tokens do the masks agree on?
#
# Share of the last population's masks that keep each token, as ranks; and the best mask.

# %%
records = [{"groups": g.of, "population": r.population} for g, r in zip(groups, results, strict=True)]
share = agreement(records[:1], len(groups[0].of))
print(examples[0].prompt, "->", examples[0].answer)
print("kept by at least 9 of 10 masks:", np.flatnonzero(share >= 0.9).tolist())
kept_tokens(heat(examples[0].image, share, grid), results[0].kept, grid)
