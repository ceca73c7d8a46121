"""Groups by nearest word: tokens whose most similar word embedding is the same share a group.

EvoComp (arXiv 2604.17087), section 3. The centred and whitened variants are ours: visual tokens lie in a
narrow cone, so with few words the raw cosine puts most of them into one group.
"""

import torch

from evocomp.grouping.groups import Groups
from evocomp.log import UserError
from evocomp.ops.vocabulary_argmax import vocabulary_argmax

# share of the mean variance that is added to every direction before whitening: an image has fewer tokens
# than dimensions, and the directions without variance must not blow up
WHITENING_SHRINKAGE = 0.1


def vocabulary_groups(
    tokens: torch.Tensor,
    table: torch.Tensor,
    mask: torch.Tensor | None = None,
    centre: bool = False,
    whiten: bool = False,
    chunk: int = 8192,
) -> Groups:
    """Group the visual tokens [N, D] of one image by their nearest row of the word table [V, D].

    See `nearest_words` for the arguments. The number of groups follows from the image.
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
        mask: [V] bool, rows that may win (leave out the rows beyond the tokenizer and the image marker).
        centre: subtract the mean token from the tokens and the mean word from the table first.
        whiten: also scale both by the inverse square root of the tokens' covariance; implies `centre`.
        chunk: words compared at a time, so that no [N, V] matrix exists.

    Ties go to the lowest id; a row of norm 0 never wins. Centring copies the table in float32.
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
            "visual tokens cannot be grouped: a token is not finite, or no word may win; "
            "load the model in bfloat16 or float32 and check which words are left out"
        )
    return index, cosine


def _whitened(tokens: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply (C + s I)^(-1/2) to both; C is the tokens' covariance, known through their thin SVD."""
    _, singular, directions = torch.linalg.svd(tokens, full_matrices=False)
    variance = singular.square() / len(tokens)
    floor = (WHITENING_SHRINKAGE * variance.sum() / tokens.shape[1]).clamp_min(torch.finfo(tokens.dtype).tiny)
    # scaled so that directions without variance keep their length: cosines do not see the common factor
    gain = (floor / (variance + floor)).sqrt() - 1.0
    return tuple(x + (x @ directions.T * gain) @ directions for x in (tokens, table))
