"""Images are read as by `transformers.image_utils.load_image`, except for formats where that gives useless images."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from evocomp.data.images import BrokenImage, as_array, read_image, size_on_disk
from evocomp.log import UserError

RGB = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
GREY = RGB[..., 0]


def saved(path, image: Image.Image, **options):
    image.save(path, **options)
    return str(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_the_exif_orientation_is_applied_as_transformers_does(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exact = {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path / f"photo.{suffix}", Image.fromarray(RGB), exif=exif, **exact)
    assert np.array_equal(as_array(path), np.asarray(load_image(path)))
    # from the Exif standard: the corner that is at the top left of the upright image
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (-1, 0), 7: (-1, -1), 8: (0, -1)}
    assert as_array(path).shape[:2] == ((12, 20) if orientation < 5 else (20, 12))
    if suffix != "jpg":
        assert np.array_equal(as_array(path)[0, 0], RGB[corner[orientation]])


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "RGBX", "HSV"]


@pytest.mark.parametrize("mode", MODES)
def test_every_other_mode_is_converted_as_transformers_does(mode, tmp_path):
    source = Image.fromarray(RGB).convert("RGB" if mode in ("RGBX", "HSV") else "RGBA").convert(mode)
    suffix = {"CMYK": "tiff", "YCbCr": "tiff", "RGBX": "tiff", "HSV": None}.get(mode, "png")
    if suffix is None:
        assert np.array_equal(as_array(source), np.asarray(source.convert("RGB")))
        return
    path = saved(tmp_path / f"x.{suffix}", source)
    assert as_array(path).dtype == np.uint8 and np.array_equal(as_array(path), np.asarray(load_image(path)))


def test_alpha_is_dropped_as_transformers_does_not_blended(tmp_path):
    pixels = np.dstack([RGB, np.zeros((12, 20), np.uint8)])
    path = saved(tmp_path / "clear.png", Image.fromarray(pixels))
    assert np.array_equal(as_array(path), RGB) and np.array_equal(np.asarray(load_image(path)), RGB)


def test_a_palette_with_transparency_and_an_animation(tmp_path):
    indexed = Image.fromarray(RGB).quantize(8)
    path = saved(tmp_path / "p.png", indexed, transparency=bytes(range(8)))
    assert np.array_equal(as_array(path), np.asarray(load_image(path)))
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (10, 200)]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert np.array_equal(as_array(path), np.asarray(load_image(path))) and as_array(path).max() < 100


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 300, 32768], [65535, 65278, 128, 129]], np.uint16)
    path = saved(tmp_path / f"deep.{suffix}", Image.fromarray(values))
    assert np.array_equal(as_array(path)[..., 0], [[0, 1, 1, 128], [255, 254, 0, 1]])
    assert (as_array(path) == as_array(path)[..., :1]).all()


def test_big_endian_sixteen_bits(tmp_path):
    values = np.array([[0, 32768, 65535]], np.uint16)
    image = Image.frombytes("I;16B", (3, 1), values.astype(">u2").tobytes())
    path = saved(tmp_path / "deep.tiff", image)
    assert as_array(path)[0, :, 0].tolist() == [0, 128, 255]


def test_a_sixteen_bit_image_is_turned_upright_too(tmp_path):
    values = (np.arange(6, dtype=np.uint16) * 12850).reshape(2, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "deep.png", Image.fromarray(values), exif=exif)
    assert as_array(path)[..., 0].tolist() == [[150, 0], [200, 50], [250, 100]]


def test_images_of_32_bits_with_unknown_range_are_refused(tmp_path):
    path = saved(tmp_path / "float.tiff", Image.fromarray(np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)))
    with pytest.raises(BrokenImage, match=r"float.tiff has 32 bits per channel"):
        read_image(path)
    path = saved(tmp_path / "int.tiff", Image.fromarray(np.array([[0, 70000]], np.int32)))
    with pytest.raises(BrokenImage, match="32 bits"):
        read_image(path)
    small = saved(tmp_path / "small.tiff", Image.fromarray(np.array([[0, 255]], np.int32)))
    assert as_array(small)[0, :, 0].tolist() == [0, 255]


def test_base64_gives_the_same_pixels(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(RGB))
    text = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    assert np.array_equal(as_array(f"data:image/png;base64,{text}"), as_array(path))
    with pytest.raises(BrokenImage, match="base64 text of .* characters"):
        read_image("data:image/png;base64,AAAA")
    with pytest.raises(BrokenImage, match="not base64"):
        read_image("data:image/png;base64,?")


def test_pixels_opened_images_and_paths_are_accepted(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(GREY))
    for source in (path, tmp_path / "a.png", Image.open(path), GREY):
        assert np.array_equal(np.asarray(read_image(source)), np.dstack([GREY] * 3))
    assert as_array(RGB) is RGB
    assert size_on_disk(RGB) == [12, 20] and size_on_disk(path) > 0 and size_on_disk(path + "x") is None


def noise() -> bytes:
    stored = io.BytesIO()
    Image.fromarray(RGB).save(stored, "PNG")
    return stored.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"no image", noise()[:200], b"<svg></svg>", b"GIF89a\xff", b"BM" + b"\0" * 60]
)
def test_images_that_cannot_be_decoded_are_broken(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(BrokenImage, match=r"image .*x.png does not decode \(.+\)$"):
        read_image(str(tmp_path / "x.png"))


def test_unreadable_files_are_not_broken_images(tmp_path):
    """A disk error must not cause records to be left out."""
    for path, what in ((tmp_path / "gone.png", "is missing"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=what) as caught:
            read_image(str(path))
        assert not isinstance(caught.value, BrokenImage)
