"""Command-line arguments: one argparse tree for all commands, with their help. Does not import torch."""

import argparse
import difflib
import re
import shutil
from collections.abc import Callable, Sequence

from evocomp import __version__
from evocomp.config import options
from evocomp.log import UserError

BENCHES = ("label-search", "ops", "inference", "training", "label-processes")
SETTINGS_VERBS = ("train", "label", "config")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the words of a command line, command first; raise `UserError` for invalid ones."""
    verb, rest = words[0], list(words[1:])
    parser, verbs = _tree(words)
    if verb in SETTINGS_VERBS:
        rest = options.with_dashes(verbs[verb], rest)
    try:
        asked, unknown = parser.parse_known_args([verb, *rest])
    except UserError:
        # a misspelled required option is also missing: report the misspelling, which helps more
        known = verbs[verb]._option_string_actions
        unknown = [word for word in rest if word.startswith("--") and word.partition("=")[0] not in known]
        if not unknown:
            raise
    if unknown:
        raise _unknown_option(verb, verbs[verb], unknown[0])
    asked.words = list(words)
    return asked


def help_of_all() -> str:
    """Help that lists the commands."""
    return _tree(())[0].format_help()


def help_of(verb: str, rest: Sequence[str]) -> str:
    """Help of a command. A word after `--help` selects the settings that it shows: all, or those of one section."""
    after = [word for before, word in zip(rest, rest[1:], strict=False) if before in ("-h", "--help")]
    shown = after[0] if after and not after[0].startswith("-") else "common"
    if shown not in ("common", "all", "run", *options.SECTIONS):
        raise UserError(f"--help {shown}: unknown; give all, run, {', '.join(options.SECTIONS)}, or nothing")
    return _tree((verb,), shown)[1][verb].format_help()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps help at the width of the terminal, at most 100 columns."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=min(100, shutil.get_terminal_size().columns))

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        # values are optional (`--labels.overwrite` means true); no brackets around each
        return str(action.metavar) if action.nargs == "?" else super()._format_args(action, default_metavar)


class _Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that accepts no abbreviated options and raises errors as `UserError`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=_Formatter, add_help=False, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        if found := re.match(r"the following arguments are required: ([^,]+)", message):
            raise UserError(f"{self.prog} needs {found[1]}; {self.prog} --help shows an example")
        raise UserError(re.sub(r"^argument (--\S+): (=?)", lambda m: f"{m[1]}{'' if m[2] else ': '}{m[2]}", message))


def _tree(words: Sequence[str], shown: str = "common") -> tuple[_Parser, dict[str, _Parser]]:
    """Build the argparse tree: returns the main parser and the parser of each command.

    Args:
        words: words of the command line, passed to `options.add_settings`.
        shown: which settings the help of a command shows.
    """
    parser = _Parser(prog="evocomp", usage="evocomp COMMAND [options]", description=ABOUT, epilog=EXAMPLES)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="verb")
    verbs: dict[str, _Parser] = {}
    for verb, (summary, usage, about, example) in TEXTS.items():
        verbs[verb] = commands.add_parser(
            verb, help=summary, usage=usage, description=about, epilog="examples:\n" + example, prog=f"evocomp {verb}"
        )
        what = "show this help"
        if verb in SETTINGS_VERBS:
            what += "; with `all`: every setting; with a section (data, labels, ...): the settings of that section"
        metavar = "WHAT" if verb in SETTINGS_VERBS else None
        takes = {"nargs": "?", "metavar": metavar} if metavar else {"action": "store_true"}
        verbs[verb].add_argument("-h", "--help", help=what, **takes)
    _add_options(verbs)
    if not words or words[0] in SETTINGS_VERBS:
        for verb in SETTINGS_VERBS:
            verbs[verb].add_argument(
                "--config",
                action="append",
                default=[],
                metavar="NAME",
                help="YAML file, or an installed configuration: nano, nano_published, llava15_7b, ...; may be repeated",
            )
            options.add_settings(verbs[verb], words, shown)
    return parser, verbs


def _add_options(verbs: dict[str, _Parser]) -> None:
    """Add the options of each command that are not settings of a run."""
    add = verbs["label"].add_argument
    add("--estimate", action="store_true", help="only estimate the cost of the labels: time, price, memory, disk")
    add("--gpu", metavar="NAME", help="estimate for h200, h100, a100, l40s, 4090 or l4, or `here` to time this machine")
    add("--gpus", metavar="N", type=_number(int, 1), default=1, help="estimate for this many GPUs [1]")
    add("--price", metavar="USD", type=_number(float, 0), help="rental price of one GPU [USD/hour]")

    add = verbs["eval"].add_argument
    add("--run", required=True, metavar="DIR", help="run folder that evocomp train wrote")
    add("--out", metavar="DIR", help="folder of the report [the run folder]")
    add("--panel", metavar="NAMES", help="basic, full (every selector), or comma-separated names [basic]")
    add("--questions", metavar="N", type=_number(int, 1), help="number of test questions; needs --out")
    add("--seed", metavar="S", type=_number(int, 0, 2**32 - 1), help="seed of other test images; needs --out")
    add("--source", metavar="DATA", help="JSON file, folder, or BENCHMARK:FOLDER to test on; needs --out")

    add = verbs["generate"].add_argument
    add("--model", required=True, metavar="NAME", help="nano, nano576, a folder, or a Hugging Face id")
    add("--compressor", required=True, metavar="DIR", help="compressor folder of a run, or a Hugging Face id")
    add("--image", required=True, metavar="FILE", help="the image")
    add("--prompt", required=True, metavar="TEXT", help="the question")
    add("--keep", required=True, metavar="N", type=_number(_count_or_share), help="keep 16 tokens, or the fraction 0.3")
    add("--layer", metavar="L", type=_number(int), default=0, help="LLM layer before which tokens are dropped [0]")
    add("--compare", action="store_true", help="run the uncompressed model too")
    add("--save", metavar="FILE", help="draw the kept tokens into this new image file")
    add("--max_new_tokens", metavar="N", type=_number(int, 1), default=32, help="longest answer [32]")

    add = verbs["bench"].add_argument
    add("kind", nargs="?", metavar="WHAT", help=", ".join(BENCHES))
    add("--out", metavar="FILE", help="CSV file, or a folder")
    add("--shape", metavar="NAMES", help="llava15_7b, llava_next_7b, qwen25_vl_7b, comma-separated: random weights of "
        "these sizes (label-search, ops, inference; meant for a GPU)")  # fmt: skip

    add = verbs["data"].add_argument
    add("kind", nargs="?", metavar="scenes", help="drawn scenes with coloured shapes and digits")
    add("--out", metavar="DIR", help="folder to write; it must not hold data.json yet")
    add("--count", metavar="N", type=_number(int, 1, 10**7), default=500, help="number of images [500]")
    add("--seed", metavar="S", type=_number(int, 0, 2**32 - 1), default=101, help="seed of the images [101]")
    add("--relation", action="store_true", help="ask two-hop questions (relation) too")


def _number(kind: Callable, least: float | None = None, most: float = 10**9) -> Callable[[str], float]:
    """A type of option: a number from `least` to `most`."""

    def convert(text: str):
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"={shown}: must be a number") from None
        if least is not None and not value >= least:  # false for NaN too
            raise argparse.ArgumentTypeError(f"={shown}: must be at least {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"={shown}: must be at most {most}")
        return value

    return convert


def _count_or_share(text: str) -> int | float:
    """Integers are numbers of tokens; floats, 1.0 included, are fractions of them."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def _unknown_option(verb: str, parser: _Parser, word: str) -> UserError:
    if not word.startswith("-"):
        return UserError(f"unexpected argument {word}; write options as --key=value")
    key = word.lstrip("-").partition("=")[0]
    own = [name[2:] for action in parser._actions if action.dest != "settings" for name in action.option_strings]
    near = difflib.get_close_matches(key, [name for name in own if "." not in name], 1, cutoff=0.7)
    if verb in SETTINGS_VERBS and not near:
        from evocomp.config.load import check_known

        check_known(key, "command line")
    near = near or difflib.get_close_matches(key, own, 1, cutoff=0.5)
    hint = f"did you mean --{near[0]}?" if near else f"evocomp {verb} --help lists them"
    return UserError(f"unknown option --{key}; {hint}")


