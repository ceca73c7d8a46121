"""All settings, with types, units and the source of their defaults. Does not import torch."""

from dataclasses import dataclass, field
from typing import Any, Literal

from evocomp.config.checks import at_least, numbers, require, require_bounded, require_consistent


@dataclass(frozen=True)
class ModelConfig:
    name: str = "nano"
    """The frozen MLLM: `nano` or `nano576` (shipped), a folder, or a Hugging Face id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the frozen weights."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel of the frozen MLLM."""
    feature_cache: str | None = None
    """Folder in which the vision tower's output is cached, so that it runs once per image; default: no cache."""
    shard: int = 1
    """Processes that hold one copy of the frozen MLLM together, for models that do not fit one GPU; 0 = all of a
    node. They score the batches of a sample in parallel: set `labels.batch` to search.population / shard."""

    def __post_init__(self) -> None:
        at_least(self, 0, "model.", "shard")


@dataclass(frozen=True)
class DataConfig:
    source: str = "scenes"
    """`scenes` (drawn on the fly), or LLaVA conversations: a JSON or JSON Lines file, or a folder with data.json."""
    image_folder: str | None = None
    """Folder of the images that the JSON names; default: the folder of the JSON file."""
    max_samples: int = 600
    """Maximum number of training questions; 0 = all."""
    val_samples: int = 400
    """Questions of the validation split, evaluated during training; 0 = none."""
    test_samples: int = 1500
    """Questions of the test split, which is evaluated for the report; 0 = no evaluation."""
    val_source: str | None = None
    """Validation split as JSON or folder; default: drawn scenes, or questions held out of `source`."""
    test_source: str | None = None
    """Test split as JSON or folder, or BENCHMARK:FOLDER (gqa, pope, vqav2, vizwiz, textvqa, mmbench, mmbench_cn,
    mmstar, mmmu, scienceqa) in its published format; default: drawn scenes, or questions held out of `source`."""
    relation: bool = False
    """Scenes: ask the two-hop `relation` questions too."""
    leave_out: tuple[str, ...] = ()
    """Question types that are not trained on; the validation and test splits keep them. Taken out of `max_samples`."""
    questions_per_image: int = 0
    """Scenes: maximum number of training questions per image; 0 = all."""
    scenes: Literal["small", "large"] = "small"
    """Scenes: `small` for `nano` (96 pixels, 4 to 8 objects), `large` for `nano576` (192, 10 to 14, with words)."""
    train_seed: int = 101
    """Scenes: seed of the training images."""
    val_seed: int = 202
    """Scenes: seed of the validation images."""
    test_seed: int = 303
    """Scenes: seed of the test images."""
    max_bad: int = 10
    """Maximum number of faulty records (a missing image, a video, ...) that are skipped before the run stops; the same
    limit holds for images that cannot be decoded, which is detected when the model reads them."""

    max_tokens: int = 0
    """Longest prompt with its answer, image tokens included [tokens]; 0 = the positions that the MLLM was made for."""

    def __post_init__(self) -> None:
        at_least(self, 0, "data.", "max_samples", "val_samples", "test_samples", "max_bad", "questions_per_image")
        at_least(self, 0, "data.", "max_tokens", "train_seed", "val_seed", "test_seed")


@dataclass(frozen=True)
class GroupingConfig:
    method: Literal["vocabulary", "dpc_knn"] = "vocabulary"
    """`vocabulary`: nearest word embedding by cosine (the paper's); `dpc_knn`: density peaks (ablation)."""
    centre: bool = False
    """Subtract the mean visual token and the mean word embedding first; about doubles the number of groups."""
    whiten: bool = False
    """Whiten the embedding space first; gives even more groups."""
    mask_special: bool = False
    """Exclude special tokens from the vocabulary."""
    count: int = 0
    """Split or merge to exactly this number of groups; 0 = no change. Required by dpc_knn."""

    def __post_init__(self) -> None:
        at_least(self, 0, "grouping.", "count")
        require(self.method != "dpc_knn" or self.count > 0, "grouping.method=dpc_knn needs grouping.count > 0")


@dataclass(frozen=True)
class SearchConfig:
    strategy: Literal["published", "uniform_crossover", "cross_entropy", "hill_climb", "gradient_seeded"] = "published"
    """`published` is Algorithm 1 of the paper. `gradient_seeded` needs a backward pass of the MLLM."""
    population: int = 48
    """Candidate masks per generation (q)."""
    parents: int = 12
    """Number of lowest-loss candidates that become parents (p)."""
    generations: int = 10
    """Generations after the first population (L)."""
    crossover: float = 0.9
    """Probability that a child has two parents."""
    mutation: float = 0.2
    """Probability that a group's kept token is replaced by a neighbouring one."""
    patience: int = 0
    """Generations without improvement after which a search ends; 0 = never (Algorithm 1)."""

    def __post_init__(self) -> None:
        at_least(self, 1, "search.", "parents")
        require(
            self.population >= self.parents,
            f"search.population={self.population} is smaller than search.parents={self.parents}: "
            "raise the population or lower the parents",
        )
        at_least(self, 0, "search.", "generations", "patience")
        for name in ("crossover", "mutation"):
            require(0 <= getattr(self, name) <= 1, f"search.{name}={getattr(self, name)}: must lie in [0, 1]")


