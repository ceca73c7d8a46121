"""The command line. Words are parsed and checked before torch is imported, so that help and typos answer at once."""

import difflib
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from evocomp import __version__, log
from evocomp.log import UserError

HELP = f"""evocomp {__version__}: fewer visual tokens for multimodal LLMs, with labels that are searched for

  evocomp train     label, train and judge a compressor     evocomp train --config experiments/nano.yaml
  evocomp label     make or complete a label store          evocomp label --config experiments/nano.yaml
  evocomp eval      judge a finished run                    evocomp eval --run runs/nano
  evocomp generate  answer one question, compressed         evocomp generate --model nano --compressor runs/nano/compressor --image a.png --prompt "color of circle" --keep 16
  evocomp bench     time label search, ops or inference     evocomp bench ops
  evocomp data      write a data set                        evocomp data scenes --out scenes --count 500
  evocomp config    print the resolved settings             evocomp config --config experiments/nano.yaml --seed=3

Every setting can be given as --section.key=value; `evocomp VERB --help` says more."""  # noqa: E501


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 done; 2 something for the user to put right, or stopped by SIGTERM with something left to do, which the same
    command goes on with; 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    log.setup()
    return log.exit_code(lambda: _dispatch(words), "evocomp")


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if words[0] in ("--version", "-V"):
        print(__version__)
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"did you mean {near[0]}?" if near else "evocomp --help lists the commands"
        raise UserError(f"unknown command {verb}; {hint}")
    if any(word in ("-h", "--help") for word in rest):
        print(_help_of(verb))
        return 0
    return VERBS[verb](rest)


def _help_of(verb: str) -> str:
    text = (VERBS[verb].__doc__ or "").strip()
    if verb in ("train", "label", "config"):
        from evocomp.config.load import describe

        text += "\n\nSettings (key, default, meaning):\n" + describe()
    return text


def _options(words: Sequence[str], known: dict[str, str | None], verb: str) -> dict[str, str | None]:
    """Simple `--key value` options of the verbs that are not about a whole run; a key alone means `true`."""
    values, queue = dict(known), list(words)
    while queue:
        key, equals, value = queue.pop(0).removeprefix("--").partition("=")
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
            hint = f"did you mean --{near[0]}?" if near else f"evocomp {verb} --help lists them"
            raise UserError(f"unknown option {key}; {hint}")
        if not equals:
            value = queue.pop(0) if queue and not queue[0].startswith("--") else "true"
        values[key] = value
    missing = [key for key, value in values.items() if value == ""]
    if missing:
        raise UserError(f"evocomp {verb} needs --{missing[0]}")
    return values


def _take_options(words: Sequence[str], known: dict[str, str | None], verb: str) -> tuple[dict, list[str]]:
    """A verb's own options out of words that are otherwise about a whole run."""
    own, rest, queue = [], [], list(words)
    while queue:
        word = queue.pop(0)
        mine = word.startswith("--") and word[2:].partition("=")[0] in known
        (own if mine else rest).append(word)
        if mine and "=" not in word and queue and word != "--estimate" and not queue[0].startswith("--"):
            own.append(queue.pop(0))
    return _options(own, known, verb), rest


def _number(options: dict, key: str, kind: Callable = int, least: int | None = None):
    try:
        number = kind(options[key])
    except (TypeError, ValueError):
        raise UserError(f"--{key}={options[key]}: must be a number") from None
    if least is not None and not number >= least:  # NaN is not either
        raise UserError(f"--{key}={options[key]}: must be at least {least}")
    return number


