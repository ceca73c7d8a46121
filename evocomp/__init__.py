"""EvoComp: learned visual token compression for multimodal LLMs.

Shapes are written in one alphabet throughout:

====  ==========================================
B     batch
N     visual tokens of an image (before pruning)
T     prompt tokens
A     answer tokens
D     hidden size of the LLM
V     vocabulary
G     groups of visual tokens
Q     candidate masks of one sample
R     visual tokens kept
====  ==========================================
"""

import importlib

__version__ = "0.2.0"

# public name -> module that defines it; imported on first use so that `import evocomp` stays instant
_PUBLIC = {
    "CompressorOutput": "evocomp.compressor.model",
    "EvoCompCompressor": "evocomp.compressor.model",
    "EvoCompConfig": "evocomp.compressor.config",
    "FrozenMLLM": "evocomp.mllm.hf",
    "LabelStore": "evocomp.labels.store",
    "RunConfig": "evocomp.config.schema",
    "UserError": "evocomp.log",
    "compress": "evocomp.inference.hooks",
    "compress_inputs": "evocomp.inference.rewrite",
    "draw_question": "evocomp.data.scenes",
    "load_nano": "evocomp.mllm.hf",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'evocomp' has no attribute {name!r}")


def __dir__():
    return __all__
