# %% [markdown]
# # Reading a run: curves, labels and the report as data frames
#
# Works with a run of either recipe. Train one with `evocomp train --config experiments/nano.yaml`, or set the
# environment variable `EVOCOMP_RUN` to the folder of a run.

# %%
# %matplotlib inline
import json
import os

import matplotlib.pyplot as plt
import pandas as pd

from evocomp.evaluation.reading import find_path, label_summaries, read_curves, read_labels, read_rows
from evocomp.viz import display_name, retention_curve

RUN = find_path(os.environ.get("EVOCOMP_RUN", "runs/nano"))
print(RUN)

# %% [markdown]
# ## Accuracy during training
#
# `read_curves` returns every scalar that the run logged, with any logger: name -> list of (step, value). Here: the
# accuracy on the selection split with 48, 32, ... tokens kept by the compressor.

# %%
curves = read_curves(RUN)
counts = sorted((int(name.split("_")[-1]) for name in curves if name.startswith("accuracy/kept_")), reverse=True)
names = {f"{count} kept": f"accuracy/kept_{count}" for count in counts}
accuracy = pd.DataFrame({title: dict(curves[name]) for title, name in names.items()}).rename_axis("step")
accuracy.round(3)

# %% [markdown]
# The last measurement, compared with as many random tokens and with all tokens (uncompressed).

# %%
last = {
    source: [curves[prefix + name][-1][1] for name in names.values()]
    for source, prefix in {"compressor": "", "random tokens": "random/", "uncompressed": "uncompressed/"}.items()
}
pd.DataFrame(last, index=list(names)).round(3)

# %% [markdown]
# ## Losses
#
# Each loss has its own axes, because the scales differ. With the recipe `plus`, the first epochs use the listwise loss
# and the on-policy rounds after them the policy loss.

# %%
losses = {name: points for name, points in curves.items() if name.startswith("train/")}
figure, axes = plt.subplots(len(losses), figsize=(8, 1.7 * len(losses)), sharex=True, layout="constrained")
for ax, (name, points) in zip(axes, losses.items(), strict=True):
    ax.plot(*zip(*points, strict=True), marker=".")
    ax.set_title(name, loc="left", fontsize=10)
    ax.grid(alpha=0.3)
_ = axes[-1].set_xlabel("optimizer step")
# %% [markdown]
# ## Labels
#
# One row per question and round. Round 0 is labelled before training, the later rounds during training; the store keeps
# only the newest of the later rounds. Losses are answer losses of the frozen MLLM in nats: `best_loss` is the loss of
# the best mask of a question, `first_mean` the mean loss of its first masks, `spread` the standard deviation of losses.

# %%
labels = pd.DataFrame(label_summaries(read_labels(RUN))).drop(columns="id")
first = labels[labels["round"] == 0].drop(columns="round").dropna(axis=1, how="all")
first.agg(["mean", "std", "min", "max"]).T.round(3)

# %% [markdown]
# The later rounds. With the recipe `plus`, masks are proposed only for some of the questions of a round; `proposals` is
# 0 for the others.

# %%
later = labels[labels["round"] > 0].groupby("round").mean(numeric_only=True)
later.dropna(axis=1, how="all").round(3)

# %% [markdown]
# ## The report
#
# `read_rows` returns a dict for each method and number of kept tokens. To compare several runs, read the rows of each
# and join them.

# %%
rows = read_rows(RUN)
table = pd.DataFrame([row for row in rows if row["accuracy"] is not None])
table["method"] = table["method"].map(display_name)
compressed = table[table["kept"].isin(counts)]
compressed.pivot_table(index="method", columns="kept", values="accuracy", sort=False)[counts].round(3)

# %%
table[~table["kept"].isin(counts)].set_index("method")[["kept", "accuracy", "low", "high"]].round(3)

# %%
retention_curve(rows)

# %% [markdown]
# ## Cost
#
# The cost of the first labels (`labelling`), of the labels of later rounds (`refresh`) and of training the compressor.
# `forwards` counts the masks that the frozen MLLM has scored.

# %%
cost = json.loads((RUN / "trained.json").read_text())["cost"]
spent = pd.DataFrame({purpose: numbers for purpose, numbers in cost.items() if isinstance(numbers, dict)}).T
spent["share of the time"] = spent["seconds"] / spent["seconds"].sum()
spent.round(2)
