"""Every setting, typed, with its unit and where its default comes from. No torch in here."""

from dataclasses import dataclass, field
from typing import Any, Literal

from evocomp.config.checks import at_least, require, require_consistent


@dataclass(frozen=True)
class ModelConfig:
    name: str = "nano"
    """The frozen MLLM: `nano` or `nano576` (shipped), a folder, or a Hugging Face id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the frozen weights."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel of the frozen MLLM."""
    feature_cache: str | None = None
    """Folder for what the vision tower makes of each picture, so that it runs once a picture; default: none."""
    shard: int = 1
    """Processes that hold one copy of the frozen MLLM together, for models that do not fit one GPU; 0 = all of a
    node. They score the batches of a sample side by side: set `labels.batch` to search.population / shard."""

    def __post_init__(self) -> None:
        at_least(self, 0, "model.", "shard")


@dataclass(frozen=True)
class DataConfig:
    source: str = "scenes"
    """`scenes` (drawn on the fly), or LLaVA conversations: a JSON or JSON Lines file, or a folder with data.json."""
    image_folder: str | None = None
    """Where the JSON's pictures lie; default: the folder of the JSON file."""
    max_samples: int = 600
    """Largest number of training questions; 0 = all."""
    val_samples: int = 400
    """Questions of the validation split, measured during training; 0 = none."""
    test_samples: int = 1500
    """Questions of the test split, which the report is about; 0 = no evaluation."""
    val_source: str | None = None
    """Selection split as JSON or folder; default: drawn scenes, or questions held out of `source`."""
    test_source: str | None = None
    """Test split as JSON or folder, or BENCHMARK:FOLDER (gqa, pope, vqav2, vizwiz, textvqa, mmbench, mmbench_cn,
    mmstar, mmmu, scienceqa) in its published format; default: drawn scenes, or questions held out of `source`."""
    relation: bool = False
    """Scenes: ask the two-hop `relation` questions too."""
    questions_per_image: int = 0
    """Scenes: training questions taken from one picture, at most; 0 = all."""
    scenes: Literal["small", "large"] = "small"
    """Scenes: `small` for `nano` (96 pixels, 4 to 8 objects), `large` for `nano576` (192, 10 to 14, words to read)."""
    train_seed: int = 101
    """Scenes: seed of the training pictures."""
    val_seed: int = 202
    """Scenes: seed of the selection pictures."""
    test_seed: int = 303
    """Scenes: seed of the test pictures."""
    max_bad: int = 10
    """Faulty records (a missing image, a video, ...) that are skipped before the run gives up; and as many whose image
    does not decode, which is found when the model reads it."""

    def __post_init__(self) -> None:
        at_least(self, 0, "data.", "max_samples", "val_samples", "test_samples", "max_bad", "questions_per_image")


@dataclass(frozen=True)
class GroupingConfig:
    method: Literal["vocabulary", "dpc_knn"] = "vocabulary"
    """`vocabulary`: nearest word embedding by cosine (the paper's); `dpc_knn`: density peaks (ablation)."""
    centre: bool = False
    """Subtract the mean visual token and the mean word first; about doubles the number of groups."""
    whiten: bool = False
    """Whiten the embedding space first; more groups still."""
    mask_special: bool = False
    """Leave special tokens out of the vocabulary."""
    count: int = 0
    """Split or merge to exactly this many groups; 0 = as found. dpc_knn needs it."""

    def __post_init__(self) -> None:
        at_least(self, 0, "grouping.", "count")
        require(self.method != "dpc_knn" or self.count > 0, "grouping.method=dpc_knn needs grouping.count > 0")


