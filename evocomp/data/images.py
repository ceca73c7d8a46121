"""Reading images. Labels, training, evaluation, reports and commands all read image files here.

The result equals that of `transformers.image_utils.load_image`, so that labels are made of the images that the
model's own pipeline sees: the EXIF orientation is applied, then the image is converted to RGB (alpha is dropped,
palettes and CMYK are converted, the first frame of an animation is used). There are two exceptions, where
transformers returns a useless image:

- 16-bit grey (PNG, PGM, TIFF) is scaled to 8 bits by 1/257; Pillow's conversion clips, so nearly all pixels are white.
- 32-bit integers above 255 and floating-point images are refused, because the value of white is unknown.
"""

import base64
import binascii
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from evocomp.log import UserError

ImageSource = str | Path | np.ndarray | Image.Image
"""A file, a `data:image/...;base64,...` URI, pixels [height, width, 3] uint8, or an opened image."""

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


class BrokenImage(UserError):
    """The content of an image cannot be decoded. The error is permanent, so such a record may be skipped."""


def read_image(source: ImageSource) -> Image.Image:
    """The image in RGB, with its EXIF orientation applied.

    Raises:
        BrokenImage: Pillow cannot decode the content.
        UserError: the file cannot be read (missing, no permission, disk error).
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    if isinstance(source, Image.Image):
        return _upright_rgb(source, source)
    content = _content(source)
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _upright_rgb(image, source)
    except BrokenImage:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds: OSError, SyntaxError, IndexError, ...
        reason = "it is empty" if not content else _reason(error)
        raise BrokenImage(f"image {name_of(source)} does not decode ({reason})") from None


def as_array(source: ImageSource) -> np.ndarray:
    """The image as pixels [height, width, 3] uint8; see `read_image`."""
    return source if isinstance(source, np.ndarray) else np.asarray(read_image(source))


def is_base64(source: object) -> bool:
    """Whether a string holds the image content, as a `data:` URI."""
    return isinstance(source, str) and source.startswith("data:")


def name_of(source: ImageSource) -> str:
    """Name of an image in messages."""
    if is_base64(source):
        return f"given as base64 text of {len(str(source))} characters"
    return str(source) if isinstance(source, str | Path) else "given as pixels"


def _content(source: str | Path) -> bytes:
    if is_base64(source):
        try:
            return base64.b64decode(str(source).partition(",")[2], validate=True)
        except (binascii.Error, ValueError) as error:
            raise BrokenImage(f"image {name_of(source)} is not base64 ({error})") from None
    try:
        return Path(source).read_bytes()
    except FileNotFoundError:
        raise UserError(f"image {source} is missing") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or _reason(error)
        raise UserError(f"image {source} cannot be read ({reason})") from None


def _upright_rgb(image: Image.Image, source: ImageSource) -> Image.Image:
    kind = image.format  # transposing resets it
    image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and kind in ("PNG", "PPM")):
        image = _eight_bits(image)
    elif image.mode == "F" or (image.mode == "I" and not _fits_eight_bits(image)):
        raise BrokenImage(
            f"image {name_of(source)} has 32 bits per channel with an unknown value range; save it with 8 bits"
        )
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey -> 8-bit grey: 65535 becomes 255, rounded."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _fits_eight_bits(image: Image.Image) -> bool:
    low, high = image.getextrema()
    return 0 <= low and high <= 255


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image format that Pillow supports"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def size_on_disk(source: str | np.ndarray) -> int | list[int] | None:
    """Size of a file in bytes (None if it is missing), or height and width of pixels."""
    if not isinstance(source, str):
        return list(source.shape[:2])
    if is_base64(source):
        return len(source)
    try:
        return os.path.getsize(source)
    except (OSError, ValueError):  # the error is reported when the image is opened
        return None