ABOUT = f"""evocomp {__version__}: fewer visual tokens for multimodal LLMs, chosen by a
small trained compressor"""

EXAMPLES = """examples:
      evocomp train --config nano
      evocomp label --config llava15_7b --estimate --gpu a100 --gpus 8
      evocomp eval --run runs/nano --panel full --out judged
      evocomp generate --model nano --compressor runs/nano/compressor \\
          --image a.png --prompt "color of circle" --keep 16
      evocomp bench ops
      evocomp data scenes --out scenes --count 500
      evocomp config --config nano --seed=3

`evocomp COMMAND --help` lists the options of a command."""

_SETTINGS_USAGE = "[--config NAME ...] [--section.key=value ...]"
TEXTS = {
    "train": (
        "label, train and evaluate a compressor",
        f"evocomp train {_SETTINGS_USAGE}",
        """Label the training questions, train a compressor, evaluate it and write a
report. After an interruption, run the same command again to resume. The report
of a finished run is printed; nothing is trained again.""",
        """      evocomp train --config nano
      evocomp train --config nano --data.source=my/folder --run_dir=runs/mine
""",
    ),
    "label": (
        "make or complete a label store, or estimate its cost",
        f"evocomp label {_SETTINGS_USAGE} [--estimate]",
        """Make the label store without training, or complete one that was interrupted.
To use several processes: torchrun --nproc-per-node 8 -m evocomp label ...""",
        """      evocomp label --config nano --labels.dir=labels/nano
      evocomp label --config llava15_7b --estimate --gpu a100 --gpus 8
""",
    ),
    "eval": (
        "evaluate a finished run",
        "evocomp eval --run DIR [--out DIR] [--panel NAMES] [--questions N] ...",
        """Evaluate a finished run on fresh questions; writes report.html, report.md,
report.json and kept.png. Without --out, the report in the run folder is
replaced if the questions are the same. In an --out folder, only an earlier
report of the same run on the same questions is replaced.""",
        """      evocomp eval --run runs/nano
      evocomp eval --run runs/nano --out judged --questions 3000 --seed 9001
      evocomp eval --run runs/llava --out judged_pope --source pope:data/pope
""",
    ),
    "generate": (
        "answer one question with fewer visual tokens",
        "evocomp generate --model NAME --compressor DIR --image FILE --prompt TEXT\n"
        "                        --keep N [--compare] [--save FILE] ...",
        """Answer one question about one image with fewer visual tokens, and print the
time of each stage.""",
        """      evocomp generate --model nano --compressor runs/nano/compressor \\
          --image a.png --prompt "color of circle" --keep 16
""",
    ),
    "bench": (
        "time label search, ops, inference or training",
        "evocomp bench WHAT [--out FILE] [--shape NAMES]",
        """Compare the speed of a part of the project with a straightforward
implementation: interleaved runs, reported as ratios.""",
        """      evocomp bench ops
      evocomp bench label-search --shape llava15_7b,qwen25_vl_7b
""",
    ),
    "data": (
        "write a dataset",
        "evocomp data scenes --out DIR [--count N] [--seed S] [--relation]",
        """Write drawn scenes as a folder in LLaVA's format: data.json and images/.""",
        """      evocomp data scenes --out scenes --count 500
""",
    ),
    "config": (
        "print the settings of a run",
        f"evocomp config {_SETTINGS_USAGE}",
        """Print the settings of a run after files and options are combined.""",
        """      evocomp config --config nano --seed=3
""",
    ),
}
