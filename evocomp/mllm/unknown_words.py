"""Words that a tokenizer maps to its unknown token: nano's vocabulary has 54 words."""

from collections.abc import Iterable, Sequence

from evocomp.data.example import Example
from evocomp.log import logger

_SHOWN = 20
_NEVER_SEEN = "\u2603\ua66e\u10fb"  # only a tokenizer with byte fallback has tokens for these


def unknown_words(tokenizer, texts: Iterable[str]) -> list[str]:
    """Whitespace-separated words that become the unknown token, in order of first appearance.

    Empty for tokenizers that have no unknown token or that fall back to bytes.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown not in _ids(tokenizer, _NEVER_SEEN):
        return []
    words = dict.fromkeys(word for text in texts for word in text.split())
    return [word for word in words if unknown in _ids(tokenizer, word)]


def warn_of_unknown_words(tokenizer, texts: Iterable[str], name: str) -> None:
    """Log one warning with the words that the model `name` does not know, if there are any."""
    words = unknown_words(tokenizer, texts)
    if words:
        more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
        logger.warning(
            "%s does not know %d %s and replaces each by the unknown token: %s%s",
            name,
            len(words),
            "word" if len(words) == 1 else "words",
            " ".join(words[:_SHOWN]),
            more,
        )


def texts_of(examples: Sequence[Example]) -> Iterable[str]:
    """The texts of the examples: questions, answers and earlier turns."""
    for example in examples:
        yield example.prompt
        yield example.answer
        for turn in example.history:
            yield from turn


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
