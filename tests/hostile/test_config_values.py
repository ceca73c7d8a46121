"""Settings of every kind with values that no setting can have, in files and on the command line."""

import pytest
from one_line import refused

from evocomp.config import options
from evocomp.config.load import load, load_saved

DIGITS = "9" * 5000
NUMBERS = [setting.key for setting in options.settings() if setting.kind in (int, float)]
TEXTS = [setting.key for setting in options.settings() if setting.kind in (str, str | None)]
LISTS = ["eval.kept", "labels.credit_sizes", "labels.proposal_sizes"]
SWITCHES = [setting.key for setting in options.settings() if setting.kind is bool]
CHOICES = [s.key for s in options.settings() if "Literal" in str(s.kind)]


def test_the_table_is_long():
    assert len(NUMBERS) > 50 and len(TEXTS) >= 8 and len(CHOICES) > 20 and len(SWITCHES) > 10


@pytest.mark.parametrize("value", [".nan", ".inf", DIGITS, "-1e12"])
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_that_is_none_or_has_no_bounds(key, value):
    if (key, value) == ("optim.lr", ".inf"):
        pytest.skip("the training says that it has diverged")
    refused(lambda: load(settings=[f"{key}={value}"]))


@pytest.mark.parametrize("value", ["a\0b", "\x1b[31m", "\ud800", "x" * 5000])
@pytest.mark.parametrize("key", TEXTS)
def test_a_text_that_can_be_no_name(key, value):
    refused(lambda: load(settings=[f"{key}={value}"]))


@pytest.mark.parametrize(
    "value", ["[]", "[.nan]", "[1e30]", "[0]", "[-1]", "[[1]]", "[a]", "3", "{a: 1}", "null", "[null]"]
)
@pytest.mark.parametrize("key", LISTS)
def test_a_list_of_what_cannot_be_counted(key, value):
    refused(lambda: load(settings=[f"{key}={value}"]), key)


@pytest.mark.parametrize("value", ["some", "null"])
@pytest.mark.parametrize("key", SWITCHES)
def test_a_switch_that_is_neither_on_nor_off(key, value):
    refused(lambda: load(settings=[f"{key}={value}"]))


@pytest.mark.parametrize("value", ["some", "null"])
@pytest.mark.parametrize("key", CHOICES)
def test_a_choice_that_is_none(key, value):
    refused(lambda: load(settings=[f"{key}={value}"]))


@pytest.mark.parametrize(
    "word",
    [
        "seed=${", "seed=${seed}", "seed=${oc.env:NO_SUCH_VARIABLE}", "seed=${a.b.c}", "seed=???", "seed.x=1", "=3",
        ".=1", "..=1", "a.b.c=", "a[0]=1", "seed=", "model=3", "model={a: 1}", "trainer=[1]", "trainer=3",
        "trainer=null", "trainer.max_epochs=${", "labels=[]", "recipe={a: 1}", "recipe=[plus]", "\ud800=1", "x" * 9000,
        f"seed={'[' * 3000}", f"eval.kept=[{'1,' * 20000}1", f"{'a.' * 200}a=1", "null=2", "seed=!!python/object:os.x",
        "seed=!!python/object/apply:os.system ['true']", "seed=*anchor", "seed=&a [*a]",
    ],
)  # fmt: skip
def test_words_that_are_no_setting(word):
    refused(lambda: load(settings=[word]))


DEEP = "trainer:\n" + "".join(" " * (depth + 1) + "a:\n" for depth in range(600))
FILES = [
    "run_dir: ${", "null: 2", f"seed: {DIGITS}", "!!set {a, b}", "? !!set {a}\n: 1", "a: 1", "{" * 600 + "}" * 600,
    DEEP,
    "trainer: [1]", "trainer: 3", "model: [1]", "labels: null", "labels: 3", "1: 2", "true: 2", "x: &a [*a]",
    "2020-01-01: 1", "seed: 2020-01-01", "seed: !!binary aGVsbG8=", "[1]: 2", "? [1,2]\n: 3", "model: {name: null}",
    "trainer: {1: 2}", "trainer: null", "seed: ???", "run_dir: ???", "---\na: 1\n---\nb: 2", "\0", "a: \t- b",
    "seed: 1\nseed: 2", "- 1\n- 2", "just text", "3", "seed: !!python/object:os.x {}", "%YAML 9.9\n---\na: 1",
    "!!python/object/apply:os.system ['true']", "seed: *nowhere", "model:\n  name: a\n name: b", "run_dir: [a, b]",
    "data: {source: {a: 1}}", "data: {source: 1.5e400, image_folder: [x]}", "trainer:\n  ? {a: 1}\n  : 2",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]", "eval: {kept: {0: 1}}", "eval: {kept: '16'}",
    "optim: {lr: '1e-3x'}", "compressor: {lora: 3}", "compressor: {lora: {r: -1}}", "loss: {clip: .nan}",
    'run_dir: "\\ud800"', 'run_dir: "\\0"', "run_dir: " + "x" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("text", FILES)
def test_files_that_hold_no_settings(text, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    refused(lambda: load([path]))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x80\x04\x95", "seed: 1".encode("utf-16"), b"\x00" * 4096])
def test_files_that_are_no_text(content, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    refused(lambda: load([path]))


@pytest.mark.parametrize("text", ["", " ", "{}", "seed: 3", "[]", "\0"])
def test_the_emptied_settings_of_a_run_are_not_taken_for_defaults(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    refused(lambda: load_saved(tmp_path), "config.yaml")
