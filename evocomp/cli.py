"""The commands. Arguments are parsed and checked before torch is imported, so that errors are reported at once."""

import argparse
import difflib
import os
import select
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from evocomp import __version__, log
from evocomp.arguments import BENCHES, help_of, help_of_all, parse
from evocomp.config.schema import RunConfig
from evocomp.launch import end_with_parent
from evocomp.log import UserError

BROKEN_PIPE = 141
"""Exit code if the reader of the output has exited: 128 + SIGPIPE, as shells report it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 success; 2 user error, or stopped by SIGTERM (rerun to resume); 130 Ctrl-C; 141 the reader of the output has
    exited, as in `evocomp --help | head -1`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    log.setup()
    end_with_parent()
    try:
        code = log.exit_code(lambda: _dispatch(words), "evocomp")
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _stdout_is_broken():
            raise
        return BROKEN_PIPE


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_of_all(), end="")
        return 0
    if words[0] in ("--version", "-V"):
        print(__version__)
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"did you mean {near[0]}?" if near else "evocomp --help lists the commands"
        raise UserError(f"unknown command {verb}; {hint}")
    starts_work = verb in ("train", "label")
    if (starts_work and not rest) or any(word in ("-h", "--help") for word in rest):
        print(help_of(verb, rest), end="")
        return 0
    return VERBS[verb](parse(words))


def _stdout_is_broken() -> bool:
    """Whether standard output is a pipe without a reader; if so, further output is redirected to the null device."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in watch.poll(0)):
        return False
    # otherwise the interpreter reports the broken pipe again when it flushes at exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


# ---------------------------------------------------------------- checks before the work


def _writable(option: str, text: str | None, is_file: bool = False) -> Path | None:
    """Path of an output, None without one. Checks that it can be written before work starts that may take hours."""
    if not text:
        return None
    path = Path(text)
    folder = path.parent if is_file else path
    if is_file and path.is_dir():
        raise UserError(f"{option}={path} is a folder; give a file")
    if not is_file and path.is_file():
        raise UserError(f"{option}={path} is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = f"cannot write into {folder} ({error.strerror})"
        raise UserError(f"{option}={path}: {why}; give another path") from None
    return path


def _new_image(option: str, text: str | None) -> Path | None:
    """Path of an image to write: a new file of a known format in a writable folder."""
    path = _writable(option, text, is_file=True)
    if path is None:
        return None
    from PIL import Image

    if path.exists():
        raise UserError(f"{option}={path} exists; give another name")
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"{option}={path} has no known image extension; give a name that ends in .png")
    return path


def _config(asked: argparse.Namespace) -> RunConfig:
    from evocomp.config.load import load

    return load(asked.config, asked.settings)


# ---------------------------------------------------------------- commands


def train(asked: argparse.Namespace) -> int:
    """Label the training questions, train a compressor, evaluate it and write a report.

    After an interruption, run the same command again to resume. The report of a finished
    run is printed; nothing is trained again.
    """
    config = _config(asked)
    from evocomp.runs.claims import check_before_work

    check_before_work(config)
    from evocomp.launch import beside, idle_processes

    finished = (Path(config.run_dir) / "trained.json").exists()
    alone = finished or config.model.shard != 1
    count = 1 if alone else idle_processes(config.trainer, config.threads, config.optim.batch_size)
    with beside(count, asked.words):
        return _train(config)


def _train(config: RunConfig) -> int:
    from evocomp import distributed
    from evocomp.launch import launched
    from evocomp.training.build import run

    run_dir = Path(config.run_dir)
    with distributed.process_group() if launched() > 1 else nullcontext():
        is_new = run(config, _answers(config))
        if launched() == 1 and not log.is_rank_zero():
            return 0  # in a job that another launcher started, only rank 0 evaluates
        if config.model.shard != 1:
            what_next = f"run `evocomp eval --run {run_dir}` where one device holds the model"
            log.logger.info("the MLLM is sharded, so the run is not evaluated: %s", what_next)
            return 0
        if config.data.test_samples == 0:
            log.logger.info("the run has no test questions, so it is not evaluated; see %s", run_dir / "compressor")
            return 0
        if distributed.from_rank_0(lambda: is_new or not _has_report(run_dir)):
            from evocomp.evaluation.run import evaluate_run

            evaluate_run(run_dir)
        elif log.is_rank_zero():
            print((run_dir / "report.md").read_text())
        if log.is_rank_zero():
            _log_next_commands(config, run_dir)
    return 0


def _has_report(run_dir: Path) -> bool:
    return all((run_dir / f"report.{suffix}").is_file() for suffix in ("json", "md"))


