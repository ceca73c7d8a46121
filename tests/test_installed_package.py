"""The built wheel has what it needs, and works from an empty folder of an environment that has no checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

import evocomp
from tests.test_readme import PRINTED, SNIPPET

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("setuptools", minversion="77", reason="builds a wheel: pip install -e '.[dev]'")

TINY = {
    "data.max_samples": 60,
    "data.val_samples": 10,
    "data.test_samples": 20,
    "labels.credit_samples": 30,
    "labels.credit_masks": 8,
    "labels.samples_per_epoch": 64,
    "labels.samples_per_refresh": 16,
    "labels.refresh_start": 1,
    "labels.dtype": "float32",
    "eval.resamples": 50,
    "trainer.max_epochs": 2,
    "threads": 1,
}


def run(*words, cwd: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env={**kept, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the checkout without network access."""
    folder = tmp_path_factory.mktemp("wheel")
    anywhere = shutil.ignore_patterns("build", "*.egg-info", "__pycache__", "results")
    of_the_checkout = {".git", "runs", ".venv", "tests"}

    def left_out(parent, names):
        return anywhere(parent, names) | (of_the_checkout & set(names) if Path(parent) == ROOT else set())

    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=left_out)
    build = ("pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, folder / "source")
    run(sys.executable, "-m", *build, cwd=folder)
    (path,) = folder.glob("evocomp-*.whl")
    return path


def test_the_wheel_has_every_module_recipe_and_asset_and_nothing_of_the_study(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "evocomp"
    wanted = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.is_file()}
    wanted -= {name for name in wanted if "__pycache__" in name or name.startswith("evocomp/experiments/")}
    wanted |= {f"evocomp/experiments/{path.name}" for path in (ROOT / "experiments").glob("*.yaml")}
    found = {name for name in names if ".dist-info/" not in name}
    assert found == wanted
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "Project-URL: Paper, https://arxiv.org/abs/2604.17087" in metadata


@pytest.mark.slow
def test_it_trains_answers_and_shows_from_an_empty_folder(wheel, tmp_path):
    venv, work = tmp_path / "venv", tmp_path / "empty"
    work.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    # packages of this environment, without those linked by .pth files, which are not read here
    places = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("".join(f"{place}\n" for place in sorted(places)))
    install = ("install", "-q", "--no-deps", "--no-index", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=tmp_path)
    where = run(python, "-c", "import evocomp; print(evocomp.__file__)", cwd=work)
    assert where.startswith(str(site))

    command, quiet = venv / "bin" / "evocomp", {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    said = run(command, "train", "--config", "nano", *(f"--{k}={v}" for k, v in TINY.items()), cwd=work, **quiet)
    ends = said.rstrip().splitlines()[-4:]
    assert ends[0] == "report: runs/nano/report.html" and (work / "runs/nano/report.html").is_file()
    assert ends[2].startswith("  evocomp generate --model nano ")
    assert ends[3].startswith("  evocomp eval --run runs/nano ")
    run(command, "data", "scenes", "--out", "scenes", "--count", "1", cwd=work, **quiet)
    (image,) = (work / "scenes" / "images").iterdir()
    words = ends[2].split()[1:-4] + ["--image", image, "--prompt", "color of circle", "--save", "kept.png"]
    answer = run(command, *words, cwd=work, **quiet)
    assert "144 -> 16 visual tokens" in answer and (work / "kept.png").is_file()
    run(command, "config", "--config", "llava15_7b", cwd=work, **quiet)
    assert run(python, "-c", SNIPPET, cwd=work, **quiet).endswith(PRINTED)
    run(python, ROOT / "notebooks" / "quickstart.py", cwd=work, **quiet)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == evocomp.__version__ and citation["cff-version"] == "1.2.0"
    assert citation["preferred-citation"]["url"] == "https://arxiv.org/abs/2604.17087"
