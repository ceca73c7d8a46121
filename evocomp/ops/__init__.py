"""Fused tensor operations. Each op has a reference in plain torch, which defines its result, and a Triton kernel.

Import the functions from here: ``from evocomp.ops import top_r_compact``.
"""

from evocomp.ops.context_clusters import context_clusters
from evocomp.ops.ghm_bce import ghm_bce, ghm_histogram
from evocomp.ops.score_separation import cosine_separation, score_separation
from evocomp.ops.top_r_compact import Compacted, top_r_compact
from evocomp.ops.vocabulary_argmax import vocabulary_argmax

__all__ = [
    "Compacted",
    "context_clusters",
    "cosine_separation",
    "ghm_bce",
    "ghm_histogram",
    "score_separation",
    "top_r_compact",
    "vocabulary_argmax",
]
