from pathlib import Path

from PIL import Image

from experiments.method_figure import write

SHIPPED = Path(__file__).resolve().parent.parent / "notebooks" / "method.png"


def test_the_figure_is_small_enough_for_a_readme_and_repeatable(tmp_path):
    one = write(tmp_path / "one.png")
    two = write(tmp_path / "two.png")
    assert one.read_bytes() == two.read_bytes()
    for path in (one, SHIPPED):
        assert Image.open(path).size == (1800, 1305) and path.stat().st_size < 300_000