def _answers(config: RunConfig) -> int:
    """Number of (question, selector) pairs in the evaluation after training."""
    from evocomp.evaluation.request import BASIC, rows_of

    is_evaluated = config.model.shard == 1
    return is_evaluated * config.data.test_samples * rows_of(config, len(BASIC), len(config.eval.beside))


def _log_next_commands(config: RunConfig, run_dir: Path) -> None:
    compress = f"evocomp generate --model {config.model.name} --compressor {run_dir / 'compressor'}"
    log.logger.info(
        "\nreport: %s\nnext:\n  %s\n  %s",
        run_dir / "report.html",
        f'{compress} --keep {sorted(config.eval.kept)[len(config.eval.kept) // 2]} --image FILE --prompt "..."',
        f"evocomp eval --run {run_dir} --panel full --out {run_dir}_full",
    )


def label(asked: argparse.Namespace) -> int:
    """Make the label store without training, or complete one that was interrupted.

    To use several processes: torchrun --nproc-per-node 8 -m evocomp label ...
    """
    config = _config(asked)
    if asked.estimate:
        from evocomp.training.cost_estimate import estimate_only

        print(estimate_only(config, asked.gpu, asked.gpus, asked.price))
        return 0
    from evocomp.runs.claims import check_labels

    check_labels(config)
    from evocomp.training.build import label_only

    label_only(config)
    return 0


def evaluate(asked: argparse.Namespace) -> int:
    """Evaluate a finished run on fresh questions; writes report.html, report.md,
    report.json and kept.png.

    Without --out, the report in the run folder is replaced if the questions are the same.
    In an --out folder, only an earlier report of the same run on the same questions is
    replaced.
    """
    run_dir = Path(asked.run)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"--run={run_dir}: not a run folder (no config.yaml); give what evocomp train wrote")
    out = _writable("--out", asked.out)
    if out is None:
        _writable("--run", asked.run)  # the report is written there
    wanted = {"questions": asked.questions, "seed": asked.seed, "panel": asked.panel, "source": asked.source}
    from evocomp.evaluation.request import check_request

    check_request(run_dir, out, **wanted)
    from evocomp.evaluation.run import evaluate_run

    try:
        evaluate_run(run_dir, out=out, **wanted)
    except KeyboardInterrupt:
        print("evocomp: interrupted; nothing was saved, run the same command again to restart", file=sys.stderr)
        return 130
    return 0


def generate(asked: argparse.Namespace) -> int:
    """Answer one question about one image with fewer visual tokens, and print the
    time of each stage.
    """
    if not Path(asked.image).is_file():
        raise UserError(f"--image={asked.image}: no such file")
    save = _new_image("--save", asked.save)
    from evocomp.inference.command import answer_from_command_line

    answer_from_command_line(
        model=asked.model,
        compressor=asked.compressor,
        image=Path(asked.image),
        prompt=asked.prompt,
        keep=asked.keep,
        layer=asked.layer,
        compare=asked.compare,
        save=save,
        max_new_tokens=asked.max_new_tokens,
    )
    return 0


def bench(asked: argparse.Namespace) -> int:
    """Compare the speed of a part of the project with a straightforward implementation:
    interleaved runs, reported as ratios.
    """
    if asked.kind not in BENCHES:
        raise UserError(f"evocomp bench needs one of {', '.join(BENCHES)}")
    if asked.shape and asked.kind == "training":
        raise UserError("evocomp bench training has no --shape")
    out = _writable("--out", asked.out, is_file=str(asked.out).endswith(".csv"))
    from evocomp.bench.record import run_bench

    run_bench(asked.kind, out, asked.shape.split(",") if asked.shape else ())
    return 0


def data(asked: argparse.Namespace) -> int:
    """Write drawn scenes as a folder in LLaVA's format: data.json and images/."""
    if asked.kind != "scenes":
        raise UserError("evocomp data needs the name of a dataset: evocomp data scenes --out DIR")
    if not asked.out:
        raise UserError("evocomp data scenes needs --out; evocomp data --help shows an example")
    out = _writable("--out", asked.out)
    from evocomp.data.conversations import write_scenes

    records = write_scenes(out, asked.seed, asked.count, relation=asked.relation)
    print(f"{records} questions about {asked.count} scenes in {out}")
    return 0


def show_config(asked: argparse.Namespace) -> int:
    """Print the settings of a run after files and options are combined."""
    from evocomp.config.load import to_yaml

    print(to_yaml(_config(asked)), end="")
    return 0


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
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
