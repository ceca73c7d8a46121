"""Resolve the image names of a record to existing files, without opening them."""

import base64
import binascii
import hashlib
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from evocomp.data.turns import Fault

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_LEAST_BASE64 = 64
"""Minimum length of a string that may be base64 content: the smallest PNG is longer."""

_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")


def named_images(record: dict[str, Any]) -> list[Any]:
    """Image names of a record, from `image` or `images`, not yet checked; empty without images.

    Raises:
        Fault: the record has a video or audio, a nested list, or two keys that differ.
    """
    for key in _OTHER_MEDIA:
        if record.get(key):
            raise Fault(f"has `{key}`, which is not supported; use records with images only")
    given = [_as_list(record.get(key)) for key in ("image", "images")]
    if given[0] and given[1] and given[0] != given[1]:
        raise Fault("has both `image` and `images`, and they differ")
    return given[0] or given[1]


class ImageFolder:
    """Finds images by name. Each folder is listed only once, which is fast for hundreds of thousands of names.

    Args:
        folder: folder to which the names are relative.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._listed: dict[str, dict[str, bool]] = {}

    def find(self, source: Any) -> tuple[str, str]:
        """Path (or `data:` URI) of an image and its name.

        Raises:
            Fault: the image is missing or is not a file.
        """
        if isinstance(source, dict):
            source = source.get("path") or source.get("url") or source.get("bytes")
        if not isinstance(source, str):
            raise Fault(f"names its image by {type(source).__name__}; give a string")
        if source.startswith("data:"):
            return _data_uri(source, source.partition(",")[2])
        path = self.folder / _local(source)
        if self._is_file(path):
            return str(path), source
        other = self.folder / source.replace("\\", "/")  # a path from Windows
        if "\\" in source and self._is_file(other):
            return str(other), source
        if len(source) >= _LEAST_BASE64 and _signature(source):
            return _data_uri(f"data:image;base64,{source}", source)
        shown = str(path) if len(str(path)) <= 200 else f"{str(path)[:197]}..."
        raise Fault(f"image {shown} {'is a folder' if os.path.isdir(path) else 'is missing'}")

    def _is_file(self, path: Path) -> bool:
        parent, name = os.path.split(path)
        if parent not in self._listed:
            self._listed[parent] = _files_in(parent)
        # an unlisted name may still exist: in another Unicode normalisation or letter case, or with ".." in its path
        return self._listed[parent].get(name) or os.path.isfile(path)


def _as_list(given: Any) -> list[Any]:
    if given is None or given == "" or given == [] or given != given:  # NaN, which pandas writes for a missing value
        return []
    items = given if isinstance(given, list) else [given]
    if any(isinstance(item, list) for item in items):
        raise Fault("has a nested list of images; give a flat list of names")
    if any(item is None or item == "" for item in items):
        raise Fault("has an image without a name in its list")
    return items


def _local(source: str) -> str:
    """The path of a name, which may be a `file:` URI."""
    scheme = _SCHEME.match(source)
    if scheme is None or "\n" in source[:200]:
        return source
    if scheme[0].lower() == "file:":
        return unquote(urlsplit(source).path)
    if source[scheme.end() : scheme.end() + 2] == "//":
        shown = source if len(source) <= 120 else f"{source[:117]}..."
        raise Fault(f"image {shown} is a URL; download it and give the file's name")
    return source


def _files_in(folder: str) -> dict[str, bool]:
    """Names of the regular files in a folder; symbolic links are checked separately."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: True for entry in entries if entry.is_file(follow_symlinks=False)}
    except (OSError, ValueError):
        return {}


def _signature(text: str) -> bool:
    """Whether base64 text starts with the signature of an image format."""
    try:
        head = base64.b64decode(text[:_LEAST_BASE64], validate=True)
    except (binascii.Error, ValueError):
        return False
    return head.startswith(_SIGNATURES)


def _data_uri(uri: str, content: str) -> tuple[str, str]:
    if ";base64" not in uri.partition(",")[0].lower():
        raise Fault("has an image as a data: URI that is not base64")
    compact = "".join(content.split())
    name = f"base64-{hashlib.sha256(compact.encode('utf-8', 'replace')).hexdigest()[:16]}"
    return f"{uri.partition(',')[0]},{compact}", name
