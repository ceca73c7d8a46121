"""Names of selectors as they are printed in reports, charts and notebooks."""

import re

_NAMES = {
    "full": "uncompressed",
    "no_image": "no image",
    "wrong_image": "another image",
    "downsampling": "downsampled image",
    "random": "random tokens",
    "random_tokens": "random tokens",
    "average_pool": "average pooling",
    "cls_attention": "CLS attention",
    "tome": "ToMe",
    "prumerge": "PruMerge",
    "prumerge_plus": "PruMerge+",
    "hired": "HiRED",
    "visionzip": "VisionZip",
    "vispruner": "VisPruner",
    "divprune": "DivPrune",
    "cdpruner": "CDPruner",
    "fastv": "FastV",
    "sparsevlm": "SparseVLM",
    "pyramiddrop": "PyramidDrop",
    "dart": "DART",
    "k_token_merging": "K-Token Merging",
    "evocomp": "EvoComp",
}
_ENDINGS = {"+context": " + context tokens", "_inside": ", inside the LLM"}


def display_name(method: str) -> str:
    """The printed name of a selector; in an unknown name, underscores are replaced by spaces.

    >>> [display_name(name) for name in ("full", "divprune+context", "fastv_inside", "evocomp_plus", "my_method")]
    ['uncompressed', 'DivPrune + context tokens', 'FastV, inside the LLM', 'EvoComp (plus)', 'my method']
    """
    for ending, words in _ENDINGS.items():
        if method.endswith(ending):
            return display_name(method.removesuffix(ending)) + words
    if sibling := re.fullmatch(r"evocomp_(.+)", method):
        return f"EvoComp ({sibling[1].replace('_', ' ')})"
    return _NAMES.get(method, method.replace("_", " "))