def _count_or_share(text: str) -> int | float:
    """16 is a number of tokens, 0.3 and 1.0 are shares of them, as in Python."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def _place(options: dict, key: str, is_file: bool = False) -> Path | None:
    """Where a result goes (None: nowhere), known to be writable before the work begins, which may take hours."""
    if not options[key]:
        return None
    place = Path(options[key])
    folder = place.parent if is_file else place
    if is_file and place.is_dir():
        raise UserError(f"--{key}={place} is a folder; give a file")
    if not is_file and place.is_file():
        raise UserError(f"--{key}={place} is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--{key}={place}: cannot write into {folder} ({error.strerror}); give another place") from None
    return place


def _config(words: Sequence[str]):
    from evocomp.config.load import load, split_arguments

    return load(*split_arguments(words))


def train(words: Sequence[str]) -> int:
    """evocomp train --config FILE [--run_dir=DIR] [--a.b=value ...]

    Labels the training questions, trains a compressor (labels are refreshed as the recipe says) and prints the
    table. Started again after an interruption, it goes on where it was. On an idle CPU it starts a process for each
    core (at most four); --threads=1 keeps it to one.

      evocomp train --config experiments/nano.yaml
      evocomp train --config experiments/nano.yaml --data.source=my/folder --run_dir=runs/mine --trainer.max_epochs=4
    """
    config = _config(words)
    from evocomp.launch import beside, idle_processes

    finished = (Path(config.run_dir) / "trained.json").exists()
    alone = finished or config.model.shard != 1
    count = 1 if alone else idle_processes(config.trainer, config.threads, config.optim.batch_size)
    with beside(count, ["train", *words]):
        return _train(config)


def _train(config) -> int:
    from evocomp import distributed
    from evocomp.launch import launched
    from evocomp.training.build import run

    run_dir = Path(config.run_dir)
    with distributed.joined() if launched() > 1 else nullcontext():
        is_new = run(config)
        if launched() == 1 and not log.is_rank_zero():
            return 0  # of a job that another launcher started, rank 0 judges alone
        if config.model.shard != 1:
            what_next = f"evocomp eval --run {run_dir} where it fits"
            log.logger.info("the MLLM is sharded, so the run is not judged: %s", what_next)
            return 0
        if config.data.test_samples == 0:
            log.logger.info("the run has no test questions, so it is not judged; see %s", run_dir / "compressor")
            return 0
        if distributed.from_rank_0(lambda: is_new or not (run_dir / "report.json").exists()):
            from evocomp.evaluation.run import evaluate_run

            evaluate_run(run_dir)
        elif log.is_rank_zero():
            print((run_dir / "report.md").read_text())
    return 0


def label(words: Sequence[str]) -> int:
    """evocomp label --config FILE [--labels.dir=DIR] [--a.b=value ...]

    Makes the label store alone, or completes one that was interrupted. Several processes share the work:
    torchrun --nproc-per-node 8 -m evocomp label ...

      --estimate     only say what it will cost: forwards, FLOPs, hours, price, memory, disk
      --gpu NAME     of this GPU (h200, h100, a100, l40s, 4090, l4), or `here` to time a few samples on this machine;
                     default: the GPU of this machine, timed, or an H100
      --gpus N       so many at once
      --price USD    an hour of one

      evocomp label --config experiments/nano.yaml --labels.dir=labels/nano
      evocomp label --config experiments/llava15_7b.yaml --estimate --gpu a100 --gpus 8
    """
    known = {"estimate": None, "gpu": None, "gpus": "1", "price": None}
    options, rest = _take_options(words, known, "label")
    config = _config(rest)
    if options["estimate"] == "true":
        price = _number(options, "price", float, least=0) if options["price"] else None
        gpus = _number(options, "gpus", least=1)
        from evocomp.training.cost_estimate import estimate_only

        print(estimate_only(config, options["gpu"], gpus, price))
        return 0
    from evocomp.training.build import label_only

    label_only(config)
    return 0


def evaluate(words: Sequence[str]) -> int:
    """evocomp eval --run RUN [--out DIR] [--questions N] [--seed S] [--panel basic|full|NAME,NAME,...]
                 [--source FILE_OR_BENCHMARK:FOLDER]

    Judges a finished run on fresh questions and writes report.json, report.md and kept.png.
    The run's own report is replaced only if --out is not given and the questions are the same; of other folders
    (--out), only an earlier report of the same run on the same questions.

      evocomp eval --run runs/nano
      evocomp eval --run runs/nano --out judged --questions 3000 --seed 9001
      evocomp eval --run runs/llava --out judged_pope --source pope:data/pope
    """
    known = {"run": "", "out": None, "questions": None, "seed": None, "panel": None, "source": None}
    options = _options(words, known, "eval")
    run_dir = Path(options["run"])
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"--run={run_dir}: not a run folder (no config.yaml); give what evocomp train wrote")
    questions = _number(options, "questions", least=1) if options["questions"] else None
    seed = _number(options, "seed", least=0) if options["seed"] else None
    out = _place(options, "out")
    if out is None:
        _place(options, "run")  # there the report goes
    from evocomp.evaluation.run import evaluate_run

    try:
        evaluate_run(
            run_dir,
            out=out,
            questions=questions,
            seed=seed,
            panel=options["panel"],
            source=options["source"],
        )
    except KeyboardInterrupt:
        print("evocomp: interrupted; nothing is kept of a panel, the same command starts it anew", file=sys.stderr)
        return 130
    return 0


def generate(words: Sequence[str]) -> int:
    """evocomp generate --model DIR_OR_ID --compressor DIR --image FILE --prompt TEXT --keep N
                     [--layer L] [--compare] [--save kept.png] [--max_new_tokens N]

    Answers one question with fewer visual tokens and says where the time went; --compare runs the full model
    beside it, --save draws the kept tokens. N is a number of tokens (16) or a share of them (0.3; 1.0 is all).

      evocomp generate --model nano --compressor runs/nano/compressor --image a.png --prompt "color of circle" --keep 16
    """
    known = {"model": "", "compressor": "", "image": "", "prompt": "", "keep": "", "layer": "0"}
    known |= {"compare": None, "save": None, "max_new_tokens": "32"}
    options = _options(words, known, "generate")
    keep, most = _number(options, "keep", _count_or_share), _number(options, "max_new_tokens", least=1)
    if not Path(options["image"]).is_file():
        raise UserError(f"--image={options['image']}: no such file")
    save = _place(options, "save", is_file=True)
    from evocomp.inference.command import answer_from_command_line

    answer_from_command_line(
        model=options["model"],
        compressor=options["compressor"],
        image=Path(options["image"]),
        prompt=options["prompt"],
        keep=keep,
        layer=_number(options, "layer"),
        compare=options["compare"] == "true",
        save=save,
        max_new_tokens=most,
    )
    return 0


def bench(words: Sequence[str]) -> int:
    """evocomp bench label-search | ops | inference | training | label-processes [--out FILE.csv] [--shape NAME[,NAME]]

    Times the project's parts against their straightforward counterparts, interleaved, as ratios of one run.

      --shape NAME   at the sizes of llava15_7b, llava_next_7b or qwen25_vl_7b, with random weights (for label-search,
                     ops and inference; meant for a GPU, ops run on a CPU too)

      evocomp bench ops
      evocomp bench label-search --shape llava15_7b,qwen25_vl_7b
    """
    kinds = ("label-search", "ops", "inference", "training", "label-processes")
    if not words or words[0] not in kinds:
        raise UserError(f"evocomp bench needs one of {', '.join(kinds)}")
    options = _options(words[1:], {"out": None, "shape": None}, "bench")
    if options["shape"] and words[0] == "training":
        raise UserError("evocomp bench training has no --shape")
    out = _place(options, "out", is_file=str(options["out"]).endswith(".csv"))
    from evocomp.bench.record import run_bench

    shapes = options["shape"].split(",") if options["shape"] else ()
    run_bench(words[0], out, shapes)
    return 0


def data(words: Sequence[str]) -> int:
    """evocomp data scenes --out DIR [--count SCENES] [--seed S] [--relation]

    Writes drawn scenes as a LLaVA-format folder: data.json and images/.

      evocomp data scenes --out scenes --count 500
    """
    if not words or words[0] != "scenes":
        raise UserError("evocomp data needs the word scenes: evocomp data scenes --out DIR")
    known = {"out": "", "count": "500", "seed": "101", "relation": None}
    options = _options(words[1:], known, "data scenes")
    count, seed = _number(options, "count", least=1), _number(options, "seed", least=0)
    out = _place(options, "out")
    from evocomp.data.conversations import write_scenes

    records = write_scenes(out, seed, count, relation=options["relation"] == "true")
    print(f"{records} questions about {count} scenes in {out}")
    return 0


def show_config(words: Sequence[str]) -> int:
    """evocomp config [--config FILE ...] [--a.b=value ...]

    Prints the settings that these files and options come to.

      evocomp config --config experiments/nano.yaml --seed=3
    """
    from evocomp.config.load import to_yaml

    print(to_yaml(_config(words)), end="")
    return 0


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "label": label,
    "eval": evaluate,
    "generate": generate,
    "bench": bench,
    "data": data,
    "config": show_config,
}

if __name__ == "__main__":
    sys.exit(main())
