"""Commands with words that nobody means."""

import json

import pytest
from one_line import refused_by_command

from evocomp.evaluation.run import folder_name

DIGITS = "9" * 5000
GENERATE = ["generate", "--model", "nano", "--compressor", "nano", "--prompt", "a"]


@pytest.mark.parametrize(
    "words",
    [
        ["data", "scenes", "--out"], ["data", "scenes", "--out="], ["data", "scenes"], ["data"],
        ["data", "scene", "--out=x"],
        ["data", "scenes", "--out=x", "--count=0"], ["data", "scenes", "--out=x", f"--count={DIGITS}"],
        ["data", "scenes", "--out=x", "--count=1e9"], ["data", "scenes", "--out=x", "--seed=-1"],
        ["data", "scenes", "--out=x", "--seed=4294967296"], ["data", "scenes", "--out=/proc/none/x"],
        ["data", "scenes", "--out=" + "x" * 300], ["data", "scenes", "--out", "--count", "3"],
        ["eval"], ["eval", "--run"], ["eval", "--run="], ["eval", "--run=/dev/null"], ["eval", "--run=no/such"],
        ["eval", "--run=" + "x" * 5000], ["eval", "--run=no", "--questions=0"], ["eval", "--run=no", "--questions=nan"],
        ["eval", "--run=no", f"--questions={DIGITS}"], ["eval", "--run=no", "--seed=.5"],
        ["label", "--estimate", "--price=nan"], ["label", "--estimate", "--price=inf"], ["label", "--gpus=0"],
        ["label", f"--gpus={DIGITS}"], ["label", "--trainer.devices"], ["train", "--seed"], ["train", "--seed=x"],
        ["train", "--config"], ["train", "--config=/dev/null/x"], ["train", "--config=no_such"],
        ["train", "--config=."],
        ["train", "--seeed=3"], ["train", "seeed=3"], ["train", "three"], ["train", "--=3"], ["train", "--trainer=3"],
        ["train", "--run_dir=/dev/null"], ["train", "--run_dir=a\0b"], ["config", f"--threads={DIGITS}"],
        ["config", "--threads=100000"], ["config", "--seed=4294967296"], ["config", "--labels.credit_sizes=[0.1,.nan]"],
        ["config", "--labels.credit_sizes=[1e9]"], ["config", "--optim.refresh_lr=.inf"], ["config", "--run_dir=${"],
        ["bench"], ["bench", "nothing"], ["bench", "training", "--shape=llava15_7b"],
        ["bench", "ops", "--out=/proc/x/y.csv"],
        ["nothing"], ["--nothing"], ["train\0"], ["\ud800"], ["x" * 5000], ["train", "--help", "nothing"],
        [*GENERATE, "--keep=nan", "--image=no"], [*GENERATE, "--keep=inf", "--image=no"], [*GENERATE, "--image=no"],
        [*GENERATE, "--keep=16", "--image=/"], [*GENERATE, "--keep=16", "--image=" + "x" * 5000],
        [*GENERATE, "--keep=16", "--image=a\0b"], [*GENERATE, "--keep=16", f"--max_new_tokens={DIGITS}", "--image=no"],
        [*GENERATE, "--keep=16", "--layer=x", "--image=no"], [*GENERATE, "--keep=", "--image=no"],
    ],
)  # fmt: skip
def test_words(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused_by_command(capsys, words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\x89PNG\r\n\x1a\n", b"<svg xmlns='a'/>", b"GIF89a", b"%!PS-Adobe", b"\0" * 99]
)
def test_images_that_are_none(content, capsys, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    refused_by_command(capsys, [*GENERATE, "--keep=16", f"--image={path}"], "does not decode")


def test_an_image_that_would_fill_the_memory(capsys, tmp_path):
    import struct
    import zlib

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = block(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + block(b"IDAT", zlib.compress(bytes(1000))) + block(b"IEND", b""))
    refused_by_command(capsys, [*GENERATE, "--keep=16", f"--image={path}"], "does not decode")


RUN_FILES = [
    ("config.yaml", ""), ("config.yaml", "[]"), ("config.yaml", "\0"), ("config.yaml", "seed: 1"),
    ("config.yaml", "run_dir: ${"),
    ("compressor/config.json", ""), ("compressor/config.json", "[]"), ("compressor/config.json", "null"),
    ("compressor/config.json", "[" * 100_000), ("compressor/config.json", "{"), ("compressor/config.json", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content"), RUN_FILES)
def test_odd_run_folders_are_not_evaluated(name, content, capsys, tmp_path):
    (tmp_path / "compressor").mkdir()
    (tmp_path / "config.yaml").write_text(f"run_dir: {tmp_path}\n")
    (tmp_path / "compressor" / "config.json").write_text(json.dumps({"model_type": "evocomp"}))
    path = tmp_path / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    refused_by_command(capsys, ["eval", "--run", str(tmp_path)])


@pytest.mark.parametrize(
    "kind", ["../../../esc", "/etc/x", "..", ".", "", "a/b", "a\0b", "x" * 5000, "\ud800", "-rf", "~"]
)
def test_a_question_type_is_no_path(kind):
    name = folder_name(kind)
    assert "/" not in name and name not in (".", "..", "") and len(name) <= 64 and name.isascii() and name.isprintable()
    assert not name.startswith(("-", ".", "~"))
