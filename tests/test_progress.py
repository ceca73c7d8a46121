"""Messages and the progress bar share one terminal: messages have their own lines, and the bar takes one line."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys, time
from evocomp import log
from evocomp.progress import Progress, Stage
log.setup()
progress = Progress(labels=Stage(100, guess=1.0), training=Stage(10, guess=400.0))
for number in range(6):
    progress.stages["labels"].advance(1, 2.0)
    time.sleep(0.21)
    progress.show(f"refresh 3 of 32: {number}/2560 questions, 123.4 per second")
    log.logger.info("message %d of %s", number, "a long line " * 12 if number == 3 else "a short one")
    print("a warning", number, file=sys.stderr)
progress.close()
log.logger.info("the end")
"""


def shown(columns: int) -> str:
    """All output to a terminal of this width."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "RANK")}
    environment |= {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=there, stderr=there, env=environment)
    os.close(there)
    got = b""
    while True:
        try:
            part = os.read(here, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        got += part
    os.close(here)
    assert process.wait() == 0
    return got.decode()


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_messages_go_above_the_bar(columns):
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(columns)))
    bars = [line.rstrip() for line in lines if "━" in line]
    assert bars and max(map(len, bars)) <= columns, "the bar would wrap"
    assert all(re.match(r"refresh 3 of 32.*about (69|70) min left$", line) for line in bars), bars
    messages = [line for line in lines if "message" in line]
    assert [line.split()[1] for line in messages] == list("012345") and all(m.startswith("message") for m in messages)
    assert [line for line in lines if "warning" in line] == [f"a warning {number}" for number in range(6)]
    assert any(len(line) > 140 for line in messages), "a message is left whole, for whoever copies it"
    assert [line for line in lines if line][-1] == "the end"
