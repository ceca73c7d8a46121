"""Builds the labeller and its label store from the settings."""

import hashlib
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evocomp import distributed
from evocomp.compressor.config import EvoCompConfig
from evocomp.config.schema import (
    CompressorSection,
    DataConfig,
    GroupingConfig,
    LabelConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    SearchConfig,
)
from evocomp.data.example import Example
from evocomp.data.splits import Splits, digest
from evocomp.grouping.build import Grouper
from evocomp.labels.estimate import say_disk_use
from evocomp.labels.fingerprint import from_settings
from evocomp.labels.hard import HardLabels
from evocomp.labels.labeller import Labeller, Rounds
from evocomp.labels.number_format import resolve_dtypes
from evocomp.labels.on_policy import OnPolicyRounds
from evocomp.labels.random_credit import CreditLabels
from evocomp.labels.searched_credit import SearchedCredits
from evocomp.labels.store import LabelStore
from evocomp.log import is_rank_zero, logger
from evocomp.mllm.feature_cache import FeatureCache
from evocomp.mllm.hf import FrozenMLLM
from evocomp.mllm.reader import picture_key
from evocomp.scoring.scorer import CandidateScorer


def use_feature_cache(config: RunConfig, mllm: FrozenMLLM, splits: Splits) -> None:
    """Give the MLLM the disk cache that the settings name; rank 0 first logs and checks the disk space it needs."""
    if config.model.feature_cache is None:
        return
    cache = mllm.cache = FeatureCache(config.model.feature_cache, mllm.model, mllm.fingerprint())

    def reserve() -> None:
        examples = [*splits.train, *splits.val]
        mllm.readable(examples, most=1)
        images = len({picture_key(example) for example in examples})
        cache.reserve(images, shutil.disk_usage(cache.folder).free)

    distributed.from_rank_0(reserve)


def build_labeller(config: RunConfig, mllm: FrozenMLLM, splits: Splits, folder: Path) -> Labeller:
    """Build the labeller and open its store, whose fingerprint covers everything that round 0 depends on.

    Rounds that depend on the run's compressor cannot be shared between runs: in a shared store (`labels.dir`) each run
    has a separate folder for them.
    """
    config = resolve_dtypes(config, folder)
    store_folder = Path(config.labels.dir) if config.labels.dir else folder / "labels"
    fingerprint = {**from_settings(config), "weights": mllm.fingerprint(), "data": digest(splits.train)}
    scorer, rounds = _scorer_and_rounds(config, mllm, splits)  # before the store, so that rejected settings create none
    store, refreshed = _open_store(store_folder, fingerprint, config.labels.overwrite), None
    if config.labels.dir and follows_compressor(config.labels):
        path = os.path.abspath(folder)
        own = f"refreshed-{folder.name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
        # labels of a read-only disk can be used; what the run makes itself goes to its own folder
        is_writable = distributed.from_rank_0(lambda: (store_folder / own).exists() or os.access(store_folder, os.W_OK))
        parent = store_folder if is_writable else folder / "labels"
        refreshed = _open_store(parent / own, {**fingerprint, "run": path}, overwrite=True)
    if is_rank_zero():
        first = mllm.readable(splits.train, most=1)
        say_disk_use(config, len(splits.train), len(first[0][1].visual) if first else 0, store_folder)
    return Labeller(mllm, scorer, rounds, store, splits.train, refreshed)


