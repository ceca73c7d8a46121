# %% [markdown]
# # Reading a run: curves, labels and the table as data frames
#
# Needs a trained run: `evocomp train --config experiments/nano.yaml`, or `EVOCOMP_RUN`.

# %%
# %matplotlib inline
import json
import os
from pathlib import Path

import pandas as pd

from evocomp.evaluation.reading import label_summaries, read_curves, read_labels, read_rows
from evocomp.viz import retention_curve

RUN = Path(os.environ.get("EVOCOMP_RUN", "runs/nano"))

# %% [markdown]
# ## Curves
#
# Every scalar of the event files (or of the CSV file, where the run had `logger=csv`).

# %%
curves = read_curves(RUN)
frame = pd.DataFrame(
    [(name, step, value) for name, points in curves.items() for step, value in points],
    columns=["name", "step", "value"],
)
wide = frame.pivot_table(index="step", columns="name", values="value")
sorted(curves)

# %%
accuracy = wide.filter(regex=r"^val/(accuracy|random)_\d+$|^val/full$").dropna(how="all")
accuracy.round(3)

# %%
wide.filter(regex="^train/").dropna(how="all").plot(subplots=True, figsize=(8, 6), grid=True);

# %% [markdown]
# ## Labels
#
# How good the searched masks are beside the first population and beside all tokens, and whether later rounds still
# find better ones. The store keeps round 0 and the newest rounds.

# %%
labels = pd.DataFrame(label_summaries(read_labels(RUN)))
labels.drop(columns="id").groupby("round").mean(numeric_only=True).round(4)

# %%
labels[labels["round"] == 0].filter(["groups", "full_loss", "first_best", "best_loss", "distinct"]).describe().round(3)

# %% [markdown]
# ## The table
#
# Accuracy with its interval; one row a method and budget. Ablations are runs of their own: read several runs and
# join their rows.

# %%
rows = read_rows(RUN)
table = pd.DataFrame(rows)
table = table[table["accuracy"].notna()]
table.pivot_table(index="method", columns="kept", values="accuracy", sort=False).round(3)

# %%
retention_curve(rows)

# %% [markdown]
# ## Where the time went
#
# Labels first, as always: the frozen MLLM scores every candidate mask.

# %%
spent = wide.filter(regex="^time/").dropna(how="all").iloc[-1]  # running totals
pd.DataFrame({"seconds": spent.round(1), "share": (spent / spent.sum()).round(3)})

# %%
json.loads((RUN / "trained.json").read_text())
