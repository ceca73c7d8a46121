# %% [markdown]
# # Quickstart: a multimodal LLM that reads a ninth of its visual tokens
#
# Needs a trained compressor: run `evocomp train --config experiments/nano.yaml`, or set the environment variable
# `EVOCOMP_RUN` to the folder of another run.

# %%
# %matplotlib inline
import os

from PIL import Image

import evocomp
from evocomp.data.scenes import draw_scene
from evocomp.evaluation.reading import find_path
from evocomp.inference.generate import question, timed_generate
from evocomp.viz import kept_tokens

RUN = find_path(os.environ.get("EVOCOMP_RUN", "runs/nano"))

# %% [markdown]
# The frozen model: the nano MLLM of the package, an ordinary `LlavaForConditionalGeneration` with 144 visual tokens.
# Any supported Hugging Face model and its processor can take its place. The image is a drawn scene with a question.

# %%
frozen = evocomp.FrozenMLLM.load("nano")
model, processor = frozen.model, frozen.processor
scene = draw_scene(seed=7, index=12)
asked = scene.questions[0]
image = Image.fromarray(scene.image)
inputs = question(processor, image, asked.text)
print(f"question: {asked.text}; correct answer: {asked.answer}")

# %% [markdown]
# ## Compress and generate
#
# `compress` adds hooks to the model and changes nothing else; at the end of the `with` block they are removed.

# %%
with evocomp.compress(model, f"{RUN}/compressor", keep=16) as handle:
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answer = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    kept = handle.last.indices[0][0].numpy()  # of the first image of the first prompt

print(f"answer: {answer.strip()}, from {handle.last.after[0]} of {handle.last.before[0]} visual tokens")

# %% [markdown]
# ## Which tokens were kept
#
# The patches of the kept tokens are bright. If the compressor has context tokens, some of the kept tokens are means of
# several dropped tokens; such a token is drawn at the patch of one of them.

# %%
side = round(handle.last.before[0] ** 0.5)
kept_tokens(scene.image, kept, (side, side))

# %% [markdown]
# ## Fewer and fewer tokens
#
# `handle.keep` can be changed between two calls of `generate`.

# %%
with evocomp.compress(model, f"{RUN}/compressor") as handle:
    for handle.keep in (48, 16, 4):
        timed = timed_generate(model, processor, image, asked.text, handle, max_new_tokens=4)
        length = timed.prompt - timed.before + timed.after
        print(f"{timed.after:3d} visual tokens kept, prompt of {length} tokens: {timed.text}")

# %% [markdown]
# This model is too small to become faster. `evocomp bench inference` measures the time for models of real size.
