"""What the alignment can be told: the fields of cpu.yaml and gpu.yaml."""

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
    """Everything that alignment can be told; see cpu.yaml and gpu.yaml."""

    out: str = "runs/real"
    size: int = 224  # pixels
    side: int = 7  # visual tokens a side
    cells: int = 2
    smallest: float = 0.78  # side of a picture, as a share of its cell's
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
    word_steps: int = 600  # projector as classifier of tokens
    word_batch: int = 1024  # tokens
    projector_steps: int = 30  # answer loss, projector only
    steps: int = 400  # all steps with the LLM, if `seconds` is 0
    seconds: int = 0  # of training with the LLM; the steps that fit are found by timing a few of them
    batch: int = 8  # scenes
    row: int = 110  # text tokens of a scene's packed questions, at most
    few_tokens: int = 20  # visual tokens at first
    few_share: float = 0.5  # of the steps
    lora_rank: int = 8
    lora_targets: str = "q_proj,k_proj,v_proj,o_proj"
    lr_words: float = 1e-3
    lr_projector: float = 2e-4
    lr_lora: float = 1e-3
    look_every: int = 50
    save_every: int = 20
    seed: int = 0
    accelerator: str = "cpu"
    processes: int = 0  # that draw scenes beside this one

    def spec(self, split: Split = "train") -> SceneSpec:
        """What is drawn; `split` of the photographs (names: photos)."""
        sizes = {"smallest": self.smallest, "largest": self.largest}
        if self.names == "photos":
            known = {"photos": photos.photo_set(), "split": split, "plain": self.plain}
            counts = {"fewest": self.fewest, "fewest_signs": self.fewest_signs, "most_signs": self.most_signs}
            return BoardSpec(self.size, self.cells, photos.NAMES, self.most, **sizes, **counts, **known)
        names = NAMES if self.names == "few" else all_names()
        return SceneSpec(self.size, self.cells, names, self.most, **sizes)


def read_recipe(path: Path | None, out: str | None = None) -> Recipe:
    """Raises `UserError` for a key that is none of `Recipe`'s."""
    given = yaml.safe_load(path.read_text()) if path is not None else {}
    unknown = set(given) - {field.name for field in fields(Recipe)}
    if unknown:
        raise UserError(f"{path}: unknown keys {sorted(unknown)}; known: {[f.name for f in fields(Recipe)]}")
    return Recipe(**given | ({"out": out} if out else {}))
