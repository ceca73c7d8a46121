# %% [markdown]
# # Which tokens are kept: one image, several questions, several selectors
#
# Needs a trained run: run `evocomp train --config experiments/nano.yaml`, or set the environment variable `EVOCOMP_RUN`
# to the folder of another run.

# %%
# %matplotlib inline
import os

import evocomp
from evocomp.data.scenes import scene_examples
from evocomp.evaluation.panel import Panel, Rival
from evocomp.evaluation.reading import find_path
from evocomp.mllm.features import grid_of
from evocomp.selection import selector
from evocomp.viz import display_name, kept_row, light_up

RUN = find_path(os.environ.get("EVOCOMP_RUN", "runs/nano"))
KEEP = 16

mllm = evocomp.FrozenMLLM.load("nano")
compressor = evocomp.EvoCompCompressor.from_pretrained(f"{RUN}/compressor").eval()
examples = scene_examples(seed=7, start=3, count=1)[:6]
panel = Panel(mllm, examples)
image, grid = examples[0].image, grid_of(panel.asked[0].features)

# %% [markdown]
# ## One image, six questions
#
# The compressor reads the question; a well-trained one keeps different patches for different questions. Bright patches
# are selected tokens; patches of medium brightness are context tokens, each the mean of several dropped tokens.

# %%
kept = panel.compressor_tokens(compressor, KEEP)
answers = panel.compressor(compressor, KEEP).answers
titles = [f"{e.prompt}\n{a} (correct: {e.answer})" for e, a in zip(examples, answers, strict=True)]
kept_row([light_up(image, one.alone, grid, context=one.merged) for one in kept], titles)

# %% [markdown]
# The overlap of the selections for two questions: 100 % means that the question makes no difference.

# %%
sets = [set(one.alone.tolist()) for one in kept]
pairs = [len(a & b) / len(a) for i, a in enumerate(sets) for b in sets[:i]]
print(f"two questions about this image share {100 * sum(pairs) / len(pairs):.0f} % of their selected tokens on average")

# %% [markdown]
# ## Comparison with training-free selectors
#
# Each keeps the same number of tokens for the first question. Methods that merge tokens are left out. FastV reads the
# attention of the LLM, which has to process all tokens first.

# %%
names = ("random_tokens", "uniform_stride", "divprune", "cls_attention", "vispruner", "fastv")
selected = {name: panel.chosen(Rival(selector(name), name), KEEP)[0] for name in names}
titles = [f"EvoComp: {examples[0].prompt}"]
titles += [display_name(name) + " (needs the LLM)" * selector(name).needs_llm for name in names]
pictures = [light_up(image, kept[0].alone, grid, context=kept[0].merged)]
kept_row([*pictures, *(light_up(image, tokens, grid) for tokens in selected.values())], titles)

# %% [markdown]
# ## Correct answers
#
# Six questions are only an illustration; `evocomp eval --run RUN --panel full` compares all methods on all test
# questions.

# %%
outcomes = panel.selectors([Rival(selector(name), name) for name in names], [KEEP])
for outcome in (panel.compressor(compressor, KEEP), *outcomes):
    correct = int(outcome.correct.sum())
    print(f"{display_name(outcome.method):16s} {correct} of {len(outcome.correct)} answers correct")
