"""Photographs of Caltech-101 for the photo boards: a folder of small JPEG files, split by photograph.

    python -m experiments.real.photos --source caltech-101/101_ObjectCategories --out ~/.cache/evocomp/real/photos

SOURCE has the layout of Caltech-101, CLASS/image_0001.jpg. Get it with `torchvision.datasets.Caltech101(root,
download=True)` or from https://data.caltech.edu/records/mzrjq-6wc02 (CC-BY-4.0). Every fourth photograph of a class is
a test photograph. EVOCOMP_REAL_PHOTOS overrides the default folder.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from PIL import Image

from evocomp.log import UserError, exit_code

Split = Literal["train", "selection", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
LARGEST = 160  # longer side of a stored photograph [pixels]
MOST = 80  # largest number of photographs per class
# everyday names of the classes whose folder has another name
RENAMED = {
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
    "binocular": "binoculars",
    "car_side": "car",
    "ceiling_fan": "fan",
    "cellphone": "phone",
    "cougar_body": "cougar",
    "dollar_bill": "money",
    "electric_guitar": "guitar",
    "grand_piano": "piano",
    "inline_skate": "skate",
    "joshua_tree": "tree",
    "Leopards": "leopard",
    "sea_horse": "seahorse",
    "soccer_ball": "soccer ball",
    "stop_sign": "stop sign",
    "hawksbill": "turtle",
    "water_lilly": "water lily",
    "wild_cat": "cat",
    "windsor_chair": "chair",
}
NAMES = tuple(
    "accordion,airplane,binoculars,butterfly,camera,cannon,car,cat,chair,cougar,crab,crayfish,crocodile,cup,dolphin,"
    "dragonfly,elephant,fan,flamingo,guitar,hedgehog,helicopter,kangaroo,lamp,laptop,llama,lobster,motorbike,panda,"
    "phone,piano,pigeon,pizza,revolver,rhino,rooster,saxophone,scissors,scorpion,seahorse,skate,soccer ball,starfish,"
    "stop sign,strawberry,sunflower,turtle,umbrella,watch,wheelchair".split(",")
)
# scenes, textures and patterns for backgrounds; no question asks about them
BACKGROUNDS = tuple("brain,buddha,chandelier,ferry,leopard,lotus,money,pagoda,pyramid,tree,water lily".split(","))


def photo_folder() -> Path:
    return Path(os.environ.get("EVOCOMP_REAL_PHOTOS", Path.home() / ".cache" / "evocomp" / "real" / "photos"))


@cache
def photo_files(split: Split) -> dict[str, tuple[Path, ...]]:
    """Files of a split by name. Training and selection share the folder train/; every sixth file is for selection.

    Raises:
        UserError: the folder is missing or lacks a name.
    """
    folder = photo_folder() / ("test" if split == "test" else "train")
    found = {}
    for name in (*NAMES, *BACKGROUNDS):
        files: Sequence[Path] = sorted((folder / name).glob("*.jpg"))
        if split != "test":
            files = [file for number, file in enumerate(files) if (number % 6 == 5) == (split == "selection")]
        if not files:
            raise UserError(
                f"no photos of {name!r} in {folder}; make the folder with `python -m experiments.real.photos`, or set "
                "EVOCOMP_REAL_PHOTOS to its path"
            )
        found[name] = tuple(files)
    return found


@cache
def photo_set() -> str:
    """Digest of all file names and sizes; identifies a set of photographs, for instance in the names of cache files."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for name, files in photo_files(split).items():
            digest.update("\n".join([split, name, *(f"{f.name} {f.stat().st_size}" for f in files)]).encode())
    return digest.hexdigest()[:12]


def convert(source: Path, out: Path) -> int:
    """Copy downsized photographs of the used classes; returns their number.

    Raises:
        UserError: `out` exists, or `source` lacks a class.
    """
    if out.exists():
        raise UserError(f"--out={out} exists; choose another folder")
    classes = sorted(folder for folder in source.iterdir() if folder.is_dir())
    folders = {RENAMED.get(folder.name, folder.name.replace("_", " ")): folder for folder in classes}
    missing = [name for name in (*NAMES, *BACKGROUNDS) if name not in folders]
    if missing:
        raise UserError(
            f"--source={source} has no photos of {', '.join(missing)}; give the folder of Caltech-101's classes"
        )
    partial, count = out.with_name(out.name + ".partial"), 0
    for name in (*NAMES, *BACKGROUNDS):
        for number, file in enumerate(sorted(folders[name].glob("*.jpg"))[:MOST]):
            folder = partial / ("test" if number % 4 == 3 else "train") / name
            folder.mkdir(parents=True, exist_ok=True)
            with Image.open(file) as photo:
                small = photo.convert("RGB")
            small.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
            small.save(folder / file.name, quality=88)
            count += 1
    partial.rename(out)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with one subfolder per class")
    parser.add_argument("--out", type=Path, default=photo_folder())
    args = parser.parse_args()
    print(f"{convert(args.source, args.out)} photos in {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main, "photos"))
