# %% [markdown]
# # What is kept: one picture, several questions, several methods
#
# Needs a trained run: `evocomp train --config experiments/nano.yaml`, or `EVOCOMP_RUN`.

# %%
# %matplotlib inline
import os

import evocomp
from evocomp.data.scenes import scene_examples
from evocomp.evaluation.panel import Panel, Rival
from evocomp.mllm.features import grid_of
from evocomp.selection import selector
from evocomp.viz import kept_row, light_up

RUN = os.environ.get("EVOCOMP_RUN", "runs/nano")
KEEP = 16

mllm = evocomp.FrozenMLLM.load("nano")
compressor = evocomp.EvoCompCompressor.from_pretrained(f"{RUN}/compressor").eval()
examples = scene_examples(seed=7, start=3, count=1)[:6]
panel = Panel(mllm, examples)
image, grid = examples[0].image, grid_of(panel.asked[0].features)

# %% [markdown]
# ## The same picture, different questions
#
# A compressor that reads the question keeps other patches for other questions. One that has not learned enough keeps
# about the same for all of them: look at how much the sets overlap before believing a picture.

# %%
kept = [shown.alone for shown in panel.compressor_tokens(compressor, KEEP)]
answers = panel.compressor(compressor, KEEP).answers
titles = [f"{e.prompt}\n{a} (gold: {e.answer})" for e, a in zip(examples, answers, strict=True)]
kept_row([light_up(image, one, grid) for one in kept], titles)

# %%
sets = [set(one.tolist()) for one in kept]
pairs = [len(a & b) / len(a) for i, a in enumerate(sets) for b in sets[:i]]
print(f"two questions about this picture share {100 * sum(pairs) / len(pairs):.0f} % of their kept tokens")

# %% [markdown]
# ## Rivals side by side
#
# Training-free methods, each with the same number of tokens. Methods that merge tokens have no picture of kept ones
# and are left out. Methods that read the LLM's attention have run the LLM on all tokens first.

# %%
names = ("random_tokens", "uniform_stride", "divprune", "cls_attention", "vispruner", "fastv")
rivals = {name: panel.chosen(Rival(selector(name), name), KEEP)[0] for name in names}
titles = ["evocomp", *(f"{name}{' (reads the LLM)' if selector(name).needs_llm else ''}" for name in names)]
kept_row([light_up(image, one, grid) for one in (kept[0], *rivals.values())], titles)

# %% [markdown]
# ## And do they answer rightly?
#
# Six questions prove nothing; `evocomp eval --run RUN --panel full` asks 1,500.

# %%
outcomes = panel.selectors([Rival(selector(name), name) for name in names], [KEEP])
for outcome in (panel.compressor(compressor, KEEP), *outcomes):
    print(f"{outcome.method:16s} {int(outcome.correct.sum())} of {len(outcome.correct)} right")
