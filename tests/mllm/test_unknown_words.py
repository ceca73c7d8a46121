from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from evocomp.data.example import Example
from evocomp.data.scenes import scene_examples
from evocomp.mllm.unknown_words import texts_of, unknown_words, warn_of_unknown_words


def test_words_that_nano_does_not_know(nano):
    tokenizer = nano.processor.tokenizer
    assert unknown_words(tokenizer, ["what is  the big circle?", "big red\n7 dog"]) == ["big", "circle?", "dog"]
    assert unknown_words(tokenizer, texts_of(scene_examples(1, 0, 20, relation=True))) == []


def test_unknown_words_are_listed_in_one_warning(nano, caplog):
    turns = (("is it Tuesday", "no"),)
    asked = [Example(i, "x", "x", "who sits there", "a dog", history=turns) for i in range(50)]
    warn_of_unknown_words(nano.processor.tokenizer, texts_of(asked), "nano")
    (line,) = caplog.messages
    assert line == "nano does not know 5 words and replaces each by the unknown token: who sits dog it Tuesday"
    caplog.clear()
    warn_of_unknown_words(nano.processor.tokenizer, [f"w{i}" for i in range(100)], "nano")
    assert caplog.messages[0].endswith("w19 and 80 more")
    caplog.clear()
    warn_of_unknown_words(nano.processor.tokenizer, ["what is the color"], "nano")
    assert caplog.messages == []


def test_tokenizers_that_fall_back_to_bytes_know_every_word():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({"<unk>": 0, **{a: i + 1 for i, a in enumerate(alphabet)}}, [], unk_token="<unk>"))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    assert unknown_words(PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>"), ["Ünïcode \u2603"]) == []
