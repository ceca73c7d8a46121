"""What every case of hostile input must come to: one line that says what to do, and never a traceback."""

from collections.abc import Callable

import pytest

from evocomp import cli
from evocomp.log import UserError

LONGEST = 1200
"""Characters of a message: what is hostile in the input must not fill the terminal."""


def refused(call: Callable[[], object], says: str = "") -> str:
    """The message of the `UserError` that the call must raise; any other exception fails the test."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and 0 < len(message) <= LONGEST, message
    assert says in message, message
    return message


def refused_by_command(capsys, words: list[str], says: str = "") -> str:
    """The one line that the command line prints for these words, with exit code 2."""
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    lines = error.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("evocomp: "), error
    assert "Traceback" not in error and len(error) <= LONGEST, error
    assert says in error, error
    return lines[0]