def labeller_for(
    mllm: FrozenMLLM,
    examples: Sequence[Example],
    folder: str | Path,
    compressor: EvoCompConfig,
    labels: LabelConfig | None = None,
    *,
    loss: LossConfig | None = None,
    search: SearchConfig | None = None,
    grouping: GroupingConfig | None = None,
    seed: int = 0,
) -> Labeller:
    """A labeller for a Trainer of your own, see `evocomp.training.refresh_labels.RefreshLabels`.

    Args:
        mllm: the frozen model that scores candidate masks.
        examples: the training questions.
        folder: of the run; labels go to FOLDER/labels unless `labels.dir` is set.
        compressor: configuration of the compressor to train: how its masks are made up.
        labels: which labels, and when they are refreshed.
        loss: which loss reads them.
        search, grouping: of searched labels.

    Raises:
        UserError: settings that do not go together, or a label store that was made with others.
    """
    if compressor.hedge:
        mllm.priority_by = compressor.hedge_by
    dtype: Any = str(mllm.model.dtype).removeprefix("torch.")
    config = RunConfig(
        seed=seed,
        model=ModelConfig(name=mllm.name, dtype=dtype),
        data=DataConfig(source="questions"),
        labels=labels or LabelConfig(),
        loss=loss or LossConfig(),
        search=search or SearchConfig(),
        grouping=grouping or GroupingConfig(),
        compressor=CompressorSection(sharp=compressor.sharp, hedge=compressor.hedge),
    )
    return build_labeller(config, mllm, Splits(list(examples), [], []), Path(folder))


def follows_compressor(labels: LabelConfig) -> bool:
    """Whether rounds from 1 on depend on the compressor's scores."""
    return labels.refresh == "on_policy" or (labels.refresh == "search" and labels.warm_start == "scores")


def _open_store(folder: Path, fingerprint: dict[str, Any], overwrite: bool) -> LabelStore:
    """Open the store on rank 0, then on each node's first process (nodes may have separate disks), then on all."""
    if distributed.world_size() == 1:
        return LabelStore.open(folder, fingerprint, overwrite and is_rank_zero())
    for turn in (distributed.rank() == 0, distributed.local_rank() == 0):
        if turn:
            LabelStore.open(folder, fingerprint, overwrite)
        distributed.gather(None)
    return LabelStore.open(folder, fingerprint)


def build_rounds(config: RunConfig, mllm: FrozenMLLM, splits: Splits, store: LabelStore | None) -> Labeller:
    """Build the labeller for the kind of label that the settings name.

    `labels.dtype=auto` scores in the model's dtype; call `resolve_dtypes` first if labels are stored.
    """
    return Labeller(mllm, *_scorer_and_rounds(config, mllm, splits), store, splits.train)


def _scorer_and_rounds(config: RunConfig, mllm: FrozenMLLM, splits: Splits) -> tuple[CandidateScorer, Rounds]:
    settings, ids = config.labels, [example.id for example in splits.train]
    dtype = None if settings.dtype in ("auto", "model") else settings.dtype
    scorer = CandidateScorer(mllm, settings.batch, dtype, config.scorer)
    at_random = settings.target == "credit" and settings.credit_masks_from == "random"
    masks = settings.credit_masks if at_random else config.search.population
    if mllm.shard_group.size > 1 and settings.batch * (mllm.shard_group.size - 1) >= masks:
        logger.warning(
            "labels.batch=%d leaves some of the %d processes that share the model without masks to score; "
            "set --labels.batch=%d",
            settings.batch,
            mllm.shard_group.size,
            math.ceil(masks / mllm.shard_group.size),
        )
    rounds: Rounds
    probabilities = config.loss.name != "listwise"
    some = splits.train[: settings.labelled_at_first(len(splits.train))]
    special = mllm.processor.tokenizer.all_special_ids
    if at_random:
        grouper = Grouper(config.grouping, mllm.vocabulary, special) if settings.credit_of == "group" else None
        rounds = CreditLabels(some, scorer, settings, config.seed, probabilities, grouper)
    else:
        own = [example.id for example in some]
        rounds = HardLabels(own, scorer, config.grouping, config.search, settings, config.seed, special)
        if settings.target == "credit":
            rounds = SearchedCredits(rounds, probabilities)
    if settings.refresh == "on_policy":
        section = config.compressor
        rounds = OnPolicyRounds(rounds, ids, scorer, settings, config.seed, section.sharp, section.hedge)
    return scorer, rounds
