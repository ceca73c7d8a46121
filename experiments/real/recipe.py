"""Settings of the alignment: the fields of cpu.yaml, gpu.yaml and the photo boards' files."""

from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from evocomp.log import UserError
from experiments.real import photos
from experiments.real.boards import BoardSpec
from experiments.real.photos import Split
from experiments.real.scenes import NAMES, SceneSpec, all_names


@dataclass(frozen=True)
class Recipe:
    """All settings of the alignment; see cpu.yaml and gpu.yaml."""

    out: str = "runs/real"
    size: int = 224  # pixels
    side: int = 7  # visual tokens per side
    cells: int = 2
    smallest: float = 0.78  # side of a picture, as a share of the side of its cell
    largest: float = 0.98
    names: str = "few"  # few: 60 names; all: 849; photos: 50 names of photographs
    most: int = 4  # pictures in a scene
    fewest: int = 3  # photographs on a photo board
    fewest_signs: int = 1  # on a photo board
    most_signs: int = 2  # on a photo board
    plain: bool = False  # photo boards on a shaded colour, not on parts of photographs
    blind: bool = False  # the language model sees no visual token: what the questions alone teach
    scenes: int = 4000
    held_out: int = 60
    test: int = 200
    word_steps: int = 600  # steps of the projector as classifier of tokens
    word_batch: int = 1024  # tokens
    projector_steps: int = 30  # steps with the answer loss that train only the projector
    steps: int = 400  # all steps with the LLM, if `seconds` is 0
    seconds: int = 0  # time of training with the LLM; the number of steps is found by timing a few of them
    batch: int = 8  # scenes
    row: int = 110  # largest number of text tokens of the packed questions of a scene
    few_tokens: int = 20  # number of visual tokens in the first steps
    few_share: float = 0.5  # share of the steps with few visual tokens
    lora_rank: int = 8
    lora_targets: str = "q_proj,k_proj,v_proj,o_proj"
    lr_words: float = 1e-3
    lr_projector: float = 2e-4
    lr_lora: float = 1e-3
    look_every: int = 50
    save_every: int = 20
    seed: int = 0
    accelerator: str = "cpu"
    processes: int = 0  # additional processes that draw scenes

    def spec(self, split: Split = "train") -> SceneSpec:
        """Specification of the scenes; `split` selects the photographs (only with names: photos)."""
        sizes = {"smallest": self.smallest, "largest": self.largest}
        if self.names == "photos":
            known = {"photos": photos.photo_set(), "split": split, "plain": self.plain}
            counts = {"fewest": self.fewest, "fewest_signs": self.fewest_signs, "most_signs": self.most_signs}
            return BoardSpec(self.size, self.cells, photos.NAMES, self.most, **sizes, **counts, **known)
        names = NAMES if self.names == "few" else all_names()
        return SceneSpec(self.size, self.cells, names, self.most, **sizes)


def read_recipe(path: Path | None, out: str | None = None) -> Recipe:
    """Read a recipe from YAML. Raises `UserError` for an unknown key."""
    given = yaml.safe_load(path.read_text()) if path is not None else {}
    unknown = set(given) - {field.name for field in fields(Recipe)}
    if unknown:
        raise UserError(f"{path}: unknown keys {sorted(unknown)}; known: {[f.name for f in fields(Recipe)]}")
    return Recipe(**given | ({"out": out} if out else {}))
