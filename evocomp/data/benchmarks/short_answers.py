"""GQA, POPE, VQAv2, VizWiz, TextVQA: questions that a word or a phrase answers."""

from collections import Counter
from pathlib import Path

from evocomp.data.benchmarks.files import PictureFolder, find, find_all
from evocomp.data.example import Example, stable_id
from evocomp.data.json_records import read_json, read_lines

SHORT = "\nAnswer the question using a single word or phrase."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT


def gqa(folder: Path) -> list[Example]:
    """`testdev_balanced_questions.json` (or val_) and `images/`. arXiv 1902.09506; exact match."""
    questions = read_json(find(folder, "testdev_balanced_questions.json", "*_balanced_questions.json"))
    picture = PictureFolder(folder, ["images"])
    return [
        Example(
            id=stable_id("gqa", number),
            image=picture(f"{asked['imageId']}.jpg"),
            image_id=f"gqa/{asked['imageId']}",
            prompt=asked["question"] + SHORT,
            answer=asked["answer"],
            kind=asked.get("types", {}).get("structural", ""),
            extra={"scoring": "exact"},
        )
        for number, asked in questions.items()
    ]


def pope(folder: Path) -> list[Example]:
    """`coco_pope_{random,popular,adversarial}.json`, a record a line, and `val2014/`. arXiv 2305.10355; yes
    or no."""
    picture = PictureFolder(folder, ["val2014", "images"])
    examples = []
    for path in find_all(folder, "*pope_*.json", "*pope_*.jsonl"):
        kind = path.stem.rsplit("_", 1)[1]
        for asked in read_lines(path):
            examples.append(
                Example(
                    id=stable_id("pope", kind, asked["question_id"]),
                    image=picture(asked["image"]),
                    image_id=f"pope/{asked['image']}",
                    prompt=asked["text"] + SHORT,
                    answer=asked["label"],
                    kind=kind,
                    choices=("yes", "no"),
                    extra={"scoring": "yes_no"},
                )
            )
    return examples


def vqav2(folder: Path) -> list[Example]:
    """`v2_OpenEnded_mscoco_*_questions.json`, `v2_mscoco_*_annotations.json` and `val2014/`. arXiv
    1612.00837."""
    questions = read_json(find(folder, "v2_OpenEnded_mscoco_val2014_questions.json", "*OpenEnded*_questions.json"))
    notes = read_json(find(folder, "v2_mscoco_val2014_annotations.json", "*_annotations.json"))["annotations"]
    notes = {note["question_id"]: note for note in notes}
    subtype = questions.get("data_subtype", "val2014")
    picture = PictureFolder(folder, [subtype, "images"])
    examples = []
    for asked in questions["questions"]:
        name = f"COCO_{subtype}_{asked['image_id']:012d}.jpg"
        note = notes[asked["question_id"]]
        examples.append(
            Example(
                id=stable_id("vqav2", asked["question_id"]),
                image=picture(name),
                image_id=f"vqav2/{asked['image_id']}",
                prompt=asked["question"] + SHORT,
                answer=note["multiple_choice_answer"],
                kind=note["answer_type"],
                extra={"scoring": "vqa_soft", "answers": [a["answer"] for a in note["answers"]]},
            )
        )
    return examples


def vizwiz(folder: Path) -> list[Example]:
    """`val.json` (in `Annotations/`) and `val/`. arXiv 1802.08218; the test split has no answers."""
    path = find(folder, "val.json")
    picture = PictureFolder(folder, [path.stem, "images"])
    examples = []
    for asked in read_json(path):
        answers = [given["answer"] for given in asked["answers"]]
        examples.append(
            Example(
                id=stable_id("vizwiz", asked["image"]),
                image=picture(asked["image"]),
                image_id=f"vizwiz/{asked['image']}",
                prompt=asked["question"] + UNANSWERABLE,
                answer=_most_common(answers),
                kind=asked["answer_type"],
                extra={"scoring": "vqa_soft", "answers": answers},
            )
        )
    return examples


def textvqa(folder: Path) -> list[Example]:
    """`TextVQA_0.5.1_val.json` and `train_images/`, where the pictures of val lie too. arXiv 1904.08920."""
    picture = PictureFolder(folder, ["train_images", "images"])
    return [
        Example(
            id=stable_id("textvqa", asked["question_id"]),
            image=picture(f"{asked['image_id']}.jpg"),
            image_id=f"textvqa/{asked['image_id']}",
            prompt=asked["question"] + SHORT,
            answer=_most_common(asked["answers"]),
            extra={"scoring": "vqa_soft", "answers": list(asked["answers"])},
        )
        for asked in read_json(find(folder, "TextVQA_*_val.json"))["data"]
    ]


def _most_common(answers: list[str]) -> str:
    """The answer that most annotators gave; of equals, the one given first."""
    return Counter(answers).most_common(1)[0][0]
