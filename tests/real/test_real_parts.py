"""Parts of the real-weights example that need no further package: tower, projector, packing, words of the tokens."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPImageProcessorPil, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from evocomp.data.example import Example
from evocomp.mllm import nano
from evocomp.mllm.hf import FrozenMLLM
from evocomp.scoring.answer_losses import AnswerLosses
from experiments.real.efficientnet import CHANNELS, EfficientNetLite2, EfficientNetLiteConfig, SameConv
from experiments.real.features import token_words
from experiments.real.packing import IGNORE, pack, packed_logits, question_scores, targets
from experiments.real.ridge import as_projector, fit_ridge
from experiments.real.scenes import Item, Question, Scene


@pytest.fixture(scope="module")
def tiny():
    """LLaVA with the real tower (random weights) and a tiny LLM with the vocabulary of the nano MLLM."""
    torch.manual_seed(0)
    words = nano.nano_processor(nano.nano_config()).tokenizer
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=EfficientNetLiteConfig(image_size=64, side=4),
        text_config=text,
        image_seq_length=16,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config).eval()
    pictures = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    processor = LlavaProcessor(
        image_processor=pictures,
        tokenizer=words,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
        chat_template=nano.CHAT_TEMPLATE,
    )
    return model, processor


def test_same_padding_matches_tensorflows_formula():
    """Output size ceil(n / s); the centre of the padding as in TensorFlow, by brute force on a one-hot kernel."""
    for size, kernel, stride in ((9, 3, 2), (8, 3, 2), (8, 5, 2), (7, 5, 1), (260, 3, 2)):
        conv = SameConv(1, 1, kernel, stride, bias=False)
        x = torch.arange(float(size * size)).view(1, 1, size, size)
        conv.weight.data.zero_()
        conv.weight.data[0, 0, 0, 0] = 1.0  # reads the top left corner of each window
        out = conv(x)[0, 0]
        rows = -(-size // stride)
        before = max((rows - 1) * stride + kernel - size, 0) // 2
        padded = F.pad(x[0, 0], (before, kernel, before, kernel))
        assert out.shape == (rows, rows)
        assert torch.equal(out, padded[: rows * stride : stride, : rows * stride : stride])


def test_parameter_count_is_the_published_one():
    assert round(sum(p.numel() for p in EfficientNetLite2().parameters()) / 1e6, 1) == 6.1


@pytest.mark.parametrize(("size", "side"), [(64, 4), (64, 2), (224, 7), (224, 14)])
def test_tower_lays_tokens_out_in_raster_order_with_their_places(size, side):
    from transformers import AutoModel

    tower = AutoModel.from_config(EfficientNetLiteConfig(image_size=size, side=side)).eval()
    with torch.inference_mode():
        tokens = tower(torch.randn(1, 3, size, size)).last_hidden_state
    assert tokens.shape == (1, side * side, tower.config.hidden_size)
    row, column = tokens[0, :, CHANNELS:].split(side, dim=1)
    place = row.argmax(1) * side + column.argmax(1)
    assert torch.equal(place, torch.arange(side * side))


def test_tokens_of_a_smaller_picture_stand_where_they_would_in_the_whole_grid():
    """As for the panel's downsampling: 3 x 3 tokens at the centres of the thirds of a 4 x 4 grid."""
    from transformers import AutoModel

    tower = AutoModel.from_config(EfficientNetLiteConfig(image_size=64, side=4)).eval()
    with torch.inference_mode():
        tokens = tower(torch.randn(1, 3, 48, 48)).last_hidden_state
    row, column = tokens[0, :, CHANNELS:].split(4, dim=1)
    assert (row.argmax(1) * 4 + column.argmax(1)).tolist() == [0, 2, 3, 8, 10, 11, 12, 14, 15]


def test_adapter_takes_stock_llava_with_this_tower(tiny):
    """Scoring with all tokens kept equals transformers' own forward pass."""
    model, processor = tiny
    mllm = FrozenMLLM(model, processor, "tiny")
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    features = mllm.features([Example(1, image, "a", "color of circle", "red")])[0]
    assert features.visual.shape == (16, 32)
    loss = AnswerLosses(mllm).candidates(features, torch.arange(16)[None])
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    ids = torch.cat([features.prompt_ids, features.answer_ids])[None]
    with torch.inference_mode():
        logits = model(input_ids=ids, pixel_values=pixels).logits[0]
    expected = F.cross_entropy(logits[-2:-1], features.answer_ids)
    torch.testing.assert_close(loss[0], expected, atol=1e-5, rtol=1e-5)


def test_saved_folder_loads_as_any_model_does(tiny, tmp_path):
    """As loaded by `evocomp --model.name FOLDER`: sdpa kernel, with weights and buffers of the tower."""
    model, processor = tiny
    model.model.vision_tower.scale.fill_(0.5)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = FrozenMLLM.load(str(tmp_path))
    image = np.random.default_rng(2).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    example = Example(3, image, "c", "how many red", "2")
    expected = FrozenMLLM(model, processor, "tiny").features([example])[0].visual
    torch.testing.assert_close(loaded.features([example])[0].visual, expected)


