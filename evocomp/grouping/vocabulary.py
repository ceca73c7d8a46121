"""Groups by nearest word: visual tokens with the same most similar word embedding form a group.

Source: EvoComp (arXiv 2604.17087), section 3. The centred and whitened variants are ours. Visual tokens lie in a narrow
cone; with a small vocabulary, the plain cosine therefore puts most of them into one group.
"""

import torch

from evocomp.grouping.groups import Groups
from evocomp.log import UserError
from evocomp.ops.vocabulary_argmax import vocabulary_argmax

# fraction of the mean variance that is added in every direction before whitening: an image has fewer tokens than
# dimensions, and directions without variance must not be scaled to infinity
WHITENING_SHRINKAGE = 0.1


def vocabulary_groups(
    tokens: torch.Tensor,
    table: torch.Tensor,
    mask: torch.Tensor | None = None,
    centre: bool = False,
    whiten: bool = False,
    chunk: int = 8192,
) -> Groups:
    """Group the visual tokens [N, D] of one image by the nearest row of the word embedding table [V, D].

    See `nearest_words` for the arguments. The number of groups depends on the image.
    """
    index, _ = nearest_words(tokens, table, mask, centre, whiten, chunk)
    return Groups.from_ids(index.cpu().numpy())


@torch.no_grad()
def nearest_words(
    tokens: torch.Tensor,
    table: torch.Tensor,
    mask: torch.Tensor | None = None,
    centre: bool = False,
    whiten: bool = False,
    chunk: int = 8192,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest word of each visual token by cosine: (ids [N] int64, cosines [N] float32).

    Args:
        tokens: [N, D] aligned visual tokens of one image.
        table: [V, D] input embeddings of the LLM.
        mask: [V] bool, True for allowed rows (exclude rows beyond the tokenizer's vocabulary, and the image token).
        centre: first subtract the mean token from the tokens and the mean word from the table.
        whiten: also multiply both by the inverse square root of the tokens' covariance; implies `centre`.
        chunk: number of words compared at a time, which avoids an [N, V] matrix.

    Ties go to the lowest id; rows of norm 0 are never the nearest. Centring copies the table in float32.
    """
    if centre or whiten:
        rows = table if mask is None else table[mask]
        tokens = tokens.float() - tokens.float().mean(0)
        table = table.float() - rows.float().mean(0)
    if whiten:
        tokens, table = _whitened(tokens, table)
    index, cosine = vocabulary_argmax(tokens, table, mask, chunk)
    if not torch.isfinite(cosine).all():
        raise UserError(
            "visual tokens cannot be grouped: a token is not finite, or no word is allowed; "
            "load the model in bfloat16 or float32, and check which words are excluded"
        )
    return index, cosine


def _whitened(tokens: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply (C + s I)^(-1/2) to both; the tokens' covariance C is given by their thin SVD."""
    _, singular, directions = torch.linalg.svd(tokens, full_matrices=False)
    variance = singular.square() / len(tokens)
    floor = (WHITENING_SHRINKAGE * variance.sum() / tokens.shape[1]).clamp_min(torch.finfo(tokens.dtype).tiny)
    # scaled so that directions without variance keep their length; a common factor does not affect cosines
    gain = (floor / (variance + floor)).sqrt() - 1.0
    return tuple(x + (x @ directions.T * gain) @ directions for x in (tokens, table))
