"""The command line: fast responses, and one clear line with exit code 2 for every user error."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from evocomp.cli import VERBS, main
from evocomp.data.conversations import write_scenes
from evocomp.log import UserError

ROOT = Path(__file__).resolve().parent.parent

GENERATE = ["--model", "nano", "--compressor", "x", "--image", "none.png", "--prompt", "q"]
PICTURED = ["--model", "nano", "--compressor", "x", "--image", "a.png", "--prompt", "q", "--keep", "4"]
TINY = ["--data.max_samples=8", "--data.val_samples=0", "--data.test_samples=8", "--trainer.accelerator=cpu"]


def fails(capsys, *words: str) -> str:
    """The one line on standard error; the exit code must be 2 and nothing may be printed."""
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("evocomp: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["tran"], ["train", "--seeed=3"]])
def test_help_and_typos_answer_at_once_and_without_torch(words):
    code = (
        "import sys; from evocomp.cli import main; main(sys.argv[1:]); "
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules), 'heavy imports'"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU seconds of the child, because wall time is meaningless on a busy machine
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def quick(words, folder, code: int, says: str = "") -> None:
    """Assert that the command ends with this exit code and output, without importing torch."""
    script = (
        "import sys; from evocomp.cli import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules), 'heavy imports'; sys.exit(code)"
    )
    paths = {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=folder, env={**os.environ, **paths}, capture_output=True, text=True
    )
    assert ended.returncode == code and says in ended.stderr, ended.stderr


@pytest.fixture
def a_run(tmp_path):
    """The files of a run of nano.yaml that checks without torch read."""
    from evocomp.config.load import load, save
    from evocomp.labels.fingerprint import from_settings
    from evocomp.labels.store import LabelStore

    config = load(["nano"])
    folder = tmp_path / "runs" / "nano"
    (folder / "compressor").mkdir(parents=True)
    (folder / "compressor" / "config.json").write_text('{"sharp": 0}')
    save(config, folder / "config.yaml")
    LabelStore.open(folder / "labels", {**from_settings(config), "weights": "w", "data": "d"})
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    return folder


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", *PICTURED, "--save", "a.png"], "--save=a.png exists; give another name"),
        (["generate", *PICTURED, "--save", "a.foo"], "--save=a.foo has no known image extension"),
        (["eval", "--run", "runs/nano", "--panel", "divprun"], "--panel=divprun: 'divprun' is unknown; choose basic"),
        (["eval", "--run", "runs/nano", "--panel", "divprune+context"], "has no context tokens; leave out +context"),
        (["eval", "--run", "runs/nano", "--seed", "3"], "give --out DIR"),
        (["train", "--config", "nano", "--seed", "3"], "runs/nano holds a run with different settings: seed=0,"),
        (["label", "--config", "nano", "--seed", "3"], "was made with seed=0 (this run has seed=3)"),
    ],
)
def test_checks_without_torch_come_first(a_run, tmp_path, words, says):
    quick(words, tmp_path, 2, says)


def test_labels_of_other_settings_are_refused_before_the_data_are_read(a_run, capsys, monkeypatch):
    """An interrupted run has labels and no config.yaml yet."""
    monkeypatch.setattr("evocomp.data.splits.load_splits", lambda *_: pytest.fail("the work began"))
    (a_run / "config.yaml").unlink()
    (a_run / "compressor" / "config.json").unlink()
    (a_run / "compressor").rmdir()
    words = [f"--run_dir={a_run}", "--config=nano", "--labels.credit_masks=8"]
    line = fails(capsys, "train", *words)
    assert "labels.credit_masks=32 (this run has labels.credit_masks=8)" in line


def test_auto_equals_its_measured_value(a_run):
    """A setting `auto` is saved with its measured value."""
    from evocomp.labels.store import LabelStore

    LabelStore.refuse_other(a_run / "labels", {"labels": {"dtype": "auto", "credit_masks": 32}})
    with pytest.raises(UserError, match="labels.credit_masks=32"):
        LabelStore.refuse_other(a_run / "labels", {"labels": {"dtype": "auto", "credit_masks": 8}})


@pytest.mark.parametrize("verb", ["train", "label"])
def test_long_running_commands_show_help_without_arguments(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([verb]) == 0
    assert f"evocomp {verb} --config nano" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("columns", [60, 80, 140])
@pytest.mark.parametrize("verb", [*VERBS, ""])
@pytest.mark.parametrize("what", [[], ["all"]])
def test_help_fits_the_terminal(verb, what, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    words = [verb] * bool(verb) + ["--help"] + (what if verb in ("train", "label", "config") else [])
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    # examples, usage and descriptions have fixed line breaks, for 80 columns
    most = max(columns, 80)
    assert max(map(len, lines)) <= most, [line for line in lines if len(line) > most]
    if not what and columns >= 80:
        assert len(lines) <= 80, "two screens"


def test_help_all_lists_every_setting_with_its_choices(capsys, monkeypatch):
    from evocomp.config.options import COMMON, settings

    monkeypatch.setenv("COLUMNS", "80")
    everything = {setting.key for setting in settings()} - {"trainer"}
    assert set(COMMON) <= everything | {"trainer"}
    main(["train", "--help", "all"])
    text = capsys.readouterr().out
    assert {line.split()[0][2:] for line in text.splitlines() if line.startswith("  --")} >= everything
    assert "listwise" in text and "0.0556,0.111" in text and "0.0555555" not in text
    main(["train", "--help", "optim"])
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")}
    assert {word for word in listed if "." in word} == {f"--{key}" for key in everything if key.startswith("optim.")}
    assert "give all, run, model" in fails(capsys, "train", "--help", "everything")


@pytest.mark.parametrize("words", ["train --help all", "--help", "config"])
def test_a_closed_pipe_ends_the_command_quietly(words):
    # without buffering the print fails, with buffering the flush at the end
    for unbuffered in ("", "1"):
        read, write = os.pipe()
        os.close(read)
        ended = subprocess.run(
            [sys.executable, "-m", "evocomp", *words.split()],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=write,
            stderr=subprocess.PIPE,
        )
        os.close(write)
        assert ended.stderr == b"" and ended.returncode == 141


def test_help_of_every_verb_shows_an_example(capsys):
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        assert f"\n      evocomp {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tran"], "did you mean train?"),
        (["train", "--search.generation=3"], "did you mean search.generations?"),
        (["train", "--seed=many"], "could not be converted to Integer"),
        (["train", "--loss.name=foo"], "expected one of"),
        (["train", "--search.population=5"], "smaller than search.parents=12"),
        (["train", "--config", "no.yaml"], "no such file"),
        (["train", "--trainer.max_epoch=3"], "did you mean trainer.max_epochs?"),
        (["train", "--data.source=nowhere"], "no such file or folder"),
        (["train", "stray"], "unexpected argument stray"),
        (["train", "--data.relation=perhaps"], "data.relation: Value 'perhaps'"),
        (["label", "--search.generation=3", "--estimate"], "did you mean search.generations?"),
        (["label", "--gpus", "many", "--estimate"], "--gpus=many: must be a number"),
        (["generate", "--model", "nano"], "needs --compressor"),
        (["generate", *GENERATE, "--keep", "half"], "--keep=half: must be a number"),
        (["generate", *GENERATE, "--keep", "4"], "--image=none.png: no such file"),
        (["data"], "needs the name of a dataset"),
        (["data", "scenes", "--out", "x", "--count", "0"], "--count=0: must be at least 1"),
        (["data", "scenes", "--out", "x", "--seed", "-1"], "--seed=-1: must be at least 0"),
        (["eval", "--run", "run", "--seed", "-3"], "--seed=-3: must be at least 0"),
        (["eval", "--run", "run", "--questions", "0"], "--questions=0: must be at least 1"),
        (["label", "--estimate", "--gpus", "0"], "--gpus=0: must be at least 1"),
        (["label", "--estimate", "--price", "-1"], "--price=-1: must be at least 0"),
        (["label", "--estimate", "--price", "nan"], "--price=nan: must be at least 0"),
        (["data", "scenes", "--out", "x", "--cuont", "3"], "did you mean --count?"),
        (["bench"], "needs one of label-search, ops"),
        (["eval"], "needs --run"),
        (["eval", "--run", "nowhere"], "not a run folder"),
        (["eval", "--rnu", "x"], "did you mean --run?"),
        (["data", "scenes"], "needs --out"),
        (["bench", "nothing"], "needs one of"),
    ],
)
def test_errors_are_one_line(capsys, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("run_dir: a\n")
    assert says in fails(capsys, *words)
    assert not (tmp_path / "runs").exists(), "nothing is left behind"


def test_broken_data_is_named(capsys, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text('[{"id": 1,\n  "image": }]')
    assert f"{broken}:2: not valid JSON" in fails(capsys, "label", f"--data.source={broken}", *TINY)

    write_scenes(tmp_path / "scenes", seed=5, count=3)
    for picture in (tmp_path / "scenes" / "images").iterdir():
        picture.write_bytes(b"no picture")
    line = fails(capsys, "label", f"--data.source={tmp_path / 'scenes'}", "--data.max_bad=2", *TINY)
    assert "data.max_bad=2" in line and "does not decode" in line


def test_keeping_more_tokens_than_the_image_has(capsys, tmp_path):
    line = fails(capsys, "train", f"--run_dir={tmp_path / 'run'}", "--eval.kept=[200,4]", *TINY)
    assert "eval.kept=200 is more than the 144 visual tokens" in line


def test_a_label_store_of_other_settings_is_refused_then_replaced_on_demand(capsys, tmp_path):
    quick = ["--search.generations=0", "--search.population=4", "--search.parents=2", f"--labels.dir={tmp_path / 'l'}"]
    words = ["label", f"--run_dir={tmp_path / 'run'}", "--data.max_samples=3", "--data.val_samples=0"]
    assert main([*words, *quick]) == 0
    before = sorted((tmp_path / "l").rglob("*.safetensors"))
    capsys.readouterr()
    line = fails(capsys, *words, *quick, "--search.mutation=0.5")
    assert "choose another folder or --labels.overwrite=true" in line
    assert sorted((tmp_path / "l").rglob("*.safetensors")) == before
    assert main([*words, *quick, "--search.mutation=0.5", "--labels.overwrite=true"]) == 0
    assert json.loads((tmp_path / "l" / "meta.json").read_text())["fingerprint"]["search"]["mutation"] == 0.5


def test_data_scenes_does_not_overwrite(capsys, tmp_path):
    assert main(["data", "scenes", "--out", str(tmp_path / "s"), "--count", "2"]) == 0
    assert "questions about 2 scenes" in capsys.readouterr().out
    assert "already holds data.json" in fails(capsys, "data", "scenes", "--out", str(tmp_path / "s"), "--count", "2")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["eval", "--run", "run", "--out", "run/config.yaml"], "config.yaml is a file; give a folder"),
        (["eval", "--run", "run", "--out", "/proc/x"], "--out=/proc/x: cannot write into /proc/x"),
        (["eval", "--run", "run", "--out", "/proc"], "--out=/proc: cannot write into /proc"),
        (["bench", "ops", "--out", "/proc/o.csv"], "--out=/proc/o.csv: cannot write into /proc"),
        (["bench", "ops", "--out", "/proc/x"], "--out=/proc/x: cannot write into /proc/x"),
        (["bench", "ops", "--out", "folder.csv"], "--out=folder.csv is a folder; give a file"),
        (["generate", *PICTURED, "--save", "/proc/no/k.png"], "--save=/proc/no/k.png: cannot write into /proc/no"),
        (["generate", *PICTURED, "--save", "k.foo"], "--save=k.foo has no known image extension"),
        (["data", "scenes", "--out", "/proc/x"], "--out=/proc/x: cannot write into /proc/x"),
        (["data", "scenes", "--out", "a.png"], "--out=a.png is a file; give a folder"),
    ],
)
def test_a_result_that_cannot_be_written_is_named_before_the_work(capsys, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("run_dir: a\n")
    (tmp_path / "folder.csv").mkdir()
    Image.new("RGB", (28, 28)).save("a.png")
    for work in ("evocomp.evaluation.run.evaluate_run", "evocomp.bench.record.run_bench"):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("the work began"))
    monkeypatch.setattr("evocomp.mllm.hf.FrozenMLLM.load", lambda *_: pytest.fail("the work began"))
    assert says in fails(capsys, *words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--keep", "16.5"], "keep=16.5: a fraction must lie in (0, 1]; for a number of tokens give an int"),
        (["--keep", "inf"], "--keep=inf: must be at most 1000000000"),
        (["--keep", "nan"], "keep=nan: a fraction must lie in (0, 1]"),
        (["--keep=-1"], "keep=-1: the number of tokens cannot be negative"),
        (["--max_new_tokens", "0"], "--max_new_tokens=0: must be at least 1"),
        (["--prompt", "what <image> color"], "--prompt contains the image placeholder <image>"),
    ],
)
def test_errors_of_generate_are_one_line(capsys, tmp_path, monkeypatch, words, says):
    monkeypatch.setattr("evocomp.inference.command.check_name", lambda path: None)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (28, 28)).save("a.png")
    assert says in fails(capsys, "generate", *PICTURED, *words)


def test_keep_is_a_number_or_a_fraction(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (28, 28)).save("a.png")
    kept = []
    monkeypatch.setattr("evocomp.inference.command.answer_from_command_line", lambda keep, **_: kept.append(keep))
    for text in ("1.0", "1", "0.3", "16"):
        assert main(["generate", *PICTURED, "--keep", text]) == 0
    assert [repr(one) for one in kept] == ["1.0", "1", "0.3", "16"]


def test_help_without_arguments_and_version(capsys):
    import evocomp

    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"evocomp {verb} " in shown for verb in VERBS)
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == evocomp.__version__


def test_resolved_settings_are_printed_as_they_can_be_read_again(capsys, tmp_path):
    from evocomp.config.load import load

    assert main(["config", "--seed", "3", "--eval.kept=[4]", "--trainer.max_epochs=2"]) == 0
    (tmp_path / "a.yaml").write_text(capsys.readouterr().out)
    config = load([tmp_path / "a.yaml"])
    assert (config.seed, list(config.eval.kept), config.trainer) == (3, [4], {"max_epochs": 2})


def test_an_interruption_has_its_message_and_exit_code(capsys, monkeypatch):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setitem(VERBS, "config", interrupted)
    assert main(["config"]) == 130
    assert "run the same command again to resume" in capsys.readouterr().err


def test_an_interrupted_panel_does_not_promise_to_resume(capsys, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    (tmp_path / "config.yaml").write_text("run_dir: a\n")
    (tmp_path / "compressor").mkdir()
    (tmp_path / "compressor" / "config.json").write_text("{}")
    monkeypatch.setattr("evocomp.evaluation.run.evaluate_run", interrupted)
    assert main(["eval", "--run", str(tmp_path)]) == 130
    assert "run the same command again to restart" in capsys.readouterr().err


def test_bugs_are_not_hidden(monkeypatch):
    def bug(words):
        raise ZeroDivisionError

    monkeypatch.setitem(VERBS, "config", bug)
    with pytest.raises(ZeroDivisionError):
        main(["config"])