@dataclass(frozen=True)
class ScorerConfig:
    """Optimizations of the candidate scorer. None of them changes a loss by more than rounding."""

    batched: bool = True
    """Score the candidates of a sample in one forward pass, not one at a time."""
    answers_only: bool = True
    """Compute the output head at the answer's positions only."""
    shared_prefix: Literal["auto", "always", "never"] = "auto"
    """Compute the text before the image once; `auto`: if it is long enough to save time."""
    own_pass: bool = True
    """Run Llama-like decoders by EvoComp's own forward pass, if it agrees with that of transformers for this model."""
    last_layer_at_answers: bool = True
    """Compute the last layer at the answer's positions only (needs own_pass)."""
    first_layer_once: bool = True
    """Compute the first layer's projections once for tokens that several candidates share (needs own_pass)."""
    onednn: bool = True
    """Use oneDNN for float32 matrix products on CPUs (needs own_pass)."""
    memo: bool = True
    """Reuse the loss of a mask that was scored before for the same sample."""
    prefix_reuse: Literal["auto", "always", "never"] = "auto"
    """With search.strategy=hill_climb, compute the tokens before the first change once; `auto`: on GPUs only."""
    fit_memory: bool = True
    """Reduce `labels.batch` to fit the available memory."""


@dataclass(frozen=True)
class LabelConfig:
    dir: str | None = None
    """Folder of the label store, which runs may share; default: RUN_DIR/labels. Rounds that depend on a run's
    compressor are stored in a separate subfolder per run."""
    overwrite: bool = False
    """Delete a label store that was made with other settings."""
    target: Literal["hard", "credit", "random"] = "credit"
    """`hard`: the best mask (published); `credit`: per-token credits; `random`: random labels, as a control."""
    refresh: Literal["none", "search", "on_policy"] = "on_policy"
    """How labels are refreshed at the start of later epochs."""
    refresh_start: int = 2
    """First epoch (counted from 0) that starts with a refresh."""
    refresh_every: int = 1
    """Epochs between refreshes."""
    dtype: Literal["auto", "model", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the LLM while it scores masks; `model` = that of the frozen weights, `auto` = bfloat16 instead
    of float32 if it is faster on this machine (timed once, saved in the run's config)."""
    passes: int = 3
    """Repeats per epoch of each question labelled in round 0; ignored if samples_per_epoch is set."""
    samples_per_epoch: int = 0
    """Questions per epoch, over all processes; 0 = `passes` times the number of questions labelled in round 0."""
    generations_per_refresh: int = 1
    """Search generations that a refresh adds (refresh=search)."""
    warm_start: Literal["population", "scores"] = "population"
    """A refresh continues from the stored population, or replaces half of it by masks sampled from the scores."""
    chunk_size: int = 50
    """Samples per chunk of the store; a crash loses at most the unfinished chunk of each process."""
    batch: int = 64
    """Maximum number of candidate masks scored in one forward pass."""
    credit_masks_from: Literal["random", "search"] = "random"
    """Compute credits from random masks, or from all masks that the search scores (target=credit)."""
    credit_of: Literal["token", "group"] = "token"
    """Credit of each token, or the mean over its semantic group (`grouping`), which reduces noise if there are few
    masks for many tokens (needs credit_masks_from=random and loss.name=listwise)."""
    credit_sizes: tuple[float, ...] = (1 / 18, 1 / 9)
    """Sizes r of the random masks (target=credit); below 1: a fraction of N."""
    credit_masks: int = 32
    """Number of random masks per size (target=credit)."""
    credit_samples: int = 0
    """Number of training questions with credits (target=credit); 0 = all. Refreshes sample from all questions."""
    proposals: int = 16
    """Masks K that the compressor proposes for a sample (refresh=on_policy)."""
    probes: int = 4
    """Proposals that are scored first; if their losses tie, the others are skipped (refresh=on_policy); 0 = score all.
    Late in training four of five samples tie, so probes allow twice the questions for the same compute (LOG)."""
    proposal_sizes: tuple[float, ...] = (1 / 36, 1 / 18, 1 / 9, 2 / 9)
    """Sizes r of proposed masks, context tokens included (refresh=on_policy)."""
    samples_per_refresh: int = 2560
    """Questions sampled by priority at a refresh (refresh=on_policy)."""
    flat: float = 0.1
    """Skip questions whose proposal losses have a standard deviation below this [nats] (refresh=on_policy)."""

    def __post_init__(self) -> None:
        counts = ("refresh_start", "refresh_every", "passes", "chunk_size", "batch", "credit_masks")
        at_least(self, 1, "labels.", *counts, "proposals", "samples_per_refresh")
        at_least(self, 0, "labels.", "generations_per_refresh", "credit_samples", "samples_per_epoch", "flat", "probes")
        numbers(self, "labels.", "credit_sizes", "proposal_sizes")
        for name in ("credit_sizes", "proposal_sizes"):
            sizes = getattr(self, name)
            require(len(sizes) > 0 and min(sizes) > 0, f"labels.{name}={list(sizes)}: give at least one size above 0")
        require(
            self.probes == 0 or 2 <= self.probes <= self.proposals,
            f"labels.probes={self.probes}: must be 0, or from 2 to labels.proposals={self.proposals}",
        )

    def round_of(self, epoch: int) -> int:
        """The label round that an epoch trains on; round 0 is labelled before training starts."""
        started = self.refresh != "none" and epoch >= self.refresh_start
        return 1 + (epoch - self.refresh_start) // self.refresh_every if started else 0

    def labelled_at_first(self, questions: int) -> int:
        """Number of questions that round 0 labels, of `questions` training questions."""
        some = self.credit_samples if self.target == "credit" else 0
        return min(some or questions, questions)


@dataclass(frozen=True)
class LoraConfig:
    r: int = 0
    """Rank of LoRA on the compressor's layer, which must be copied from the LLM (init=layer); 0 = train all weights.
    The adapter is saved in RUN_DIR/adapter, the merged compressor in RUN_DIR/compressor."""
    alpha: int = 32
    """LoRA scale, as in PEFT."""

    def __post_init__(self) -> None:
        at_least(self, 0, "compressor.lora.", "r")
        at_least(self, 1, "compressor.lora.", "alpha")


@dataclass(frozen=True)
class CompressorSection:
    layers: int = 1
    """Transformer layers (the paper has one)."""
    width: int = 0
    """Hidden size of these layers, a multiple of the LLM's hidden size / heads; 0 = the LLM's hidden size (the paper).
    A quarter of it costs about a tenth."""
    use_text: bool = True
    """Read the embeddings of the prompt in addition to the visual tokens."""
    init: Literal["random", "layer"] = "random"
    """Initialise with random weights, or from a layer of the target LLM."""
    init_layer: int = 0
    """Index of the LLM layer to initialise from (init=layer)."""
    head_norm: Literal["layer", "none"] = "layer"
    """Normalisation before the linear head; without it, states of LLM size train poorly."""
    budget_input: bool = True
    """Use the number of kept tokens as an input of the compressor."""
    balance_text: bool = False
    """Start with equal shares of the attention for prompt and image, independent of their lengths: otherwise a question
    of twelve words gets little attention next to 576 visual tokens."""
    dither: float = 0.0
    """Scale of fixed, evenly distributed Gumbel noise that is added to the scores before top-r; 0 = none. With 1,
    tokens are kept as in the masks of on-policy rounds: nearly equal ones are kept from all parts of the image."""
    sharp: float = 1 / 4
    """Maximum number of tokens selected individually (S; below 1: fraction of N). Of R kept tokens R S / (R + S) are
    selected, the rest are attention-weighted means of dropped tokens. 0 disables merging (published)."""
    hedge: float = 0.0
    """Fraction of the selected tokens that a training-free score chooses among those that the compressor did not
    select, which helps questions of types that were not trained on; 0 = none (published)."""
    hedge_by: Literal["auto", "cls_attention", "divprune", "uniform_stride"] = "auto"
    """Training-free score of `hedge`. `auto`: attention of the class token if the tower has one, else DivPrune."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        at_least(self, 1, "compressor.", "layers")
        at_least(self, 0, "compressor.", "width", "init_layer", "dither", "sharp", "hedge")
        require(self.hedge < 1, f"compressor.hedge={self.hedge}: must be a fraction of the selected tokens, below 1")
        require(
            not self.width or self.init == "random",
            f"compressor.width={self.width}: the LLM's layers have another size; set compressor.init=random",
        )
        require(
            not self.lora.r or self.init == "layer",
            f"compressor.lora.r={self.lora.r}: LoRA needs a layer of the LLM; set compressor.init=layer",
        )


@dataclass(frozen=True)
class LossConfig:
    name: Literal["ghm_cs", "ghm", "focal_cs", "bce_cs", "bce", "listwise"] = "listwise"
    """`listwise`: cross entropy with softmax of credits; `ghm_cs`: GHM-C + alpha * cosine separation (the paper)."""
    alpha: float = 0.1
    """Weight of the cosine separation; not given in the paper."""
    form: Literal["histogram", "exact"] = "histogram"
    """GHM's density: histogram of `bins`, or the paper's window of +- eps."""
    bins: int = 10
    """Bins of the gradient-norm histogram."""
    eps: float = 0.05
    """Half width of the exact window."""
    temperature: float = 0.1
    """Temperature of the listwise target softmax(credit / temperature)."""
    clip: float = 0.2
    """Clip range of the policy's probability ratio (refresh=on_policy)."""

    def __post_init__(self) -> None:
        at_least(self, 1, "loss.", "bins")
        at_least(self, 0, "loss.", "alpha")
        for name in ("eps", "temperature"):
            require(getattr(self, name) > 0, f"loss.{name}={getattr(self, name)}: must be above 0")


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["muon", "adamw"] = "muon"
    """`muon`: Muon for the layer's matrices, AdamW for all other weights."""
    muon_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of Muon's Newton-Schulz iteration; `auto` = bfloat16 if it is faster on this machine (timed once,
    saved in the run's config)."""
    lr: float = 2e-3
    """Peak learning rate."""
    refresh_lr: float = 1.5e-3
    """Peak learning rate of a second schedule that starts at `labels.refresh_start`; 0 = a single schedule for the run,
    as without refreshes."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    warmup_steps: int = 30
    """Linear warm-up [optimizer steps]."""
    flat: float = 0.3
    """Fraction of the steps at the peak, before the linear decay to 1 %."""
    batch_size: int = 32
    """Questions per step and process."""
    ema: float = 0.99
    """Decay of the exponential moving average of the weights, which is saved at the end; 0 = off."""

    def __post_init__(self) -> None:
        at_least(self, 1, "optim.", "batch_size")
        require(self.lr > 0, f"optim.lr={self.lr}: must be above 0")
        at_least(self, 0, "optim.", "refresh_lr", "weight_decay", "warmup_steps", "flat", "ema")
        require(self.flat <= 1, f"optim.flat={self.flat}: must be a fraction of the steps, at most 1")
        require(self.ema < 1, f"optim.ema={self.ema}: must lie below 1")


@dataclass(frozen=True)
class EvalConfig:
    kept: tuple[int, ...] = (48, 32, 16, 8, 4)
    """Numbers of kept visual tokens (R) to evaluate."""
    batch: int = 100
    """Questions per forward pass."""
    seeds: int = 3
    """Seeds of the random baseline."""
    resamples: int = 2000
    """Number of bootstrap resamples over images."""
    max_new_tokens: int = 8
    """Maximum length of answers [tokens]."""
    monitor_every: int = 1
    """Epochs between evaluations on the validation split; the last epoch is always evaluated."""
    apart: tuple[str, ...] = ("relation",)
    """Question types reported separately and excluded from the main table."""
    beside: tuple[str, ...] = ()
    """Other run folders to compare with; missing ones are noted and skipped."""
    sheet: int = 12
    """Number of images on kept.png."""

    def __post_init__(self) -> None:
        numbers(self, "eval.", "kept")
        require(len(self.kept) > 0 and min(self.kept) >= 1, "eval.kept: give at least one count >= 1")
        at_least(self, 1, "eval.", "batch", "seeds", "resamples", "max_new_tokens", "monitor_every", "sheet")


@dataclass(frozen=True)
class RunConfig:
    recipe: Literal["plus", "published"] = "plus"
    """Defaults of the other settings: `plus` (ours), or `published` (the paper: hard labels, GHM-C + CS)."""
    run_dir: str = "runs/nano"
    """Folder of this run: settings, labels, checkpoints, compressor, report."""
    seed: int = 0
    """Seed of the initial weights, the sample order and the random masks."""
    threads: int = 0
    """CPU threads of torch; 0 = one per idle core, at most four. With 0, `evocomp train` on a CPU starts one process
    per idle core, at most four, which share each batch."""
    logger: Literal["tensorboard", "csv", "wandb", "none"] = "tensorboard"
    """Logger of the training curves."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    grouping: GroupingConfig = field(default_factory=GroupingConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    compressor: CompressorSection = field(default_factory=CompressorSection)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    """Arguments of Lightning's Trainer (max_epochs, devices, num_nodes, strategy, precision, ...)."""

    def __post_init__(self) -> None:
        at_least(self, 0, "", "seed", "threads")
        require_bounded(self)
        require_consistent(self)
