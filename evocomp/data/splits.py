"""Training, validation and test questions. Choices are made on the validation split, results are of the test split."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from evocomp.config.schema import DataConfig
from evocomp.data.benchmarks import read_task, split_source
from evocomp.data.conversations import read_conversations
from evocomp.data.example import Example, image_groups, stable_id
from evocomp.data.images import size_on_disk
from evocomp.data.scenes import SPECS, scene_examples
from evocomp.log import UserError, logger


@dataclass(frozen=True)
class Splits:
    """Questions of the three splits; no image is in more than one split."""

    train: list[Example]
    val: list[Example]
    test: list[Example]


def load_splits(data: DataConfig) -> Splits:
    """The three splits that the settings describe, `data.leave_out` taken out of the training split.

    Raises:
        UserError: sources that cannot be read, a type in `data.leave_out` that no training question has, or no
            question left to train on.
    """
    splits = _all_types(data)
    train = [example for example in splits.train if example.kind not in data.leave_out]
    known = sorted({example.kind for example in splits.train} - {""})
    if unknown := sorted(set(data.leave_out) - set(known)):
        raise UserError(
            f"data.leave_out: no training question is of type {', '.join(unknown)}; types: {', '.join(known) or 'none'}"
        )
    if not train:
        raise UserError("data.leave_out: no training question is left; leave out fewer types")
    return replace(splits, train=train)


def _all_types(data: DataConfig) -> Splits:
    """The three splits with questions of all types.

    Without a separate validation or test source, images are held out of the training source: at most a quarter for
    the test split, an eighth for validation, chosen by a hash of the image's name.
    """
    if data.source == "scenes":
        return Splits(
            drawn(data, data.train_seed, data.max_samples or 600, data.questions_per_image),
            _sized(data.val_source, data, data.val_seed, data.val_samples),
            _sized(data.test_source, data, data.test_seed, data.test_samples),
        )
    examples = read_conversations(data.source, data.image_folder, data.max_bad).examples
    held_out: dict[str, list[Example]] = {"test": [], "val": []}
    for name, source, wanted, share in (
        ("test", data.test_source, data.test_samples, 4),
        ("val", data.val_source, data.val_samples, 8),
    ):
        if source:
            held_out[name] = _sized(source, data, 0, wanted)
        else:
            held_out[name], examples = _hold_out(examples, wanted, share, name)
    if not examples:
        raise UserError(f"data.source={data.source}: no image is left for training; give data.test_source")
    return Splits(examples[: data.max_samples or None], held_out["val"], held_out["test"])


def test_questions(data: DataConfig, questions: int | None = None, seed: int | None = None) -> list[Example]:
    """The test split, optionally with another number of questions or, for scenes, another seed."""
    changed = replace(
        data,
        test_samples=data.test_samples if questions is None else questions,
        test_seed=data.test_seed if seed is None else seed,
        max_samples=1 if data.source == "scenes" else data.max_samples,
        val_samples=0 if data.source == "scenes" else data.val_samples,
    )
    if seed is not None and (data.source != "scenes" or data.test_source):
        raise UserError("--seed draws new scenes; this run was tested on questions from files, which have no seed")
    return _all_types(changed).test


def digest(examples: Sequence[Example]) -> str:
    """Hash of the questions, in order, and of the image sizes: part of a label store's fingerprint.

    The size of a file is its number of bytes, that of pixels is height and width. In long lists only about a thousand
    examples are checked, because each file is a round trip on network storage.
    """
    total = hashlib.sha256()
    for example in examples:
        total.update(json.dumps([example.id, example.prompt, example.answer, example.history]).encode())
        if example.placed:
            total.update(json.dumps(example.placed).encode())
    for example in examples[:: max(1, len(examples) // 1000)]:
        for image in example.images:
            total.update(json.dumps(size_on_disk(image)).encode())
    return total.hexdigest()[:16]


def drawn(data: DataConfig, seed: int, count: int, per_image: int = 0) -> list[Example]:
    """`count` questions about drawn scenes, at most `per_image` per scene (0 = all of its questions)."""
    spec, index = SPECS[data.scenes], 0
    examples: list[Example] = []
    while len(examples) < count:
        asked = scene_examples(seed, index, 1, spec, data.relation)
        if per_image:  # by a hash of the id, so that all kinds are equally frequent
            asked = sorted(asked, key=lambda example: example.id)[:per_image]
        examples.extend(asked)
        index += 1
    return examples[:count]


def _sized(source: str | None, data: DataConfig, seed: int, count: int) -> list[Example]:
    if count == 0:
        return []
    if source is None:
        return drawn(data, seed, count)
    benchmark = split_source(source)
    if benchmark is not None:
        return _some(read_task(*benchmark), count, source)
    return read_conversations(source, data.image_folder, data.max_bad).examples[:count]


def _some(examples: list[Example], count: int, source: str) -> list[Example]:
    """At most `count` questions, chosen by a hash of their ids: the first ones of a file are often of one kind."""
    if len(examples) <= count:
        return examples
    logger.info("%s: %d of its %d questions, chosen by hash; raise the count for all", source, count, len(examples))
    chosen = {e.id for e in sorted(examples, key=lambda e: stable_id("some", e.id))[:count]}
    return [example for example in examples if example.id in chosen]


def _hold_out(examples: list[Example], wanted: int, share: int, name: str) -> tuple[list, list]:
    """Hold out images, in the order of their hashes, until `wanted` questions or 1/`share` of the images are held out.

    Returns the held-out and the remaining questions. Images of the same question stay together.
    """
    group = image_groups(examples)
    groups = sorted(set(group.values()), key=lambda one: stable_id(name, one))
    counts: dict[str, int] = {}
    for example in examples:
        counts[group[example.names[0]]] = counts.get(group[example.names[0]], 0) + 1
    out: set[str] = set()
    questions = 0
    for one in groups[: max(1, len(groups) // share) if len(groups) > 1 else 0]:
        if questions >= wanted:
            break
        out.add(one)
        questions += counts[one]
    taken = [example for example in examples if group[example.names[0]] in out][:wanted]
    return taken, [example for example in examples if group[example.names[0]] not in out]
