"""How commands end."""

import subprocess
import sys
from pathlib import Path

import pytest

from evocomp.log import UserError, exit_code

ROOT = Path(__file__).resolve().parents[1]


def ends(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    "command, code, said",
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (ends(UserError("--keep: give one")), 2, "tool: --keep: give one\n"),
        (ends(KeyboardInterrupt()), 130, "tool: interrupted; run the same command again to resume\n"),
    ],
)
def test_a_command_ends_with_a_code_and_one_line(command, code, said, capsys):
    assert exit_code(command, "tool") == code
    assert capsys.readouterr().err == said


def test_what_is_no_mistake_of_the_user_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0, "tool")


def test_a_study_says_which_runs_there_are(tmp_path):
    command = [sys.executable, "experiments/study.py", "--only", "published,plu"]
    # if nothing stopped it, it would train for minutes
    command += ["--runs", tmp_path / "runs", "--out", tmp_path / "rows.csv"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("study: --only: ") and " has no plu; it has published, plus, " in line
