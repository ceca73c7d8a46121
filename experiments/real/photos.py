"""Photographs of Caltech-101 as pictures for the boards: a folder of small JPEG files, split photo by photo.

    python -m experiments.real.photos --source caltech-101/101_ObjectCategories --out ~/.cache/evocomp/real/photos

SOURCE has Caltech-101's own layout, CLASS/image_0001.jpg; `torchvision.datasets.Caltech101(root, download=True)` makes
it, and so does the archive of https://data.caltech.edu/records/mzrjq-6wc02 (CC-BY-4.0). Every fourth photo of a class
is a test photo. EVOCOMP_REAL_PHOTOS names another folder than the default.
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
LARGEST = 160  # pixels of a stored photo's longer side
MOST = 80  # photos of a class
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
# scenes, textures and patterns; no question ever asks for them
BACKGROUNDS = tuple("brain,buddha,chandelier,ferry,leopard,lotus,money,pagoda,pyramid,tree,water lily".split(","))


def photo_folder() -> Path:
    return Path(os.environ.get("EVOCOMP_REAL_PHOTOS", Path.home() / ".cache" / "evocomp" / "real" / "photos"))


@cache
def photo_files(split: Split) -> dict[str, tuple[Path, ...]]:
    """Files of a split by name. Training and selection photos share the folder train/, each sixth is for selection.

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
                "EVOCOMP_REAL_PHOTOS to where it is"
            )
        found[name] = tuple(files)
    return found


@cache
def photo_set() -> str:
    """Digest of all file names and sizes: tells one set of photos from another, for instance in names of caches."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for name, files in photo_files(split).items():
            digest.update("\n".join([split, name, *(f"{f.name} {f.stat().st_size}" for f in files)]).encode())
    return digest.hexdigest()[:12]


def convert(source: Path, out: Path) -> int:
    """Copy the photos of the used classes in a small size; returns their number.

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
            f"--source={source} has no photos of {', '.join(missing)}; give Caltech-101's folder of classes"
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
    parser.add_argument("--source", type=Path, required=True, help="folder with a folder for each class")
    parser.add_argument("--out", type=Path, default=photo_folder())
    args = parser.parse_args()
    print(f"{convert(args.source, args.out)} photos in {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main, "photos"))
