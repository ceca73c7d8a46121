# %% [markdown]
# # Quickstart: a multimodal LLM that looks at a ninth of its visual tokens
#
# Needs a trained compressor. Make one with `evocomp train --config experiments/nano.yaml` (about six minutes on two
# idle cores), or set `EVOCOMP_RUN` to the folder of another run.

# %%
# %matplotlib inline
import os

import numpy as np
from PIL import Image

import evocomp
from evocomp.data.scenes import draw_scene
from evocomp.inference.generate import question, timed_generate
from evocomp.viz import kept_tokens

RUN = os.environ.get("EVOCOMP_RUN", "runs/nano")

# %% [markdown]
# The frozen model: the shipped nano MLLM, an ordinary `LlavaForConditionalGeneration` with 144 visual tokens. Any
# supported Hugging Face model and its processor can stand here instead.

# %%
frozen = evocomp.FrozenMLLM.load("nano")
model, processor = frozen.model, frozen.processor
scene = draw_scene(seed=7, index=12)
asked = scene.questions[0]
picture = Image.fromarray(scene.image)
inputs = question(processor, picture, asked.text)
print(asked.text, "->", asked.answer)

# %% [markdown]
# ## Five lines
#
# The model stays as it is: `compress` adds hooks, and the end of the `with` block takes them away.

# %%
with evocomp.compress(model, f"{RUN}/compressor", keep=16) as handle:
    said = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answer = processor.batch_decode(said[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    kept = handle.last.indices[0][0].numpy()  # of the first prompt's first image

print(f"{answer.strip()!r} from {handle.last.after[0]} of {handle.last.before[0]} visual tokens")

# %% [markdown]
# ## What was kept
#
# Lit patches went into the LLM, dimmed ones did not.

# %%
side = int(np.sqrt(handle.last.before[0]))
kept_tokens(scene.image, kept, (side, side))

# %% [markdown]
# ## The same question with fewer and fewer tokens

# %%
with evocomp.compress(model, f"{RUN}/compressor") as handle:
    for handle.keep in (48, 16, 4):
        timed = timed_generate(model, processor, picture, asked.text, handle, max_new_tokens=4)
        print(f"{timed.after:3d} kept: {timed.text!r}, prompt of {timed.prompt - timed.before + timed.after} tokens")

# %% [markdown]
# On a model of this size everything but the prompt's length is overhead; times of real models are in the report of
# `evocomp bench inference`.
