"""Score of one answer in [0, 1], by the published rules of the benchmarks."""

import re

from evocomp.data.example import Example

_ARTICLES = {"a", "an", "the"}
_NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True))


def score_answer(example: Example, answer: str) -> float:
    """Score by the rule of the example (`extra["scoring"]`), by default exact match."""
    rule = example.extra.get("scoring", "exact")
    return RULES[rule](example, answer)


def exact_match(example: Example, answer: str) -> float:
    """1 if the normalised texts are equal (GQA, scenes)."""
    return float(normalise(answer) == normalise(example.answer))


def yes_no(example: Example, answer: str) -> float:
    """POPE: an answer with "no" or "not" in its first sentence counts as no, any other as yes."""
    words = normalise(re.split(r"[.!?\n]", answer.strip(), maxsplit=1)[0]).split()
    given = "no" if {"no", "not"} & set(words) else "yes"
    return float(given == normalise(example.answer))


def multiple_choice(example: Example, answer: str) -> float:
    """MMBench, MMStar, MMMU, ScienceQA: the letter in the answer, else the only option whose text is in the answer."""
    return float(chosen_letter(answer, example.choices) == example.answer.strip().upper())


def vqa_soft(example: Example, answer: str) -> float:
    """VQAv2, VizWiz, TextVQA: mean of min(1, agreeing others / 3) over each annotator left out in turn."""
    accepted = [normalise(text) for text in example.extra.get("answers", [example.answer])]
    given = normalise(answer)
    if len(accepted) == 1:
        return float(given == accepted[0])
    shares = []
    for left_out in range(len(accepted)):
        agreeing = sum(text == given for i, text in enumerate(accepted) if i != left_out)
        shares.append(min(1.0, agreeing / 3))
    return sum(shares) / len(shares)


def one_of(example: Example, answer: str) -> float:
    """MMMU's open questions: 1 if the normalised text is one of the accepted answers."""
    return float(normalise(answer) in {normalise(text) for text in example.extra.get("answers", [example.answer])})


def normalise(text: str) -> str:
    """Convert to lower case, without punctuation and articles, and with small numbers as digits.

    >>> normalise("The red circle.")
    'red circle'
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower().strip())
    words = re.sub(r"[^\w\s'.:-]|(?<!\d)\.|\.(?!\d)", " ", text).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def chosen_letter(answer: str, choices: tuple[str, ...]) -> str:
    """The option letter in an answer; "" if it has none or several.

    >>> chosen_letter("(B) a dog", ("a cat", "a dog")), chosen_letter("a cat", ("a cat", "a dog"))
    ('B', 'A')
    """
    letters = [chr(ord("A") + i) for i in range(len(choices) or 5)]
    given = normalise(answer)
    texts = [normalise(text) for text in choices]
    if given and texts.count(given) == 1:  # before letters: "A dog" means the option "a dog", not option A
        return letters[texts.index(given)]
    found = re.match(r"\s*\(?([A-Z])\)?(?:[.:),\s]|$)", answer)
    if found and found[1] in letters:
        return found[1]
    found = re.search(r"\b(?i:answer|option)(?: is)?:?\s+\(?([A-Z])\)?(?:[.:),\s]|$)", answer)
    if found and found[1] in letters:
        return found[1]
    named = [letter for letter, text in zip(letters, texts, strict=False) if text and text in given]
    return named[0] if len(named) == 1 else ""


RULES = {
    "exact": exact_match,
    "yes_no": yes_no,
    "multiple_choice": multiple_choice,
    "vqa_soft": vqa_soft,
    "one_of": one_of,
}
