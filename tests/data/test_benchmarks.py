"""Readers of the benchmarks, on small files in their published formats."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from evocomp.config.schema import DataConfig
from evocomp.data import splits
from evocomp.data.benchmarks import TASKS, read_task
from evocomp.data.scoring import score_answer
from evocomp.log import UserError

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVOCOMP_CACHE", str(tmp_path / "cache"))


def picture(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), shade, np.uint8)).save(path)


def packed(shade):
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def base64_of(shade):
    return base64.b64encode(packed(shade)).decode()


def shade(example):
    with Image.open(example.image) as image:
        return int(np.asarray(image.convert("RGB"))[0, 0, 0])


def write_tsv(path, rows):
    columns = list(rows[0])
    lines = ["\t".join(columns), *("\t".join(str(row.get(c, "")) for c in columns) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def gqa(folder):
    asked = {"question": "Is it red?", "imageId": "n1", "answer": "yes", "types": {"structural": "verify"}}
    (folder / "testdev_balanced_questions.json").write_text(json.dumps({"201": asked}))
    picture(folder / "images" / "n1.jpg", 0)


def pope(folder):
    for kind in ("random", "popular"):
        rows = [
            {
                "question_id": i,
                "image": "COCO_1.jpg",
                "text": f"Is there a {thing} in the image?",
                "label": label,
            }
            for i, (thing, label) in enumerate([("dog", "yes"), ("cat", "no")], 1)
        ]
        write_lines(folder / f"coco_pope_{kind}.json", rows)
    picture(folder / "val2014" / "COCO_1.jpg", 10)


def vqav2(folder):
    questions = {
        "data_subtype": "val2014",
        "questions": [{"image_id": 42, "question": "How many?", "question_id": 7}],
    }
    said = [{"answer": "2", "answer_confidence": "yes", "answer_id": i} for i in range(1, 4)]
    said += [{"answer": "3", "answer_confidence": "maybe", "answer_id": i} for i in range(4, 11)]
    note = {
        "question_id": 7,
        "image_id": 42,
        "answer_type": "number",
        "multiple_choice_answer": "3",
        "answers": said,
    }
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps(questions))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": [note]}))
    picture(folder / "val2014" / "COCO_val2014_000000000042.jpg", 20)


def vizwiz(folder):
    answers = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 6
    answers += [{"answer": "soup", "answer_confidence": "no"}] * 4
    asked = {
        "image": "VizWiz_val_0.jpg",
        "question": "What?",
        "answers": answers,
        "answer_type": "unanswerable",
    }
    (folder / "Annotations").mkdir()
    (folder / "Annotations" / "val.json").write_text(json.dumps([asked | {"answerable": 0}]))
    picture(folder / "val" / "VizWiz_val_0.jpg", 30)


def textvqa(folder):
    asked = {
        "question": "what brand?",
        "image_id": "00ab",
        "question_id": 3,
        "answers": ["nokia"] * 9 + ["nok"],
    }
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [asked], "dataset_type": "val"}))
    picture(folder / "train_images" / "00ab.jpg", 40)


def _bench_rows():
    row = {"index": "5", "question": "Which?", "hint": "nan", "A": "cat", "B": "dog", "C": "nan", "D": "nan"}
    row |= {"answer": "B", "category": "identity", "image": base64_of(50)}
    again = row | {"index": "1000005", "A": "dog", "B": "cat", "answer": "A", "image": "5", "hint": "Look."}
    return [row, again]


def mmbench(folder):
    write_tsv(folder / "mmbench_dev_20230712.tsv", _bench_rows())
    write_tsv(folder / "mmbench_dev_cn_20231003.tsv", [_bench_rows()[0] | {"image": base64_of(60)}])


def mmstar(folder):
    question = "What is it?\\nOptions: A: a red cat, B: a dog, C: 3, D: none"
    row = {"index": "0", "question": question, "answer": "C", "category": "math", "image": base64_of(70)}
    write_tsv(folder / "MMStar.tsv", [row])


def mmmu(folder):
    row = {
        "id": "validation_Art_1",
        "question": "<image 1> Who?",
        "options": "['Ann', \"O'B\"]",
        "answer": "B",
    }
    row |= {"question_type": "multiple-choice", "image_1": base64_of(80), "image_2": None}
    two = row | {"id": "validation_Art_2", "image_2": base64_of(81)}
    asked = row | {
        "id": "validation_Math_3",
        "options": "[]",
        "answer": "['4', 'four']",
        "question_type": "open",
    }
    write_lines(folder / "mmmu.jsonl", [row, two, asked])


def scienceqa(folder):
    problem = {
        "question": "Which?",
        "choices": ["ice", "fire"],
        "answer": 1,
        "hint": "Hot.",
        "image": "image.png",
    }
    problem |= {"subject": "natural science"}
    problems = {"3": problem, "4": problem | {"image": None}, "5": problem}
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["5"], "test": ["3", "4"]}))
    picture(folder / "test" / "3" / "image.png", 90)


WRITERS = {w.__name__: w for w in (gqa, pope, vqav2, vizwiz, textvqa, mmbench, mmstar, mmmu, scienceqa)}
WRITERS["mmbench_cn"] = mmbench


# name -> first question: prompt, answer, kind, choices, shade of its image, number of questions
EXPECTED = {
    "gqa": ("Is it red?" + SHORT, "yes", "verify", (), 0, 1),
    "pope": ("Is there a dog in the image?" + SHORT, "yes", "popular", ("yes", "no"), 10, 4),
    "vqav2": ("How many?" + SHORT, "3", "number", (), 20, 1),
    "vizwiz": (
        "What?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT,
        "unanswerable", "unanswerable", (), 30, 1,
    ),
    "textvqa": ("what brand?" + SHORT, "nokia", "", (), 40, 1),
    "mmbench": ("Which?\nA. cat\nB. dog" + LETTER, "B", "identity", ("cat", "dog"), 50, 2),
    "mmbench_cn": ("Which?\nA. cat\nB. dog\n请直接回答选项字母。", "B", "identity", ("cat", "dog"), 60, 1),
    "mmstar": (
        "What is it?\\nOptions: A: a red cat, B: a dog, C: 3, D: none" + LETTER,
        "C", "math", ("a red cat", "a dog", "3", "none"), 70, 1,
    ),
    "mmmu": ("Who?\nA. Ann\nB. O'B" + LETTER, "B", "Art", ("Ann", "O'B"), 80, 2),
    "scienceqa": ("Hot.\nWhich?\nA. ice\nB. fire" + LETTER, "B", "natural science", ("ice", "fire"), 90, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_published_formats(name, tmp_path):
    WRITERS[name](tmp_path)
    examples = read_task(name, tmp_path)
    first = examples[0]
    found = (first.prompt, first.answer, first.kind, first.choices, shade(first), len(examples))
    assert found[:4] == EXPECTED[name][:4]
    assert abs(found[4] - EXPECTED[name][4]) <= 2 and found[5] == EXPECTED[name][5]  # jpeg rounds shades
    assert len({e.id for e in examples}) == len(examples)
    assert [e.id for e in read_task(name, tmp_path)] == [e.id for e in examples]


def test_answers_are_scored_by_each_benchmarks_rule(tmp_path):
    def first(name):
        folder = tmp_path / name
        folder.mkdir()
        WRITERS[name](folder)
        return read_task(name, folder)

    assert score_answer(first("pope")[1], "No, there is not.") == 1
    # 3 of 10 answered 2: leaving out each in turn gives (3 x 2/3 + 7 x 1) / 10
    assert score_answer(first("vqav2")[0], "2") == pytest.approx(0.9)
    assert score_answer(first("textvqa")[0], "nok") == pytest.approx(9 / 30)
    assert score_answer(first("mmstar")[0], "C") == 1
    asked = first("mmmu")[1]
    assert (asked.kind, score_answer(asked, "Four"), score_answer(asked, "5")) == ("Math", 1, 0)


def test_mmbench_rows_that_share_an_image(tmp_path):
    mmbench(tmp_path)
    first, again = read_task("mmbench", tmp_path)
    assert first.image == again.image and first.image_id == again.image_id
    assert again.prompt.startswith("Look.\nWhich?\nA. dog")


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    row = {"index": 0, "question": "Q\nOptions: A: x, B: y", "answer": "A", "category": "c"}
    parquet.write_table(arrow.Table.from_pylist([row | {"image": {"bytes": packed(70), "path": "a.png"}}]),
                        tmp_path / "mmstar.parquet")  # fmt: skip
    (example,) = read_task("mmstar", tmp_path)
    assert (shade(example), example.choices) == (70, ("x", "y"))


def _drop(path):
    return lambda folder: (folder / path).unlink()


def _broken_line(folder):
    (folder / "coco_pope_random.json").write_text('{"a": 1}\n{')


def _no_fields(folder):
    (folder / "TextVQA_0.5.1_val.json").write_text('{"data": [{}]}')


def _no_picture(folder):
    write_tsv(folder / "MMStar.tsv", [{"index": 1, "question": "Q", "answer": "A", "image": "?"}])


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("pope", _drop("val2014/COCO_1.jpg"), "picture COCO_1.jpg is missing; looked in val2014/, images/"),
        ("gqa", _drop("testdev_balanced_questions.json"), "holds no file testdev_balanced"),
        ("pope", _broken_line, "random.json:2: not valid JSON"),
        ("textvqa", _no_fields, "not in the format"),
        ("mmstar", _no_picture, "neither base64 nor bytes"),
        ("mmmu", lambda folder: (folder / "mmmu.jsonl").write_text(""), "no usable question"),
    ],
)
def test_faults_are_reported_in_one_line(name, spoil, message, tmp_path):
    WRITERS[name](tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        read_task(name, tmp_path)


def test_unknown_names_and_folders(tmp_path):
    with pytest.raises(UserError, match="did you mean pope"):
        read_task("popee", tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read_task("pope", tmp_path / "nothing")


def test_as_test_source(tmp_path):
    pope(tmp_path)
    data = DataConfig(test_source=f"pope:{tmp_path}", max_samples=4, val_samples=0, test_samples=3)
    assert len(splits.load_splits(data).test) == 3
    assert {e.kind for e in splits.test_questions(data, questions=100)} == {"random", "popular"}
    with pytest.raises(UserError, match="no benchmark is called popes"):
        splits.load_splits(DataConfig(test_source="popes:x", max_samples=1, val_samples=0))