def test_packed_questions_score_as_if_asked_alone(tiny):
    """Packing does not change results: each question has the logits of a sequence with this question alone."""
    model, processor = tiny
    questions = (
        Question("naming", "color of circle", "red square"),
        Question("yes-no", "any red circle", "no"),
        Question("count", "how many red", "2"),
    )
    scene = Scene(None, (), "red", "color", questions)
    tokenizer = processor.tokenizer
    rows = pack(scene, tokenizer, 40)[None]
    visual = torch.randn(1, 16, 32)
    llm = model.model.language_model
    index = torch.arange(16)[None]
    with torch.inference_mode():
        packed = packed_logits(llm, model.lm_head, visual, index, rows, targets(rows)[0], 16)
    alone = []
    for _, text, answer, *_ in questions:
        prompt = tokenizer(f"\n{text}\n", add_special_tokens=False).input_ids
        reply = tokenizer(answer, add_special_tokens=False).input_ids
        embed = model.get_input_embeddings()
        start = embed(torch.tensor([[tokenizer.bos_token_id]]))
        sequence = torch.cat([start, visual, embed(torch.tensor([[*prompt, *reply]]))], dim=1)
        with torch.inference_mode():
            logits = model.lm_head(llm(inputs_embeds=sequence, use_cache=False).last_hidden_state)
        alone.append(logits[0, -len(reply) - 1 :])
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)
    target = rows[0, 3][rows[0, 3] != IGNORE]
    assert torch.equal(targets(rows)[1], target)
    scores = question_scores(packed, rows, tokenizer.eos_token_id)
    first = F.cross_entropy(alone[0][:2], target[:2]).item()
    assert scores[0] == (0, pytest.approx(first, abs=1e-5), False)


def test_packing_with_kept_tokens_matches_the_adapter(tiny):
    """A few visual tokens with their original positions have the scores of EvoComp's adapter."""
    model, processor = tiny
    mllm = FrozenMLLM(model, processor, "tiny")
    image = np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    features = mllm.features([Example(2, image, "b", "how many red", "2")])[0]
    kept = torch.tensor([[0, 5, 6, 15]])
    expected = AnswerLosses(mllm).candidates(features, kept)
    scene = Scene(None, (), "red", "color", (Question("count", "how many red", "2"),))
    rows = pack(scene, processor.tokenizer, 20)[None]
    with torch.inference_mode():
        parts = (model.model.language_model, model.lm_head, features.visual[kept], kept, rows)
        packed = packed_logits(*parts, targets(rows)[0], 16)
    loss = F.cross_entropy(packed[:1], features.answer_ids, reduction="none")
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)


def test_what_stands_beyond_the_row_is_left_out_whole(tiny):
    tokenizer = tiny[1].tokenizer
    questions = tuple(Question("count", "how many red", str(number)) for number in (1, 2, 3))
    alone = int((pack(Scene(None, (), "red", "color", questions[:1]), tokenizer, 40)[1] >= 0).sum())
    row = pack(Scene(None, (), "red", "color", questions), tokenizer, 3 * alone - 1, [2, 0, 1])
    asked = row[1][row[1] >= 0]
    assert asked.unique_consecutive().tolist() == [2, 0]
    assert row[0][row[1] < 0].eq(tokenizer.pad_token_id).all() and row[3][row[1] < 0].eq(IGNORE).all()


def test_ridge_solves_the_penalised_least_squares_problem(generator):
    x = torch.randn(200, 12, generator=generator)
    y = x @ torch.randn(12, 5, generator=generator) + 3 + 0.1 * torch.randn(200, 5, generator=generator)
    weight, bias = fit_ridge(x, y, penalty=50.0)
    # the same problem as ordinary least squares with extra rows; centring leaves the offset unpenalised
    centred, offset = (x - x.mean(0)).double(), y.mean(0).double()
    extra = torch.cat([centred, (50.0 * 200 / 1000) ** 0.5 * torch.eye(12, dtype=torch.float64)])
    target = torch.cat([y.double() - offset, torch.zeros(12, 5, dtype=torch.float64)])
    expected = torch.linalg.lstsq(extra, target).solution
    torch.testing.assert_close(weight.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bias.double(), offset - x.mean(0).double() @ expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [3, 16, 24])
def test_llavas_projector_computes_the_ridge_map(tiny, rank, generator):
    """Exact up to a rank of half the hidden width, else the best approximation of that rank."""
    projector = LlavaMultiModalProjector(tiny[0].config)
    wide, hidden = projector.linear_1.in_features, projector.linear_1.out_features
    weight = torch.randn(wide, rank, generator=generator) @ torch.randn(rank, hidden, generator=generator)
    bias = torch.randn(hidden, generator=generator)
    projector.load_state_dict(as_projector(weight, bias, projector.state_dict()))
    left, singular, right = torch.linalg.svd(weight, full_matrices=False)
    best = (left[:, : hidden // 2] * singular[: hidden // 2]) @ right[: hidden // 2]
    x = torch.randn(7, wide, generator=generator)
    with torch.inference_mode():
        torch.testing.assert_close(projector(x), x @ best + bias, atol=2e-2, rtol=1e-3)
    if rank <= hidden // 2:
        torch.testing.assert_close(best, weight, atol=1e-2, rtol=1e-3)


def test_token_words_name_what_covers_the_token():
    words = ["fox", "open", "red"]
    items = (Item("fox", False, 0, (0, 0, 32, 64)), Item("open", True, 3, (56, 40, 128, 64)))
    scene = Scene(None, items, "red", "color", ())
    shown = token_words(scene, words, size=128, side=4).view(4, 4).tolist()
    assert shown == [
        [0, 2, 2, 2],
        [0, -1, 1, 1],  # the sign covers a quarter of the second patch: neither sign nor background
        [2, 2, 2, 2],
        [2, 2, 2, 2],
    ]
