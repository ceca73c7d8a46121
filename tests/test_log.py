"""Exit codes and last messages of commands."""

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
    "command, code, printed",
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (ends(UserError("--keep: give one")), 2, "tool: --keep: give one\n"),
        (ends(KeyboardInterrupt()), 130, "tool: interrupted; run the same command again to resume\n"),
    ],
)
def test_a_command_ends_with_a_code_and_one_line(command, code, printed, capsys):
    assert exit_code(command, "tool") == code
    assert capsys.readouterr().err == printed


def test_other_exceptions_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0, "tool")


def test_a_study_lists_its_runs(tmp_path):
    command = [sys.executable, "experiments/study.py", "--only", "published,plu"]
    # otherwise it would train for minutes
    command += ["--runs", tmp_path / "runs", "--out", tmp_path / "rows.csv"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("study: --only: ") and " has no plu; it has published, plus, " in line