@dataclass(frozen=True)
class SearchConfig:
    strategy: Literal["published", "uniform_crossover", "cross_entropy", "hill_climb", "gradient_seeded"] = "published"
    """`published` is Algorithm 1 of the paper. `gradient_seeded` needs a backward pass of the MLLM."""
    population: int = 48
    """Candidate masks a round (q)."""
    parents: int = 12
    """Lowest-loss candidates that have children (p)."""
    generations: int = 10
    """Rounds after the first population (L)."""
    crossover: float = 0.9
    """Probability that a child has two parents."""
    mutation: float = 0.2
    """Probability that a group's kept token moves one place."""
    patience: int = 0
    """Rounds without gain after which a search ends; 0 = never (Algorithm 1)."""

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
    """Savings of the candidate scorer. None of them changes a loss by more than rounding."""

    batched: bool = True
    """Score the candidates of a sample in one forward, not one at a time."""
    answers_only: bool = True
    """Run the head at the answer's positions only."""
    shared_prefix: Literal["auto", "always", "never"] = "auto"
    """Compute the text before the picture once; `auto`: where it is long enough to be worth it."""
    own_pass: bool = True
    """Run Llama-like decoders by a lean pass of our own, where it agrees with transformers' on this very model."""
    last_layer_at_answers: bool = True
    """Compute the last layer at the answer's positions only (needs own_pass)."""
    first_layer_once: bool = True
    """Project rows that several candidates share once in the first layer (needs own_pass)."""
    onednn: bool = True
    """Matrix products in float32 by oneDNN on CPUs (needs own_pass)."""
    memo: bool = True
    """Score no mask of a sample twice."""
    prefix_reuse: Literal["auto", "always", "never"] = "auto"
    """In search.strategy=hill_climb, compute the tokens before the first flip once; `auto`: on GPUs, where it pays."""
    fit_memory: bool = True
    """Lower `labels.batch` to what fits the memory."""


