"""The model card: recorded entries, and entries that were not recorded."""

import pytest
import yaml

from evocomp.compressor.lora import add_lora
from evocomp.compressor.model import EvoCompCompressor
from evocomp.inference.card import card, save
from evocomp.inference.selectors import load_compressor
from tests.inference.tiny_models import build

PANEL = [
    {"method": "EvoComp", "kept": 16, "accuracy": "94.5 ± 0.6"},
    {"method": "uniform | stride", "kept": 16, "accuracy": "70.1 ± 0.9"},
]


def rows(text, heading):
    section = text.split(f"## {heading}\n\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines()]


def test_card_shows_all_recorded_entries(tmp_path):
    compressor = EvoCompCompressor.from_mllm(build("llava"), keep=64, base_model_name_or_path="org/llava-nano")
    save(compressor, tmp_path, data="scenes, 8000 images", labels={"rounds": 10, "population": 48}, panel=PANEL)
    text = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "org/llava-nano" and front["library_name"] == "evocomp"
    assert "scenes, 8000 images" in text and "keep=64, layer=0" in text
    assert rows(text, "Labels")[2:] == [["population", "48"], ["rounds", "10"]]
    assert rows(text, "Results")[0] == ["method", "kept", "accuracy"]
    assert rows(text, "Results")[2:] == [list(map(str, r.values())) for r in PANEL[:1]] + [
        ["uniform \\| stride", "16", "70.1 ± 0.9"]
    ]
    assert rows(text, "Training") == [["Not recorded."]]
    again = load_compressor(tmp_path, build("llava"))
    assert card(again.config) == text


@pytest.mark.parametrize(("sharp", "text"), [(0.25, "together with means of dropped"), (0, "the others never reach")])
def test_card_describes_the_dropped_tokens(sharp, text):
    config = EvoCompCompressor.from_mllm(build("llava"), sharp=sharp).config
    cells = dict(rows(card(config), "Compressor")[2:])
    assert text in card(config)
    assert cells["maximum of selected tokens (or fraction)"] == ("0.25" if sharp else "all that are kept")


def test_card_of_an_adapter(tmp_path):
    adapter = add_lora(EvoCompCompressor.from_mllm(build("llava"), layer=0), r=2)
    save(adapter, tmp_path, data="scenes")
    assert "## Data\n\nscenes" in (tmp_path / "README.md").read_text()
    assert load_compressor(tmp_path, build("llava")).get_base_model().config.metadata == {"data": "scenes"}


def test_the_card_contains_no_local_paths():
    for path in ("/data/someone/models/my-llava", "./my-llava", "~/models/my-llava", "C:\\models\\my-llava"):
        config = EvoCompCompressor.config_class(base_model_name_or_path=path)
        text = card(config)
        assert "my-llava" in text and "models/" not in text and "someone" not in text and ":\\" not in text