@dataclass(frozen=True)
class LabelConfig:
    dir: str | None = None
    """Label store, which runs may share; default: RUN_DIR/labels. Rounds that follow a run's compressor have a folder
    of the run's own in it."""
    overwrite: bool = False
    """Delete a label store that was made with other settings."""
    target: Literal["hard", "credit", "random"] = "credit"
    """`hard`: the best mask (published); `credit`: per-token credits; `random`: the control with no information."""
    refresh: Literal["none", "search", "on_policy"] = "on_policy"
    """What RefreshLabels does at the start of later epochs."""
    refresh_start: int = 2
    """First epoch (counted from 0) that begins with a refresh."""
    refresh_every: int = 1
    """Epochs between refreshes."""
    dtype: Literal["auto", "model", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the LLM while it scores masks; `model` = the frozen weights' own, `auto` = bfloat16 in place of
    float32 where this machine is faster with it (timed once, saved in the run's config)."""
    passes: int = 3
    """Repeats per epoch of each question labelled in round 0; ignored if samples_per_epoch is set."""
    samples_per_epoch: int = 0
    """Questions per epoch, over all processes; 0 = `passes` times those labelled in round 0."""
    generations_per_refresh: int = 1
    """Rounds of search that a refresh adds (refresh=search)."""
    warm_start: Literal["population", "scores"] = "population"
    """A refresh goes on from the stored population, or replaces half of it by masks drawn from the scores."""
    chunk_size: int = 50
    """Samples in a chunk of the store: what a crash may cost."""
    batch: int = 64
    """Largest number of candidate masks scored in one forward."""
    credit_masks_from: Literal["random", "search"] = "random"
    """Credits of random masks, or of all the masks that `search` scores (target=credit)."""
    credit_of: Literal["token", "group"] = "token"
    """Each token's own credit, or the mean over its semantic group (`grouping`), which takes the noise out of few
    masks where there are many tokens (credits of random masks, loss.name=listwise)."""
    credit_sizes: tuple[float, ...] = (1 / 18, 1 / 9)
    """Sizes r of the random masks (target=credit); below 1: a share of N."""
    credit_masks: int = 32
    """Random masks of each size (target=credit)."""
    credit_samples: int = 0
    """Training questions that get credits (target=credit); 0 = all. Refreshes draw from all of them either way."""
    proposals: int = 16
    """Masks K that the compressor proposes for a sample (refresh=on_policy)."""
    probes: int = 4
    """Proposals that are scored first; a sample on which they tie gets no more (refresh=on_policy); 0 = all at once.
    Late in training that is four of five, so probes buy twice the questions for the same forwards (LOG)."""
    proposal_sizes: tuple[float, ...] = (1 / 36, 1 / 18, 1 / 9, 2 / 9)
    """Sizes r of proposed masks, context tokens included (refresh=on_policy)."""
    samples_per_refresh: int = 2560
    """Questions drawn by priority at a refresh (refresh=on_policy)."""
    flat: float = 0.1
    """Skip questions whose proposal losses have a standard deviation below this [nats] (refresh=on_policy)."""

    def __post_init__(self) -> None:
        counts = ("refresh_start", "refresh_every", "passes", "chunk_size", "batch", "credit_masks")
        at_least(self, 1, "labels.", *counts, "proposals", "samples_per_refresh")
        at_least(self, 0, "labels.", "generations_per_refresh", "credit_samples", "samples_per_epoch", "flat", "probes")
        for name in ("credit_sizes", "proposal_sizes"):
            sizes = getattr(self, name)
            require(len(sizes) > 0 and min(sizes) > 0, f"labels.{name}={list(sizes)}: give at least one size above 0")
        require(
            self.probes == 0 or 2 <= self.probes <= self.proposals,
            f"labels.probes={self.probes}: must be 0, or from 2 to labels.proposals={self.proposals}",
        )

    def round_of(self, epoch: int) -> int:
        """The round of labels that an epoch trains on; 0 are those before there is a compressor."""
        started = self.refresh != "none" and epoch >= self.refresh_start
        return 1 + (epoch - self.refresh_start) // self.refresh_every if started else 0

    def labelled_at_first(self, questions: int) -> int:
        """How many of so many training questions round 0 labels."""
        some = self.credit_samples if self.target == "credit" else 0
        return min(some or questions, questions)


@dataclass(frozen=True)
class LoraConfig:
    r: int = 0
    """Rank of the adapters on the compressor's layer, which must be one of the LLM's (init=layer); 0 = train it whole.
    The adapter alone goes to RUN_DIR/adapter, folded into its layer to RUN_DIR/compressor."""
    alpha: int = 32
    """LoRA's scale, as in peft."""

    def __post_init__(self) -> None:
        at_least(self, 0, "compressor.lora.", "r")
        at_least(self, 1, "compressor.lora.", "alpha")


@dataclass(frozen=True)
class CompressorSection:
    layers: int = 1
    """Transformer layers (the paper has one)."""
    width: int = 0
    """Their hidden size, a multiple of the LLM's hidden size / heads; 0 = the LLM's own (the paper). A quarter of it
    costs about a tenth."""
    use_text: bool = True
    """Read the prompt's embeddings too."""
    init: Literal["random", "layer"] = "random"
    """Start from noise, or from a layer of the target LLM."""
    init_layer: int = 0
    """Which LLM layer to start from (init=layer)."""
    head_norm: Literal["layer", "none"] = "layer"
    """Normalise before the linear head; unnormalised LLM-sized states train badly."""
    budget_input: bool = True
    """Tell the compressor how many tokens will be kept."""
    balance_text: bool = False
    """Begin with equal shares of the attention for prompt and picture, whatever their lengths: a question of twelve
    words beside 576 visual tokens is hardly seen otherwise."""
    dither: float = 0.0
    """Scale of a fixed, evenly spread Gumbel noise that scores get before the highest are kept; 0 = none. At 1 tokens
    are kept as the masks of on-policy rounds are drawn: of nearly equal ones, some from everywhere."""
    sharp: float = 1 / 4
    """Maximum number of tokens selected individually (S; below 1: fraction of N). Of R kept tokens R S / (R + S) are
    selected, the rest are attention-weighted means of dropped tokens. 0 disables merging (published)."""
    hedge: float = 0.0
    """Share of the selected tokens that a training-free score chooses among those that the compressor leaves, so that
    questions of a type that was not trained on still find what is important in the image; 0 = none (published)."""
    hedge_by: Literal["auto", "cls_attention", "divprune", "uniform_stride"] = "auto"
    """That score. `auto`: attention of the class token where the vision tower has one, else DivPrune."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        at_least(self, 1, "compressor.", "layers")
        at_least(self, 0, "compressor.", "width", "init_layer", "dither", "sharp", "hedge")
        require(self.hedge < 1, f"compressor.hedge={self.hedge}: a share of the selected tokens, below 1")
        require(
            not self.width or self.init == "random",
            f"compressor.width={self.width}: a layer of the LLM does not fit into it; set compressor.init=random",
        )
        require(
            not self.lora.r or self.init == "layer",
            f"compressor.lora.r={self.lora.r}: adapters belong to a layer of the LLM; set compressor.init=layer",
        )


@dataclass(frozen=True)
class LossConfig:
    name: Literal["ghm_cs", "ghm", "focal_cs", "bce_cs", "bce", "listwise"] = "listwise"
    """`listwise`: softmaxed credits; `ghm_cs`: GHM-C + alpha * cosine separation (the paper's)."""
    alpha: float = 0.1
    """Weight of the cosine separation; not given in the paper."""
    form: Literal["histogram", "exact"] = "histogram"
    """GHM's density: histogram of `bins`, or the paper's window of +- eps."""
    bins: int = 10
    """Bins of the gradient-norm histogram."""
    eps: float = 0.05
    """Half width of the exact window."""
    temperature: float = 0.1
    """Of the listwise target softmax(credit / temperature)."""
    clip: float = 0.2
    """Of the policy's probability ratio (refresh=on_policy)."""

    def __post_init__(self) -> None:
        at_least(self, 1, "loss.", "bins")
        at_least(self, 0, "loss.", "alpha")
        for name in ("eps", "temperature"):
            require(getattr(self, name) > 0, f"loss.{name}={getattr(self, name)}: must be above 0")


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["muon", "adamw"] = "muon"
    """`muon`: Muon on the layer's matrices, AdamW on the rest."""
    muon_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of Muon's Newton-Schulz iteration; `auto` = bfloat16 where this machine is faster with it (timed
    once, saved in the run's config)."""
    lr: float = 2e-3
    """Peak learning rate."""
    refresh_lr: float = 1.5e-3
    """Peak of a second schedule that starts at `labels.refresh_start`; 0 = one schedule for the whole run, as without
    refreshes."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    warmup_steps: int = 30
    """Linear warm-up [optimizer steps]."""
    flat: float = 0.3
    """Share of the steps at the peak, before the linear fall to 1 %."""
    batch_size: int = 32
    """Questions per step and process."""
    ema: float = 0.99
    """Decay of the weight average that is kept at the end; 0 = off."""

    def __post_init__(self) -> None:
        at_least(self, 1, "optim.", "batch_size")
        require(self.lr > 0, f"optim.lr={self.lr}: must be above 0")
        at_least(self, 0, "optim.", "refresh_lr", "weight_decay", "warmup_steps", "flat", "ema")
        require(self.flat <= 1, f"optim.flat={self.flat}: a share of the steps, at most 1")
        require(self.ema < 1, f"optim.ema={self.ema}: must lie below 1")


@dataclass(frozen=True)
class EvalConfig:
    kept: tuple[int, ...] = (48, 32, 16, 8, 4)
    """Numbers of visual tokens kept (R) that are evaluated."""
    batch: int = 100
    """Questions in one forward."""
    seeds: int = 3
    """Seeds of the random baseline."""
    resamples: int = 2000
    """Bootstrap resamples over pictures."""
    max_new_tokens: int = 8
    """Longest answer [tokens]."""
    monitor_every: int = 1
    """Epochs between measurements on the selection split; the last epoch is always measured."""
    apart: tuple[str, ...] = ("relation",)
    """Question types reported separately and excluded from the main table."""
    beside: tuple[str, ...] = ()
    """Other run folders to compare with; missing ones are noted and skipped."""
    sheet: int = 12
    """Pictures on kept.png."""

    def __post_init__(self) -> None:
        require(len(self.kept) > 0 and min(self.kept) >= 1, "eval.kept: give at least one count >= 1")
        at_least(self, 1, "eval.", "batch", "seeds", "resamples", "max_new_tokens", "monitor_every", "sheet")


@dataclass(frozen=True)
class RunConfig:
    recipe: Literal["plus", "published"] = "plus"
    """Defaults of the other settings: `plus` (ours), or `published` (the paper: hard labels, GHM-C + CS)."""
    run_dir: str = "runs/nano"
    """Folder of this run: settings, labels, checkpoints, compressor, report."""
    seed: int = 0
    """Seed of initial weights, sample order and random masks."""
    threads: int = 0
    """CPU threads of torch; 0 = all cores of an idle machine, else one. With 0, `evocomp train` on a CPU starts a
    process for each idle core, at most four, that share a batch."""
    logger: Literal["tensorboard", "csv", "wandb", "none"] = "tensorboard"
    """Where curves go."""
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
    """Any argument of Lightning's Trainer (max_epochs, devices, num_nodes, strategy, precision, ...)."""

    def __post_init__(self) -> None:
        at_least(self, 0, "", "seed", "threads")
        require_consistent(self)
